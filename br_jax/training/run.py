"""One training run from rows to a trained tree, in a folder that remembers what it is: finished, stopped or another's.

`train_adapter` knows nothing of the method: which adapters are frozen and what the result is called is its caller's.
"""

import contextlib
import dataclasses
import functools
import json
import operator
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft import load_adapter, save_adapter
from br_jax.core.hosts import is_main
from br_jax.core.mesh import make_mesh, shard
from br_jax.core.progress import announce
from br_jax.core.records import fingerprint, key_of
from br_jax.data.rows import Row, Rows, as_rows
from br_jax.models.model import Model
from br_jax.training.batching import encode_for, step_batches, with_streams
from br_jax.training.config import TrainConfig, require_fit
from br_jax.training.folder import Folder
from br_jax.training.loop import SingleRun, Summary
from br_jax.training.step import Objective, Stage, frozen_collections, init_state, trainable_adapter

# What may differ between a stopped run and the one that goes on from it.
_FREE_FIELDS = ("checkpoint_every", "log_every", "probe_every")


class TrainExtras(NamedTuple):
    """What a run descends, and what that needs beside the run's own rows; see `train_adapter`."""

    objective: Objective = Objective()
    streams: Mapping[str, Sequence[Row]] = MappingProxyType({})
    aux: Mapping[str, Adapter] = MappingProxyType({})


_PLAIN = TrainExtras()


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
    aux: Mapping[str, Adapter] | None = None,
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
        objective: what is descended, see `training.step`; default: the rows' answer loss.
        streams: more rows that the objective asks for, by its names; as long as the run is, each is shuffled and
            repeated, `config.batch_size` of them a step.
        aux: adapters that it looks at, and no part of the model.
        watch: called with the step and the adapter at each `config.probe_every`-th step and at the end. What it is
            given is gone with the next step, and a finished run calls it no more.

    Returns:
        The trained adapter.

    Raises:
        UserError: bad rows or settings, a folder of another run, a full disk.
        Stopped: SIGTERM came, see `training.loop`.
    """
    require_fit(config, model.spec, len(rows))
    streams = {kind: as_rows(more, f"streams[{kind!r}]") for kind, more in (streams or {}).items()}
    frozen, extras = dict(frozen or {}), TrainExtras(objective or Objective(), streams, dict(aux or {}))
    for attached, adapter in (frozen | extras.aux).items():
        lora.require_base(adapter, model.fingerprint, f"{name}, {attached}")
        lora.validate(adapter, model.params)
    folder = None
    if workdir is not None:
        identity = run_identity(name, model, rows_fingerprint(rows), config, frozen, extras)
        folder = Folder(pathlib.Path(workdir) / name, identity, private=provider)
        if folder.finished:
            return load_trained(folder.path, role, model)
    first = first_adapter(name, role, model, config)
    halves = trainable_adapter(first), frozen_collections(model.params, frozen, config.frozen)
    seen = watch and (lambda step, trainable: watch(step, trained_adapter(first, trainable)))
    loop, counts = _prepare(name, model, rows, config, halves, mesh, extras, probes, seen)
    with folder.begin() if folder else contextlib.nullcontext():
        if folder and folder.finished:  # by another process meanwhile
            return load_trained(folder.path, role, model)
        trained, summary = _fit(loop, counts, folder and folder.path)
        adapter = trained_adapter(first, trained)
        if folder:
            output = save_trained(folder.path, model, adapter, frozen, provider)
            folder.finish({**dataclasses.asdict(summary), **counts, "output": output})
    return adapter


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
    key = _key(np.uint32(config.seed), np.uint32(0 if config.same_start else zlib.crc32(name.encode())))
    shapes = lora.target_shapes(model.params, config.targets)
    return lora.init(key, shapes, config.rank, config.alpha, role, model.fingerprint)


@jax.jit
def _key(seed: Array, part: Array) -> Array:  # one program for all seeds; by itself each call is one
    return jax.random.fold_in(jax.random.key(seed), part)


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
    about = {"base_name": model.name, "fingerprint": model.fingerprint, "extra": {"beside": sorted(frozen)}}
    if is_main():
        save_adapter(folder / "adapter", adapter, provider=provider, private=True, **about)
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
        name, model, rows, config, workdir, mesh: as in `train_adapter`, for a provider.
        save: is given the trained params (f32) and writes them; called once, in process 0, before the run counts as
            finished.
    """
    require_fit(config, model.spec, len(rows), adapter=False)
    identity = run_identity(name, model, rows_fingerprint(rows), config, {})
    folder = Folder(pathlib.Path(workdir) / name, identity, private=True)
    if folder.finished:
        return
    start = jax.jit(functools.partial(jax.tree.map, jnp.copy))(model.params)  # the step donates its state
    loop, counts = _prepare(name, model, rows, config, ({"params": start}, {}), mesh, _PLAIN)
    with folder.begin():
        if not folder.finished:
            trained, summary = _fit(loop, counts, folder.path)
            if is_main():
                save(trained["params"])
            output = fingerprint(trained["params"])
            folder.finish({**dataclasses.asdict(summary), **counts, "output": output})


