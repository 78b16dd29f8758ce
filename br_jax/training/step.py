"""One optimizer step: loss -> gradient -> clip -> AdamW. Every stage, plain SFT and pre-training are this step.

A state is {"trainable", "opt_state", "step", "key", "objective"}. `trainable` and `frozen` are dicts of variable
collections ("params", "lora", "lora_trainable"). Stages differ in which collection lies in which dict, and in the
objective. Only `trainable` is differentiated, so the frozen half has neither gradients nor optimizer slots; "aux" in it
are adapters that only the objective looks at. What differs from user to user is an argument of the programs here: a
process compiles them once for each shape of a batch, however many users come.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import constrain_tree, platform
from br_jax.models.attention import Attend
from br_jax.models.decoder import Decoder
from br_jax.training.config import TrainConfig
from br_jax.training.loss import batch_loss, batch_losses

_STREAM = 0x57A  # folded into the key of dropout for rows that are not the stage's own


class Hyper(NamedTuple):
    """Numbers of a step that are arguments of its program, f32[] each; see `TrainConfig`."""

    learning_rate: Float[Array, ""] | float  # of this very step, see `learning_rates`
    weight_decay: Float[Array, ""] | float
    clip_norm: Float[Array, ""] | float
    scale: Float[Array, ""] | float  # of the trainable adapter
    progress: Float[Array, ""] | float = np.float32(0)  # share of the run that is done before the step

    @classmethod
    def of(cls, config: TrainConfig) -> "Hyper":
        """Those of a config, before its first step."""
        return cls(*map(np.float32, (0.0, config.weight_decay, config.clip_norm, config.alpha / config.rank)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(stage: "Stage", state: dict, frozen: dict, batch: dict, hyper: Hyper) -> tuple[dict, dict[str, Any]]:
    """One optimizer step; metrics are scalars of the batch."""
    key = None
    if stage.decoder.dropout > 0:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
    step = stage.step(state["trainable"], frozen, batch, hyper.scale, key)
    step = step._replace(number=state["step"], progress=hyper.progress)
    loss, grads, objective = stage.objective.gradient(step, state["objective"])
    trainable, opt_state = descend(state["trainable"], grads, state["opt_state"], hyper)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": hyper.learning_rate,
        "answer_tokens": jnp.sum(batch["weights"] > 0),
        "tokens": jnp.sum(batch["segment_ids"] != 0),
    }
    number = state["step"] + 1
    after = {**state, "trainable": trainable, "opt_state": opt_state, "step": number, "objective": objective}
    return constrain_tree(after), metrics


def descend(trainable: dict, grads: dict, opt_state: optax.OptState, hyper: Hyper) -> tuple[dict, optax.OptState]:
    """(weights, optimizer state) after AdamW on a gradient that is clipped by its global norm."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count of steps
        updates, opt_state = optimizer(hyper).update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state


