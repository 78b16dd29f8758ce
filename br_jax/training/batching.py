"""Rows in batches for one pass over them, in no order and no steps: losses, gradients, sizes of what is held out."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from br_jax.core.mesh import mesh_of, place, whole_batch
from br_jax.data.batches import alike, encode_rows, make_batches
from br_jax.data.rows import Row
from br_jax.models.model import Model


def one_pass(
    model: Model, rows: Sequence[Row], max_length: int, batch_size: int = 16, count_alike: bool = False
) -> list[dict]:
    """Batches of all rows, each cut at `max_length` tokens, of one length that 16 divides, placed as the model is.

    Args:
        count_alike: gives rows weights by which they count alike, see `batches.alike`.

    Raises:
        UserError: as `encode_rows`.
    """
    examples, _ = encode_rows(rows, model.tokenizer, model.template, max_length)
    longest, mesh = max(len(example["tokens"]) for example in examples), mesh_of(model.params)
    examples = alike(examples) if count_alike else examples
    order = {"batch_size": whole_batch(batch_size, mesh), "seed": 0, "buckets": (-(-longest // 16) * 16,)}
    return [place(batch, mesh) for batch in make_batches(examples, **order)]


def summed(batches: Iterable[dict], of: Callable[[dict], Any]) -> Any:
    """The sum over batches of what a function gives of each: a tree of arrays, of which two are held at a time."""
    return functools.reduce(_add, map(of, batches))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, found: Any) -> Any:
    return jax.tree.map(jnp.add, total, found)
