"""Rows in batches: those of a run's steps, and those of one pass over rows, for losses and gradients."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import batch_parts, local_rows, make_mesh, mesh_of, platform, shard, whole_batch
from br_jax.core.progress import progress
from br_jax.data.batches import Example, encode, encode_rows, make_batches, make_packed_batches, normalize_per_example
from br_jax.data.rows import Row
from br_jax.models.model import Model
from br_jax.training.config import TrainConfig
from br_jax.training.step import Stage, frozen_collections, probe, trainable_adapter


def encode_for(
    name: str, model: Model, rows: Sequence[Row], config: TrainConfig, of: str = "rows"
) -> tuple[list[Example], dict[str, int]]:
    """Encodes a run's rows as its config weighs and cuts them; a warning says how many lose their end, or all.

    Returns:
        The examples; how many rows were given ("rows"), left out ("dropped") and cut ("truncated").
    """
    examples, dropped = encode_rows(rows, model.tokenizer, model.template, config.max_length)
    if dropped.first:
        logging.warning(
            "%s: of %d %s %d are left out and %d lose their end at %d tokens (the first, %s): raise max_length",
            name, dropped.rows, of, dropped.total, dropped.truncated, config.max_length, dropped.first,
        )  # fmt: skip
    counts = {"rows": dropped.rows, "dropped": dropped.total, "truncated": dropped.truncated}
    return normalize_per_example(examples) if config.loss_mean == "rows" else examples, counts


def run_order(config: TrainConfig) -> dict[str, int]:
    """How a config orders rows, as `data.batches` takes it."""
    length = {"steps": config.steps} if config.steps else {"epochs": config.epochs}
    return {"batch_size": config.batch_size, "seed": config.seed, **length}


def step_batches(examples: Sequence[Example], config: TrainConfig, mesh: Mesh, shapes: int = 3) -> grain.MapDataset:
    """This process' rows of each of a run's batches, as its config orders, pads or packs them; see `data.batches`.

    Packed ones have at most so many shapes.
    """
    order = run_order(config) | {"rows": functools.partial(local_rows, mesh)}
    if not config.packing:
        return make_batches(examples, buckets=padded_lengths(config), **order)
    multiple, on = batch_parts(mesh) * config.accumulation, platform(mesh)
    shape = {"length": config.packing, "multiple": multiple, "unit": packed_unit(on), "shapes": shapes}
    shape["share"] = on != "tpu"  # its attention takes segments that see themselves alone
    return make_packed_batches(examples, **shape, **order)


def with_streams(batches, streams: Mapping[str, Sequence[Example]], config: TrainConfig, mesh: Mesh):
    """The batches of a run, each with one of every stream's; packed, those of a stream have one shape.

    A step is compiled for each pair of shapes.
    """
    as_long = dataclasses.replace(config, steps=len(batches))
    more = {kind: step_batches(examples, as_long, mesh, shapes=1) for kind, examples in streams.items()}
    joined = grain.experimental.ZipMapDataset([batches, *more.values()])
    return joined.map(lambda parts: parts[0] | {"streams": dict(zip(more, parts[1:], strict=True))})


def packed_unit(on: str) -> int:
    """What divides a packed row's length; a TPU's attention wants whole tiles."""
    return 128 if on == "tpu" else 32


def padded_lengths(config: TrainConfig) -> tuple[int, ...]:
    """The configured lengths, ascending, and the limit itself for rows that are longer."""
    return tuple(sorted({*(b for b in config.buckets if b < config.max_length), config.max_length}))


def one_pass(
    model: Model, rows: Sequence[Row], max_length: int, batch_size: int = 16, count_alike: bool = False
) -> list[dict]:
    """Batches of all rows, each cut at `max_length` tokens, of one length that 16 divides, placed as the model is.

    With `count_alike` rows have weights by which they count alike, see `batches.normalize_per_example`.
    """
    examples, _ = encode_rows(rows, model.tokenizer, model.template, max_length)
    longest, mesh = max(len(example["tokens"]) for example in examples), mesh_of(model.params)
    examples = normalize_per_example(examples) if count_alike else examples
    order = {"batch_size": whole_batch(batch_size, mesh), "seed": 0, "buckets": (-(-longest // 16) * 16,)}
    return [shard(batch, mesh) for batch in make_batches(examples, **order)]


def summed(batches: Iterable[dict], of: Callable[[dict], Any]) -> Any:
    """The sum over batches of what a function gives of each: a tree of arrays, of which two are held at a time."""
    return functools.reduce(_add, map(of, batches))


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Any, more: Any) -> Any:
    return jax.tree.map(jnp.add, total, more)


def gradient_norms(
    model: Model, rows: Sequence[Row], config: TrainConfig, frozen: Mapping[str, Adapter] | None = None
) -> Float[np.ndarray, " n"]:
    """How much a model would still learn of each row: its gradient's norm in an untrained adapter (of b alone).

    f32, of each row's mean loss over its answer tokens; 0 for a row that is too long to have any. The config says how
    long rows may be, and the adapter's rank, targets and seed; adapters in `frozen` are attached.
    """
    mesh = mesh_of(model.params) or make_mesh(devices=jax.devices()[:1])
    shapes = lora.target_shapes(model.params, config.targets)
    fresh = lora.init(jax.random.key(config.seed), shapes, config.rank, config.alpha, "user", model.fingerprint)
    stage = Stage.of(model.decoder, config, mesh)._replace(accumulation=1)
    trainable = shard(trainable_adapter(fresh), mesh)
    base = shard(frozen_collections(model.params, frozen or {}, config.frozen), mesh)
    norms: list[Any] = [0.0] * len(rows)  # on devices until all are there
    size = whole_batch(1, mesh)  # the others of a batch are empty
    with jax.set_mesh(mesh), progress(len(rows), "gradients", "row", keep=False) as bar:
        for i, row in enumerate(rows):
            example = encode(row, model.tokenizer, model.template)
            example = {name: values[: config.max_length] for name, values in example.items()}
            if example["answer"][1:].any():
                batch = make_batches([example], batch_size=size, seed=0, buckets=(config.max_length,))[0]
                batch = shard(jax.tree.map(jnp.asarray, batch), mesh)
                norms[i] = probe(stage, trainable, base, batch, fresh.scale)[1]
            bar.update(1)
    return np.array(jax.device_get(norms), np.float32)
