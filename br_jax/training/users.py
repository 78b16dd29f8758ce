"""The step of `training.step` with an axis of users: every slot of a pool holds one user's run.

A state is that of a single run whose arrays have a user axis U, behind the layers ([L, U, in, R]) or in front:
"trainable", "opt_state", "step" and "key". "gradient" and "loss" gather the optimizer step at hand, for a user's may
take several pool steps. A pool step runs the base once over the rows of all slots. Rows of a slot stand together, so no
row is sorted or gathered, and no number of one slot meets another's. Who sits in a slot is no part of any program.
"""

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array, Bool, Int

from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import constrain_tree
from br_jax.training.loss import batch_losses
from br_jax.training.step import Hyper, Stage, descend, init_state, trainable_adapter


class Turn(NamedTuple):
    """What a pool step is for each slot, [U]; the rows are apart."""

    hyper: Hyper  # f32 each
    restart: Bool[np.ndarray, " U"]  # whether the optimizer begins anew before it
    due: Bool[np.ndarray, " U"]  # whether it ends an optimizer step


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def pool_step(stage: Stage, state: dict, frozen: dict, batch: dict, turn: Turn) -> tuple[dict, dict]:
    """Adds to the gradients of all slots, and ends the optimizer steps that are due.

    Args:
        batch: as in `data.batches`, [U k, T]: k rows a slot. The weights of a user's rows add to 1 over an optimizer
            step. With dropout, "piece" int32[U k] numbers a slot's rows over that step.
        turn: see `Turn`; a slot whose rows are all padding goes through it unchanged.

    Returns:
        The new state, and [U] f32 "loss" and "grad_norm", of the optimizer step that ends here where one is due.
    """
    count, rows = len(turn.due), {name: values for name, values in batch.items() if name != "piece"}
    step = stage.step(state["trainable"], frozen, rows, turn.hyper.scale)

    def summed(trainable):
        variables = step.variables(trainable) | _seeds(stage, state, batch, count)
        return batch_losses(stage.decoder, variables, rows, stage.loss_chunk)

    (_, each), gradient = jax.value_and_grad(summed, has_aux=True)(state["trainable"])
    loss = state["loss"] + each.reshape(count, -1).sum(1)
    gradient = jax.tree.map(jnp.add, state["gradient"], gradient)

    def of_slot(one: dict, hyper: Hyper, restart, due):
        opt_state = jax.tree.map(lambda leaf: jnp.where(restart, 0, leaf).astype(leaf.dtype), one["opt_state"])
        trainable, moved = descend(one["trainable"], one["gradient"], opt_state, hyper)
        gathered = {"gradient": jax.tree.map(jnp.zeros_like, one["gradient"]), "loss": jnp.float32(0)}
        after = {**one, "trainable": trainable, "opt_state": moved, "step": one["step"] + 1, **gathered}
        before = one | {"opt_state": opt_state}
        norm = optax.tree.norm(one["gradient"])
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), after, before), norm

    state = {**state, "gradient": gradient, "loss": loss}
    axes = user_axes(state)
    after, norms = jax.vmap(of_slot, in_axes=(axes, 0, 0, 0), out_axes=(axes, 0))(state, *turn)
    return constrain_tree(after), {"loss": loss, "grad_norm": norms}


def _seeds(stage: Stage, state: dict, batch: dict, count: int) -> dict:
    """The collection by which dropout is drawn: of a user's key, its step, its row's number, and the matrix."""
    if not stage.decoder.dropout:
        return {}
    rows = batch["piece"].reshape(count, -1)

    def of_slot(key, step, pieces):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        return jax.vmap(lambda piece: jax.random.fold_in(key, piece))(pieces)

    keys = jax.vmap(of_slot)(state["key"], state["step"], rows).reshape(-1)

    def of_matrix(path, layers):
        of_row = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, zlib.crc32(path.encode())), (layers,)))
        return of_row(keys).T

    flat = traverse_util.flatten_dict(state["trainable"]["lora_trainable"], sep="/")
    shapes = {path.removesuffix("/a"): leaf.shape[0] for path, leaf in flat.items() if path.endswith("/a")}
    seeds = {f"{path}/rows": of_matrix(path, layers) for path, layers in shapes.items()}
    return {"seeds": traverse_util.unflatten_dict(seeds, sep="/")}


def begin(adapter: Adapter, seed: int) -> dict:
    """One slot's state before its first step."""
    state = init_state(trainable_adapter(adapter), seed)
    del state["objective"]
    return state | {"gradient": jax.tree.map(jnp.zeros_like, state["trainable"]), "loss": jnp.float32(0)}


def user_axes(state: dict) -> dict:
    """Where the user axis stands (or would) in each leaf: behind the layers of an adapter's leaves, else in front."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: int(getattr(path[-1], "key", "") in ("a", "b")), state)


def empty_state(one: dict, slots: int) -> dict:
    """A state of so many slots that hold nothing; `one` is a slot's, real or abstract, see `begin`."""

    def slots_of(leaf, axis):
        return jnp.zeros((*leaf.shape[:axis], slots, *leaf.shape[axis:]), leaf.dtype)

    return jax.tree.map(slots_of, one, user_axes(one))


@functools.partial(jax.jit, donate_argnums=0)
def put(state: dict, slot: Int[Array, ""], one: dict) -> dict:
    """The state with one slot's set."""

    def write(leaf, new, axis):
        return jax.lax.dynamic_update_index_in_dim(leaf, new.astype(leaf.dtype), slot, axis)

    return constrain_tree(jax.tree.map(write, state, one, user_axes(one)))


@jax.jit
def take(state: dict, slot: Int[Array, ""]) -> dict:
    """One slot's state."""
    return jax.tree.map(
        lambda leaf, axis: jax.lax.dynamic_index_in_dim(leaf, slot, axis, keepdims=False), state, user_axes(state)
    )
