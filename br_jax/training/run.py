"""One training run from rows to a trained tree, in a folder that remembers what it is: finished, stopped or another's.

`train_adapter` knows nothing of the method: which adapters are frozen and what the result is called is its caller's.
"""

import dataclasses
import functools
import json
import operator
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft import load_adapter, save_adapter
from br_jax.core.hosts import fetch, is_main
from br_jax.core.mesh import batch_parts, local_rows, make_mesh, place, platform
from br_jax.core.records import fingerprint, key_of
from br_jax.data.batches import Dropped, Example, encode_rows, make_batches, normalize_per_example
from br_jax.data.packing import make_packed_batches
from br_jax.data.rows import Row, Rows, as_rows
from br_jax.models.model import Model
from br_jax.training.config import TrainConfig, require_fit
from br_jax.training.folder import Folder
from br_jax.training.loop import Loop, Summary
from br_jax.training.objective import Objective
from br_jax.training.stage import Stage, frozen_collections, init_state, trainable_adapter

# What may differ between a stopped run and the one that goes on from it.
_FREE_FIELDS = ("checkpoint_every", "log_every", "probe_every")


class Descent(NamedTuple):
    """What a run descends, and what that needs beside the run's own rows; see `train_adapter`."""

    objective: Objective = Objective()
    streams: Mapping[str, Sequence[Row]] = MappingProxyType({})
    aside: Mapping[str, Adapter] = MappingProxyType({})


def train_adapter(
    name: str,
    role: str,
    model: Model,
    rows: Sequence[Row],
    config: TrainConfig,
    *,
    frozen: Mapping[str, Adapter] | None = None,
    workdir: str | pathlib.Path | None = None,
    provider: bool = False,
    mesh: Mesh | None = None,
    probes: Mapping[str, Rows] | None = None,
    objective: Objective | None = None,
    streams: Mapping[str, Rows] | None = None,
    aside: Mapping[str, Adapter] | None = None,
    watch: Callable[[int, Adapter], None] | None = None,
) -> Adapter:
    """Trains one LoRA on rows, over a frozen base and any number of frozen adapters.

    Args:
        name: of the run; its folder is `workdir`/`name`.
        role: provenance written into the adapter.
        model, rows, config: the frozen base, what it is trained on and how.
        frozen: adapters that are attached and stay as they are.
        workdir: without one nothing is written; with one the run resumes, and a finished run is read back.
        provider: the run's files are the provider's, whose folder nobody else may enter (mode 0700); a run that makes
            the same is waited for.
        mesh: default: all devices on the data axis.
        probes: named rows whose loss and gradient norm are followed (saturation).
        objective: what is descended, see `training.objective`; default: the rows' answer loss.
        streams: more rows that the objective asks for, by its names; as long as the run is, each is shuffled and
            repeated, `config.batch_size` of them a step.
        aside: adapters that it looks at, and no part of the model.
        watch: called with the step and the adapter at each `config.probe_every`-th step and at the end. What it is
            given is gone with the next step, and a finished run calls it no more.

    Returns:
        The trained adapter.

    Raises:
        UserError: bad rows or settings, a folder of another run, a full disk.
        Stopped: SIGTERM came, see `training.loop.Loop`.
    """
    require_fit(config, model.spec, len(rows))
    frozen, aside = dict(frozen or {}), dict(aside or {})
    for attached, adapter in (frozen | aside).items():
        lora.require_base(adapter, model.fingerprint, f"{name}, {attached}")
        lora.validate(adapter, model.params)
    streams = {kind: as_rows(more, f"streams[{kind!r}]") for kind, more in (streams or {}).items()}
    descent = Descent(objective or Objective(), streams, aside)
    folder = None
    if workdir is not None:
        identity = run_identity(name, model, rows_fingerprint(rows), config, frozen, descent)
        folder = Folder(pathlib.Path(workdir) / name, identity, private=provider)

    if folder is not None and folder.finished:
        return load_trained(folder.path, role, model)
    adapter = first_adapter(name, role, model, config)

    def save(trained: dict) -> str:
        return save_trained(folder.path, model, trained_adapter(adapter, trained), frozen, provider)

    halves = trainable_adapter(adapter), frozen_collections(model.params, frozen, config.frozen)
    seen = watch and (lambda step, trainable: watch(step, trained_adapter(adapter, trainable)))
    trained = _train(name, model, rows, config, *halves, folder, mesh, probes, save, descent, seen)
    return load_trained(folder.path, role, model) if trained is None else trained_adapter(adapter, trained)