def _prepare(name, model, rows, config, halves, mesh, extras, probes=None, watch=None) -> tuple[SingleRun, dict]:
    """(The loop of a run, all of whose rows are encoded, counts of them as `encode_for` gives them)."""
    mesh, (trainable, frozen) = mesh or make_mesh(), halves
    examples, counts = encode_for(name, model, rows, config)
    probe_batches = {}
    for kind, some in ((probes or {}) if config.probe_every else {}).items():
        some = as_rows(some, f"probes[{kind!r}]")
        probed, _ = encode_for(name, model, some, config, of=f"rows of the probe {kind}")
        size = -(-len(probed) // config.batch_size) * config.batch_size
        probe_batches[kind] = step_batches(probed, dataclasses.replace(config, batch_size=size, steps=1), mesh)[0]
    batches = step_batches(examples, config, mesh)
    if extras.streams:
        encoded = {k: encode_for(name, model, some, config, f"rows of {k}")[0] for k, some in extras.streams.items()}
        batches = with_streams(batches, encoded, config, mesh)
    if extras.aux:
        frozen = frozen | {"aux": {name: lora.collection(adapter) for name, adapter in extras.aux.items()}}
    stage = Stage.of(model.decoder, config, mesh, extras.objective)
    state = init_state(trainable, config.seed, extras.objective)
    return SingleRun(name, stage, state, shard(frozen, mesh), batches, config, mesh, probe_batches, watch), counts


def _fit(loop: SingleRun, counts: Mapping[str, int], folder: pathlib.Path | None) -> tuple[dict, Summary]:
    """Runs a loop to its end, and says so in a log."""
    trained, summary = loop.fit(folder)
    rows, steps, seconds = f"{counts['rows']:,} rows", f"{summary.steps:,} steps", f"{summary.seconds:.1f} s"
    announce(f"{loop.name}: {rows}, {steps}, {seconds}, loss {summary.loss:.3f}")
    return trained, summary


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of what rows say, in order; where they came from does not count."""
    # Most rows have nothing begun, and keep the fingerprint that they had before there was such a thing.
    return key_of(*([row.turns, row.input] + [row.begun] * bool(row.begun) for row in rows))


def run_identity(
    name: str, model: Model, rows: str, config: TrainConfig, frozen: Mapping[str, Adapter], extras: TrainExtras = _PLAIN
) -> dict:
    """What makes a run this one, as JSON gives it back; `rows` by their fingerprint."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_FIELDS}
    inputs = {"base": model.key, "template": model.template, "rows": rows}
    inputs |= {name: lora.fingerprint(adapter) for name, adapter in frozen.items()}
    if extras.objective != Objective() or extras.streams or extras.aux:
        inputs |= {"objective": repr(extras.objective)}
        inputs |= {f"rows of {kind}": rows_fingerprint(some) for kind, some in extras.streams.items()}
        inputs |= {f"aside {name}": lora.fingerprint(adapter) for name, adapter in extras.aux.items()}
    return json.loads(json.dumps({"name": name, "config": settings, "inputs": inputs}))