def optimizer(hyper: Hyper) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8) after clipping by global norm."""
    adamw = optax.adamw(lambda count: hyper.learning_rate, weight_decay=hyper.weight_decay)
    return optax.chain(optax.clip_by_global_norm(hyper.clip_norm), adamw)


@functools.partial(jax.jit, static_argnums=0)
def probe(stage: "Stage", trainable: dict, frozen: dict, batch: dict, scale) -> tuple[Array, Array]:
    """(loss, global norm of the trainable gradient): what saturation looks at."""
    loss, grads = stage.step(trainable, frozen, batch, scale).gradient()
    return loss, optax.tree.norm(grads)


class Step(NamedTuple):
    """One step of training, as an objective sees it."""

    decoder: Decoder  # as it trains: dropout, remat and attention are its own
    accumulation: int  # micro-batches that a batch is taken in
    loss_chunk: int  # answer tokens that a device turns into logits at a time
    trainable: dict  # variable collections, the only ones with a gradient
    frozen: dict  # the base's and attached adapters' collections
    rows: dict  # the batch, see `data.batches`
    scale: Float[Array, "*U"] | float  # of the trainable adapter; [U] of several side by side
    key: Array | None = None  # dropout acts when there is one
    streams: Mapping[str, dict] = MappingProxyType({})  # a batch of each of the objective's
    # The adapters that the objective looks at: collections as of `lora.collection`, whose scale is in b.
    aux: Mapping[str, dict] = MappingProxyType({})
    number: Int[Array, ""] | int = 0  # of the step, from 0
    progress: Float[Array, ""] | float = 0.0  # share of the run that is done before it

    def gradient(self, trainable: dict | None = None, rows: dict | None = None, loss: Callable | None = None):
        """(mean loss over answer tokens, by their weights, and its gradients) at weights and on a batch.

        The batch is taken in micro-batches; the mean is over the answer tokens of the whole batch, whatever the split,
        and a batch without any has loss 0 and gradient 0.

        Args:
            trainable, rows: the weights and the batch; default: the step's own.
            loss: of (step, variables, a part of the batch, key), summed over the part by its weights; default: the
                cross-entropy at answer tokens.
        """
        trainable, seed = self.trainable if trainable is None else trainable, self.key
        if rows is not None and seed is not None:  # masks that are not those of the stage's own rows
            seed = jax.random.fold_in(seed, _STREAM)
        rows, parts = self.rows if rows is None else rows, self.accumulation

        def summed(trainable, part, key):
            variables = self.variables(trainable)
            if loss is None:
                return batch_loss(self.decoder, variables, part, self.loss_chunk, key)
            return loss(self, variables, part, key)

        def add(carry, xs):
            index, part = xs
            part_key = None if seed is None else jax.random.fold_in(seed, index)
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(summed)(trainable, part, part_key)), None

        if parts == 1:
            total, grads = jax.value_and_grad(summed)(trainable, rows, seed)
        else:
            micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
            (total, grads), _ = jax.lax.scan(add, zero, (jnp.arange(parts), micro))
        inverse = 1 / jnp.maximum(jnp.sum(rows["weights"]), 1)
        return total * inverse, jax.tree.map(lambda g: g * inverse, grads)

    @property
    def head(self) -> tuple:
        """What `training.loss` takes behind the weights: chunk, soft cap and precision."""
        return self.loss_chunk, self.decoder.spec.logit_soft_cap, self.decoder.matmul_precision

    def variables(self, trainable: dict) -> dict:
        """The decoder's collections with weights as the trainable ones; the adapter's scale goes into its (small) b."""
        if "lora_trainable" not in trainable:
            return {**self.frozen, **trainable}
        scale = jnp.reshape(self.scale, (1, *jnp.shape(self.scale), 1, 1))
        adapter = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, trainable["lora_trainable"]
        )
        return {**self.frozen, **trainable, "lora_trainable": adapter}


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step descends: the answer loss of the stage's rows. A subclass is a defence's.

    Its fields are settings, a part of the step's program. It may ask for more rows than the stage's own (`streams`),
    for adapters that it looks at (`aux`), and for state that goes from step to step and into checkpoints (`begin`).
    """

    def begin(self, trainable: dict) -> dict[str, Any]:
        """The state before the first step: a pytree whose leaves are named as the weights', or scalars."""
        return {}

    def gradient(self, step: Step, state: dict[str, Any]) -> tuple[Float[Array, ""], dict, dict[str, Any]]:
        """(loss to report, gradient of the trainable collections, state for the next step)."""
        return *step.gradient(), state

    def end(self, trainable: dict, state: dict[str, Any]) -> dict:
        """The weights that the run gives, of those after the last step."""
        return trainable


class Stage(NamedTuple):
    """What the programs of a stage are made of; equal stages share them."""

    decoder: Decoder  # see `Step`
    accumulation: int
    loss_chunk: int
    objective: Objective = Objective()

    @classmethod
    def of(cls, decoder: Decoder, config: TrainConfig, mesh: Mesh, objective: Objective | None = None) -> "Stage":
        """The stage of a model's decoder and a config, on a mesh's platform."""
        attention = Attend(config.attention, platform(mesh))
        training = decoder.clone(dropout=config.dropout, remat=config.remat, attention=attention)
        return cls(training, config.accumulation, config.loss_chunk, objective or Objective())

    def step(self, trainable: dict, frozen: dict, batch: dict, scale, key=None) -> Step:
        """One step of it; `frozen` may hold "aux", and `batch` "streams"."""
        (rows, streams), (attached, aux) = _without(batch, "streams"), _without(frozen, "aux")
        parts = self.decoder, self.accumulation, self.loss_chunk
        return Step(*parts, trainable, attached, rows, scale, key, streams, aux)


def _without(tree: dict, name: str) -> tuple[dict, dict]:
    return {key: value for key, value in tree.items() if key != name}, tree.get(name, {})


def init_state(trainable: dict, seed: int, objective: Objective | None = None) -> dict:
    """A fresh state; `key` is raw key data, so that a checkpoint can hold it."""
    objective_state = (objective or Objective()).begin(trainable)
    return {"trainable": trainable, "objective": objective_state, **_fresh_state(trainable, np.uint32(seed))}


@jax.jit
def _fresh_state(trainable: dict, seed: Int[Array, ""]) -> dict:
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1))
    opt_state = optimizer(Hyper(0.0, 0.0, 0.0, 0.0)).init(trainable)
    return {"opt_state": opt_state, "step": jnp.zeros((), jnp.int32), "key": key}


@functools.partial(jax.jit, donate_argnums=0)
def restarted(opt_state: optax.OptState) -> optax.OptState:
    """The optimizer's state before its first step: AdamW's is all zeros."""
    return constrain_tree(jax.tree.map(jnp.zeros_like, opt_state))