def keep_adapter(name: str, role: str, model: Model, adapter: Adapter, workdir: str | pathlib.Path) -> Adapter:
    """Keeps an adapter that no training made where a provider's run of this name would be, as `train_adapter` does."""
    inputs = {"base": model.key, "adapter": lora.fingerprint(adapter)}
    folder = Folder(pathlib.Path(workdir) / name, {"name": name, "config": {}, "inputs": inputs}, private=True)
    if not folder.finished:
        with folder.begin():
            if not folder.finished:
                folder.finish({"output": save_trained(folder.path, model, adapter, {}, provider=True)})
    return load_trained(folder.path, role, model)


def first_adapter(name: str, role: str, model: Model, config: TrainConfig) -> Adapter:
    """The adapter that a run of this name begins with."""
    key = jax.random.fold_in(jax.random.key(config.seed), 0 if config.same_start else zlib.crc32(name.encode()))
    shapes = lora.target_shapes(model.params, config.targets)
    return lora.init(key, shapes, config.rank, config.alpha, role, model.fingerprint)


def trained_adapter(adapter: Adapter, trained: dict) -> Adapter:
    """An adapter with the weights of a stage's trainable collections, of its own rank (see `lora.pad_rank`)."""
    weights, rank = {}, next(iter(adapter.weights.values()))["a"].shape[-1]
    for path in adapter.weights:
        pair = functools.reduce(operator.getitem, path.split("/"), trained["lora_trainable"])
        weights[path] = {"a": pair["a"][..., :rank], "b": pair["b"][..., :rank, :]}
    return adapter.replace(weights=weights)


def save_trained(
    folder: pathlib.Path, model: Model, adapter: Adapter, frozen: Mapping[str, Adapter], provider: bool = False
) -> str:
    """Writes what a run in this folder has made; returns its fingerprint."""
    said = {"base_name": model.name, "fingerprint": model.fingerprint, "extra": {"beside": sorted(frozen)}}
    if is_main():
        save_adapter(folder / "adapter", adapter, provider=provider, private=True, **said)
    return lora.fingerprint(adapter)


def load_trained(folder: pathlib.Path, role: str, model: Model) -> Adapter:
    """Reads back what `save_trained` wrote."""
    return load_adapter(folder / "adapter", model.params, fingerprint=model.fingerprint, role=role)


def train_params(
    name: str,
    model: Model,
    rows: Sequence[Row],
    config: TrainConfig,
    save: Callable[[dict], None],
    *,
    workdir: str | pathlib.Path,
    mesh: Mesh | None = None,
) -> None:
    """Trains every param of a small model from where it stands: the demo's pre-training.

    Args:
        name, model, rows, config, workdir, mesh: as in `train_adapter`, for a provider; no adapter takes part.
        save: is given the trained params (f32) and writes them; called once, in process 0, before the run counts as
            finished.
    """
    require_fit(config, model.spec, len(rows), adapter=False)
    identity = run_identity(name, model, rows_fingerprint(rows), config, {})
    folder = Folder(pathlib.Path(workdir) / name, identity, private=True)

    def save_all(trained: dict) -> str:
        if is_main():
            save(trained["params"])
        return fingerprint(trained["params"])

    if not folder.finished:
        start = jax.jit(functools.partial(jax.tree.map, jnp.copy))(model.params)  # the step donates its state
        _train(name, model, rows, config, {"params": start}, {}, folder, mesh, None, save_all, Descent())


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of what rows say, in order; where they came from does not count."""
    # Most rows have nothing begun, and keep the fingerprint that they had before there was such a thing.
    return key_of(*([row.turns, row.input] + [row.begun] * bool(row.begun) for row in rows))


def _train(
    name, model, rows, config, trainable, frozen, folder, mesh, probes, save, descent: Descent, watch=None
) -> dict | None:
    """Encodes and fits, then saves where there is a folder.

    Returns:
        The trained collections; None where another process finished the run meanwhile, and it is to be read back.
    """

    encoded = functools.partial(encode_for, name, model, config=config)
    examples, dropped = encoded(rows)
    mesh = make_mesh() if mesh is None else mesh
    probe_batches = {}
    for kind, probe_rows in ((probes or {}) if config.probe_every else {}).items():
        probed, _ = encoded(as_rows(probe_rows, f"probes[{kind!r}]"), of=f"rows of the probe {kind}")
        whole = -(-len(probed) // config.batch_size) * config.batch_size
        probe_batches[kind] = step_batches(probed, dataclasses.replace(config, batch_size=whole, steps=1), mesh)[0]
    stage = Stage.of(model.decoder, config, mesh, descent.objective)
    state = init_state(trainable, config.seed, descent.objective)
    batches = step_batches(examples, config, mesh)
    if descent.streams:
        more = {kind: encoded(rows, of=f"rows of {kind}")[0] for kind, rows in descent.streams.items()}
        batches = _with_streams(batches, more, config, mesh)
    if descent.aside:
        frozen = frozen | {"aside": {name: lora.collection(adapter) for name, adapter in descent.aside.items()}}
    frozen = place(frozen, mesh)

    def fit(path: pathlib.Path | None) -> tuple[dict, Summary]:
        end, summary = Loop(name, stage, state, frozen, batches, config, mesh, path, probe_batches, watch).fit()
        return fetch(stage.objective.end(end["trainable"], end["objective"])), summary

    if folder is None:
        return fit(None)[0]
    with folder.begin():
        if folder.finished:
            return None
        trained, summary = fit(folder.path)
        counts = {"rows": dropped.rows, "dropped": dropped.total, "truncated": dropped.truncated}
        folder.finish({**dataclasses.asdict(summary), **counts, "output": save(trained)})
    return trained


def encode_for(
    name: str, model: Model, rows: Sequence[Row], config: TrainConfig, of: str = "rows"
) -> tuple[list[Example], Dropped]:
    """Encodes a run's rows as its config weighs and cuts them; a warning says how many lose their end, or all."""
    examples, dropped = encode_rows(rows, model.tokenizer, model.template, config.max_length)
    if dropped.first:
        logging.warning(
            "%s: of %d %s %d are left out and %d lose their end at %d tokens (the first, %s): raise max_length",
            name, dropped.rows, of, dropped.total, dropped.truncated, config.max_length, dropped.first,
        )  # fmt: skip
    return normalize_per_example(examples) if config.loss_mean == "rows" else examples, dropped


