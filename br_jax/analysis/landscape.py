"""The loss on a plane through a model: along Buffer's delta, or along random directions.

A direction is an adapter, or a tree of the params' shapes; coordinates are arguments of one compiled program, so a
whole grid compiles once.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import inner_product
from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import mesh_of, place
from br_jax.core.progress import progress
from br_jax.data.rows import Row
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.training.batching import one_pass
from br_jax.training.loss import batch_loss


def loss_grid(
    model: Model,
    rows: Sequence[Row],
    directions: tuple[Adapter, Adapter] | tuple[dict, dict],
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    max_length: int = 512,
    batch_size: int = 16,
) -> Float[np.ndarray, "X Y"]:
    """The mean loss over the answer tokens of rows at base + x first + y second, for every x and y.

    Args:
        model: what is at (0, 0).
        directions: two adapters of the same targets, or two trees of the shapes of the params (`filter_normalised`).
    """
    batches, adapters = one_pass(model, rows, max_length, batch_size), isinstance(directions[0], Adapter)
    trees = place(tuple(map(lora.collection, directions)) if adapters else directions, mesh_of(model.params))
    tokens = sum(float(batch["weights"].sum()) for batch in batches)
    at, lines = _with_adapters if adapters else _with_params, []
    with progress(len(xs) * len(ys), "landscape", "point", keep=False) as bar:
        for x in xs:
            points = [jnp.asarray([x, y], jnp.float32) for y in ys]
            line = [sum(at(model.decoder, model.params, trees, where, batch) for batch in batches) for where in points]
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


@functools.partial(jax.jit, static_argnums=0)
def _with_adapters(decoder: Decoder, params: dict, trees: tuple[dict, dict], where, batch: dict) -> Any:
    def joined(first, second):
        b = jnp.concatenate([where[0] * first["b"], where[1] * second["b"]], -2)
        return {"a": jnp.concatenate([first["a"], second["a"]], -1), "b": b}

    lora_ = jax.tree.map(joined, *trees, is_leaf=lambda node: "a" in node)
    return batch_loss(decoder, {"params": params, "lora": lora_}, batch, 256)


@functools.partial(jax.jit, static_argnums=0)
def _with_params(decoder: Decoder, params: dict, trees: tuple[dict, dict], where, batch: dict) -> Any:
    moved = jax.tree.map(lambda w, x, y: w + (where[0] * x + where[1] * y).astype(w.dtype), params, *trees)
    return batch_loss(decoder, {"params": moved}, batch, 256)
