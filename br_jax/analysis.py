"""Why it works: what a gradient step does to safety, the loss round a model, what a merge can change.

The Safety Gradient Score says whether a step of training goes along alignment or against it, layer by layer:
S_l = <-grad_W L, v_l> / ||v_l||, with v_l what a refusal LoRA adds to layer l: above 0 a step adds to safety, below 0
it takes some away. Every layer comes of one backward pass: with W + t_l v_l at t = 0, dL/dt_l = <grad_W L, v_l>.
Beside the gradient's own length the score says whether something shrinks the gradient or turns it away from v.
"""

import functools
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import factors, inner_product, output_spaces, removed_shares
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.core.mesh import mesh_of, place
from br_jax.core.progress import progress
from br_jax.data.rows import Row
from br_jax.defences.objectives import inner
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.training.batching import one_pass, summed
from br_jax.training.loss import batch_loss

PerLayer = dict[str, Float[np.ndarray, " L"]]  # path of the matrix -> a number a layer


def safety_gradients(
    model: Model, safety: Adapter, rows: Sequence[Row], attached: Mapping[str, Adapter] | None = None, **batching: int
) -> PerLayer:
    """<-grad_W L, v_l> of each matrix and layer, L the mean loss of rows, all of which count alike.

    `safety` is v, for instance a LoRA that was trained on refusals, without Buffer; `attached` are adapters on the
    model, such as Buffer or a user's. Rows are cut at `max_length` (512), `batch_size` (16) at a time.
    """
    along = place(lora.collection(safety), mesh_of(model.params))
    gates = {path: jnp.zeros(pair["a"].shape[0], jnp.float32) for path, pair in safety.weights.items()}
    of = functools.partial(_slopes, model.decoder, gates, model.params, along)
    sums, total = _sums(model, rows, attached, of, **batching)
    return {path: -np.asarray(slope) / total for path, slope in sums.items()}


def gradient_norms(
    model: Model, paths: Collection[str], rows: Sequence[Row], attached: Mapping[str, Adapter] | None = None, **batching
) -> PerLayer:
    """||grad_W L|| of each matrix in `paths` and layer, else as `safety_gradients`; holds a gradient of their size."""
    flat = traverse_util.flatten_dict(model.params, sep="/")
    kernels = {f"{path}/kernel": flat.pop(f"{path}/kernel") for path in paths}
    sums, total = _sums(model, rows, attached, functools.partial(_gradients, model.decoder, kernels, flat), **batching)
    return {path: np.asarray(jnp.linalg.norm(sums[f"{path}/kernel"], axis=(1, 2))) / total for path in paths}


def lengths(safety: Adapter) -> PerLayer:
    """||v_l|| of each matrix and layer."""
    pairs = safety.weights.items()
    return {path: np.sqrt(np.asarray(inner(p["a"], p["b"], p["b"]))) * abs(float(safety.scale)) for path, p in pairs}


def by_layer(products: Mapping[str, Float[np.ndarray, " L"]], safety: Adapter) -> Float[np.ndarray, " L"]:
    """The score S_l: all matrices of a layer together, over the length of v there."""
    norm = np.sqrt(sum(length**2 for length in lengths(safety).values()))
    return sum(products.values()) / (norm + 1e-8)


def _sums(
    model: Model, rows, attached, of: Callable, max_length: int = 512, batch_size: int = 16
) -> tuple[dict[str, Array], float]:
    """The sum over batches of `of(collection of what is attached, batch)`, and of the rows' weights, all alike."""
    held = place(lora.collection(lora.stack(attached)), mesh_of(model.params)) if attached else {}
    batches = one_pass(model, rows, max_length, batch_size, count_alike=True)
    return summed(batches, functools.partial(of, held)), sum(float(batch["weights"].sum()) for batch in batches)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(decoder: Decoder, kernels: dict, others: dict, held: dict, batch: dict) -> dict:
    def loss(kernels):
        params = traverse_util.unflatten_dict(others | kernels, sep="/")
        return batch_loss(decoder, {"params": params, "lora": held}, batch, 256)

    return jax.tree.map(lambda grad: grad.astype(jnp.float32), jax.grad(loss)(kernels))


@functools.partial(jax.jit, static_argnums=0)
def _slopes(decoder: Decoder, gates: dict[str, Array], params: dict, along: dict, held: dict, batch: dict) -> dict:
    held, along = (traverse_util.flatten_dict(tree, sep="/") for tree in (held, along))

    def loss(gates):
        joined = dict(held)
        for path, gate in gates.items():
            a, b = f"{path}/a", f"{path}/b"
            for key, side, axis in ((a, along[a], -1), (b, gate[:, None, None] * along[b], -2)):
                joined[key] = jnp.concatenate([held[key], side], axis) if key in held else side
        variables = {"params": params, "lora": traverse_util.unflatten_dict(joined, sep="/")}
        return batch_loss(decoder, variables, batch, 256)

    return jax.grad(loss)(gates)


# -- the loss on a plane through a model; a whole grid is one program, whose coordinates are its arguments