def step_batches(examples: Sequence[Example], config: TrainConfig, mesh: Mesh, shapes: int = 3) -> grain.MapDataset:
    """This process' rows of each of a run's batches, as its config orders, pads or packs them; see `data.batches`.

    Packed ones have at most so many shapes.
    """
    order = {"batch_size": config.batch_size, "seed": config.seed, "rows": functools.partial(local_rows, mesh)}
    order |= {"steps": config.steps} if config.steps else {"epochs": config.epochs}
    if not config.packing:
        return make_batches(examples, buckets=lengths(config), **order)
    multiple = batch_parts(mesh) * config.accumulation
    on = platform(mesh)
    shape = {"length": config.packing, "multiple": multiple, "unit": packed_unit(on), "shapes": shapes}
    shape["share"] = on != "tpu"  # its attention takes segments that see themselves alone
    return make_packed_batches(examples, **shape, **order)


def _with_streams(batches, streams: Mapping[str, Sequence[Example]], config: TrainConfig, mesh: Mesh):
    """The batches of a run, each with one of every stream's; packed, those of a stream have one shape.

    A step is compiled for each pair of shapes.
    """
    whole = dataclasses.replace(config, steps=len(batches))
    more = {kind: step_batches(examples, whole, mesh, shapes=1) for kind, examples in streams.items()}
    joined = grain.experimental.ZipMapDataset([batches, *more.values()])
    return joined.map(lambda parts: parts[0] | {"streams": dict(zip(more, parts[1:], strict=True))})


def packed_unit(on: str) -> int:
    """What divides a packed row's length; a TPU's attention wants whole tiles."""
    return 128 if on == "tpu" else 32


def lengths(config: TrainConfig) -> tuple[int, ...]:
    """The configured lengths, ascending, and the limit itself for rows that are longer."""
    return tuple(sorted({*(b for b in config.buckets if b < config.max_length), config.max_length}))


def run_identity(
    name: str,
    model: Model,
    rows: str,
    config: TrainConfig,
    frozen: Mapping[str, Adapter],
    descent: Descent | None = None,
) -> dict:
    """What makes a run this one, as JSON gives it back; `rows` by their fingerprint."""
    descent = descent or Descent()
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_FIELDS}
    inputs = {"base": model.key, "template": model.template, "rows": rows}
    inputs |= {name: lora.fingerprint(adapter) for name, adapter in frozen.items()}
    if descent.objective != Objective() or descent.streams or descent.aside:
        inputs |= {"objective": repr(descent.objective)}
        inputs |= {f"rows of {kind}": rows_fingerprint(more) for kind, more in descent.streams.items()}
        inputs |= {f"aside {name}": lora.fingerprint(adapter) for name, adapter in descent.aside.items()}
    return json.loads(json.dumps({"name": name, "config": settings, "inputs": inputs}))