def trainable_adapter(adapter: Adapter) -> dict:
    """The trainable half of a step; the adapter's scale is an argument of the step and stays out of it."""
    return {"lora_trainable": lora.collection(adapter.replace(scale=jnp.float32(1)))}


def frozen_collections(params: dict, frozen: Mapping[str, Adapter], how: str) -> dict:
    """The frozen half of a step: the base and the attached adapters, stacked beside it or folded into a copy."""
    if not frozen:
        return {"params": params}
    joined = lora.stack(frozen)
    if how == "fold":
        return {"params": lora.fold(params, joined)}
    return {"params": params, "lora": lora.collection(joined)}


def learning_rates(config: TrainConfig, steps: int) -> Float[np.ndarray, " steps"]:
    """f32 rate of each step: in each cycle linear warm-up, then cosine to 0.

    As transformers' `get_cosine_schedule_with_warmup`; in numpy, so that a run's length is no part of any program.
    """

    def share(steps: int) -> np.ndarray:
        step, warmup = np.arange(steps), -int(-steps * config.warmup_ratio // 1)
        progress = (step - warmup) / max(1, steps - warmup)
        return np.where(step < warmup, step / max(1, warmup), 0.5 * (1 + np.cos(np.pi * progress)))

    shares = [share(len(part)) for part in _cycles(config, steps)]
    return (config.learning_rate * np.concatenate(shares)).astype(np.float32)


def restarts(config: TrainConfig, steps: int) -> set[int]:
    """The steps before which the optimizer begins anew."""
    return {int(part[0]) for part in _cycles(config, steps)} - {0}


def _cycles(config: TrainConfig, steps: int) -> list[np.ndarray]:
    """The steps of each cycle of a run; where they do not divide, the first cycles are longer by one."""
    return np.array_split(np.arange(steps), min(config.cycles, steps))


# -- the same step with an axis of users -------------------------------------------------------------------------------
# One user's run is in each slot of a pool. Arrays of a pool's state have the axis of users U behind the layers
# ([L, U, in, R]) or in front; "gradient" and "loss" gather the step at hand, for a user's may take several pool steps.
# The base runs once over the rows of all slots. Rows of a slot stand together, so no row is sorted or gathered, and no
# number of one slot meets another's.


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
    count, (rows, _) = len(turn.due), _without(batch, "piece")
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

    def of_slot(key, step, pieces):
        key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        return jax.vmap(lambda piece: jax.random.fold_in(key, piece))(pieces)

    keys = jax.vmap(of_slot)(state["key"], state["step"], batch["piece"].reshape(count, -1)).reshape(-1)

    def of_matrix(path, layers):
        of_row = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, zlib.crc32(path.encode())), (layers,)))
        return of_row(keys).T

    flat = traverse_util.flatten_dict(state["trainable"]["lora_trainable"], sep="/")
    shapes = {path.removesuffix("/a"): leaf.shape[0] for path, leaf in flat.items() if path.endswith("/a")}
    seeds = {f"{path}/rows": of_matrix(path, layers) for path, layers in shapes.items()}
    return {"seeds": traverse_util.unflatten_dict(seeds, sep="/")}


def first_state(adapter: Adapter, seed: int) -> dict:
    """One slot's state before its first step."""
    state, _ = _without(init_state(trainable_adapter(adapter), seed), "objective")
    return state | {"gradient": jax.tree.map(jnp.zeros_like, state["trainable"]), "loss": jnp.float32(0)}


def user_axes(state: dict) -> dict:
    """Where the user axis stands (or would) in each leaf: behind the layers of an adapter's leaves, else in front."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: int(getattr(path[-1], "key", "") in ("a", "b")), state)


def empty_state(one: dict, slots: int) -> dict:
    """A state of so many slots that hold nothing; `one` is a slot's, real or abstract, see `first_state`."""
    return jax.tree.map(
        lambda leaf, axis: jnp.zeros((*leaf.shape[:axis], slots, *leaf.shape[axis:]), leaf.dtype), one, user_axes(one)
    )


@functools.partial(jax.jit, donate_argnums=0)
def put(state: dict, slot: Int[Array, ""], one: dict) -> dict:
    """The state with one slot's set."""
    update = jax.lax.dynamic_update_index_in_dim
    written = jax.tree.map(
        lambda leaf, new, axis: update(leaf, new.astype(leaf.dtype), slot, axis), state, one, user_axes(one)
    )
    return constrain_tree(written)


@jax.jit
def take(state: dict, slot: Int[Array, ""]) -> dict:
    """One slot's state."""
    take_one = functools.partial(jax.lax.dynamic_index_in_dim, index=slot, keepdims=False)
    return jax.tree.map(lambda leaf, axis: take_one(leaf, axis=axis), state, user_axes(state))