def loss_grid(
    model: Model,
    rows: Sequence[Row],
    directions: tuple,
    xs: Sequence[float],
    ys: Sequence[float],
    max_length: int = 512,
) -> Float[np.ndarray, "X Y"]:
    """The mean loss over the answer tokens of rows at the model + x first + y second, for every x and y.

    Directions are adapters of the same targets, or trees of the shapes of the params (`filter_normalised`).
    """
    batches, adapters = one_pass(model, rows, max_length), isinstance(directions[0], Adapter)
    trees = place(tuple(map(lora.collection, directions)) if adapters else directions, mesh_of(model.params))
    tokens, lines = sum(float(batch["weights"].sum()) for batch in batches), []
    with progress(len(xs) * len(ys), "landscape", "point", keep=False) as bar:
        for x in xs:
            points = [jnp.asarray([x, y], jnp.float32) for y in ys]
            line = [sum(_loss(model.decoder, adapters, model.params, trees, at, b) for b in batches) for at in points]
            lines.append(np.float32(jax.device_get(line)) / tokens)  # waits for the device once a line
            bar.update(len(points))
    return np.float32(lines)


def orthogonal_to(adapter: Adapter, key: Array) -> Adapter:
    """A random adapter of the same length, at a right angle to one, over all matrices together."""
    shapes = {path: (*p["a"].shape[:2], p["b"].shape[2]) for path, p in adapter.weights.items()}
    rank = max(pair["a"].shape[-1] for pair in adapter.weights.values())
    drawn = lora.init(key, shapes, rank, rank, "unknown", adapter.base)
    weights = {
        path: {"a": pair["a"], "b": jax.random.normal(jax.random.fold_in(key, i), pair["b"].shape)}
        for i, (path, pair) in enumerate(sorted(drawn.weights.items()))
    }
    drawn, square = drawn.replace(weights=weights), inner_product(adapter, adapter)
    across = lora.stack([drawn, lora.scaled(adapter, -float(inner_product(drawn, adapter) / square))])
    return lora.scaled(across, math.sqrt(float(square / inner_product(across, across))))


def filter_normalised(params: dict, key: Array) -> dict:
    """A Gaussian direction, each output's weights of a kernel as long as the kernel's own; 0 for all that is no kernel.

    Li et al. 2018, arXiv 1712.09913.
    """

    def draw(path, leaf):
        if path[-1].key != "kernel":
            return jnp.zeros_like(leaf)
        # crc32 and not hash(): the latter is salted anew in each process
        noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), leaf.shape)
        norm = lambda x: jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=-2, keepdims=True))  # noqa: E731
        return (noise * norm(leaf) / norm(noise)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _loss(decoder: Decoder, adapters: bool, params: dict, trees: tuple[dict, dict], at: Array, batch: dict) -> Array:
    """The sum over a batch's answer tokens at a point of the plane."""

    def joined(first, second):
        b = jnp.concatenate([at[0] * first["b"], at[1] * second["b"]], -2)
        return {"a": jnp.concatenate([first["a"], second["a"]], -1), "b": b}

    if adapters:
        variables = {"params": params, "lora": jax.tree.map(joined, *trees, is_leaf=lambda node: "a" in node)}
    else:
        step = lambda w, x, y: w + (at[0] * x + at[1] * y).astype(w.dtype)  # noqa: E731
        variables = {"params": jax.tree.map(step, params, *trees)}
    return batch_loss(decoder, variables, batch, 256)


# -- the merge


class Overlap(NamedTuple):
    """Of one matrix, [L] each."""

    outputs: Float[np.ndarray, " L"]  # ||W_R Q Q^T|| / ||W_R||, Q the user's output space
    inputs: Float[np.ndarray, " L"]  # ||P P^T W_R|| / ||W_R||, P the user's input space
    chance: Float[np.ndarray, " L"]  # what a random W_R would have of outputs: sqrt(rank of Q / width)


def overlaps(user: Adapter, reinforce: Adapter, tau: float = 0.01) -> dict[str, Overlap]:
    """How much of Reinforce lies where the user's adapter does, by path of the matrix."""
    users, reinforces, found = factors(user), factors(reinforce), {}
    for path in sorted(users.keys() & reinforces.keys()):
        (u_a, u_b), (r_a, r_b) = users[path], reinforces[path]
        outputs = removed_shares((u_a, u_b), (r_a, r_b), tau)
        inputs = removed_shares((u_b.mT, u_a.mT), (r_b.mT, r_a.mT), tau)
        chance = [np.sqrt(q.shape[1] / len(q)) for q in output_spaces(u_a, u_b, tau)]
        found[path] = Overlap(outputs, inputs, np.array(chance))
    return found


def reach(user: Adapter, reinforce: Adapter, merge: MergeConfig) -> dict[str, float]:
    """How far a can move the merged delta: ||merged(a=0) - merged(a=1)|| over ||merged(a=0)||, and over ||user's||."""
    plain, apart = (qr_merge(user, reinforce, replace(merge, a=a)) for a in (0.0, 1.0))
    off = lora.stack([plain, lora.scaled(apart, -1.0)])
    moved, whole, own = (inner_product(x, x) ** 0.5 for x in (off, plain, lora.scaled(user, merge.scale)))
    return {"of_merged": moved / whole, "of_user": moved / own if own else float("inf")}
