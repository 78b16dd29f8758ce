"""One training run from rows to a trained tree, in a folder that remembers what it is: finished, stopped or another's.

`train_adapter` knows nothing of the method: which adapters are frozen and what the result is called is its caller's.

A run's folder holds run.json (what it is), metrics.jsonl, probes.jsonl, checkpoints/ (while it runs), and at the end
the result and stage.json (what it cost), written last.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft import load_adapter, save_adapter
from br_jax.data.batches import Example, encode_rows, make_batches
from br_jax.data.packing import make_packed_batches
from br_jax.data.rows import Row
from br_jax.distributed import agree, barrier, fetch, gather, is_main
from br_jax.errors import UserError
from br_jax.files import write_text
from br_jax.models.model import Model, fingerprint
from br_jax.sharding import batch_parts, local_rows, make_mesh, place
from br_jax.training.config import TrainConfig
from br_jax.training.loop import fit
from br_jax.training.step import (
    Compiled,
    init_state,
    learning_rate_schedule,
    make_decoder,
    make_optimizer,
    make_probe,
    make_step,
)

# What may differ between a stopped run and the one that goes on from it.
_FREE_FIELDS = ("checkpoint_every", "log_every")


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
    probes: Mapping[str, Sequence[Row]] | None = None,
) -> Adapter:
    """Trains one LoRA on rows, over a frozen base and any number of frozen adapters.

    Args:
        name: of the run; its folder is `workdir`/`name`.
        role: provenance written into the adapter.
        model: the frozen base.
        rows: rows to train on.
        config: hyper-parameters.
        frozen: adapters that are attached and stay as they are.
        workdir: without one nothing is written; with one the run resumes, and a finished run is read back.
        provider: the run's files are for the provider alone (mode 0700).
        mesh: default: all devices on the data axis.
        probes: named rows whose loss and gradient norm are followed (saturation).

    Returns:
        The trained adapter.

    Raises:
        UserError: bad rows or settings, a folder of another run, a full disk.
        Stopped: SIGTERM came, see `training.loop.fit`.
    """
    frozen = dict(frozen or {})
    for adapter in frozen.values():
        lora.validate(adapter, model.params)
    folder = None
    if workdir is not None:
        folder = Folder(pathlib.Path(workdir) / name, _identity(name, model, rows, config, frozen), private=provider)
        if folder.finished:
            return load_adapter(folder.path / "adapter", model.params, fingerprint=model.fingerprint)
    key = jax.random.fold_in(jax.random.key(config.seed), zlib.crc32(name.encode()))
    adapter = lora.init(key, lora.target_shapes(model.params, config.targets), config.rank, config.alpha, role)
    scale = config.alpha / config.rank
    collections = frozen_collections(model.params, frozen, config.frozen)
    trainable = {"lora_trainable": lora.collection(adapter.replace(scale=jnp.float32(1)))}
    trained, report = _train(name, model, rows, config, trainable, collections, scale, folder, mesh, probes)
    weights = {path: _at(trained["lora_trainable"], path) for path in adapter.weights}
    adapter = Adapter(weights, adapter.scale, (role,))
    if folder is not None:
        if is_main():
            save_adapter(
                folder.path / "adapter",
                adapter,
                base_name=model.name,
                fingerprint=model.fingerprint,
                provider=provider,
                extra={"beside": sorted(frozen)},
            )
        folder.finish({**report, "output": adapter_fingerprint(adapter)})
    return adapter


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
        name, model, rows, config, workdir, mesh: as in `train_adapter`; no adapter takes part.
        save: is given the trained params (f32) and writes them; called once, in process 0, before the run counts as
            finished.
    """
    folder = Folder(pathlib.Path(workdir) / name, _identity(name, model, rows, config, {}))
    if not folder.finished:
        start = jax.tree.map(jnp.copy, model.params)  # the step donates its state
        trained, report = _train(name, model, rows, config, {"params": start}, {}, 1.0, folder, mesh, None)
        if is_main():
            save(trained["params"])
        folder.finish({**report, "output": fingerprint(trained["params"])})


def frozen_collections(params: dict, frozen: Mapping[str, Adapter], how: str) -> dict:
    """The frozen half of a step: the base and the attached adapters, stacked beside it or folded into a copy."""
    if not frozen:
        return {"params": params}
    joined = lora.stack(frozen)
    if how == "fold":
        return {"params": lora.fold(params, joined)}
    return {"params": params, "lora": lora.collection(joined)}


def adapter_fingerprint(adapter: Adapter) -> str:
    """SHA-256 of an adapter's numbers."""
    return fingerprint({"weights": adapter.weights, "scale": adapter.scale})


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of what rows say, in order; where they came from does not count."""
    text = json.dumps([[row.turns, row.input] for row in rows], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _train(name, model, rows, config, trainable, frozen, scale, folder, mesh, probes) -> tuple[dict, dict]:
    """Encodes, compiles and fits; returns the trained collections and the run's report."""
    examples, dropped = encode_rows(rows, model.tokenizer, model.template, config.max_length)
    mesh = make_mesh() if mesh is None else mesh
    batches = step_batches(examples, config, mesh)
    steps = len(batches)
    decoder = make_decoder(model.spec, config, mesh)
    optimizer = make_optimizer(config, steps)
    step = make_step(decoder, optimizer, learning_rate_schedule(config, steps), config, scale)
    probe_batches = {}
    for kind, probe_rows in (probes or {}).items():
        encoded, _ = encode_rows(probe_rows, model.tokenizer, model.template, config.max_length)
        whole = _round_up(len(encoded), config.batch_size)
        probe_batches[kind] = make_batches(encoded, batch_size=whole, seed=0, buckets=_buckets(encoded, config))[0]
    state, summary = fit(
        name,
        Compiled(step, mesh, keeps_state=True),
        init_state(trainable, optimizer, config.seed),
        place(frozen, mesh),
        batches,
        config,
        mesh,
        folder=folder.path if folder else None,
        probe=Compiled(make_probe(decoder, config, scale), mesh, keeps_state=False) if probe_batches else None,
        probe_batches=probe_batches,
    )
    report = dataclasses.asdict(summary) | {
        "rows": dropped.rows,
        "dropped": dropped.total,
        "truncated": dropped.truncated,
    }
    return fetch(state["trainable"]), report


def step_batches(examples: Sequence[Example], config: TrainConfig, mesh: Mesh) -> grain.MapDataset:
    """This process' rows of each of a run's batches, as its config orders, pads or packs them; see `data.batches`."""
    order = {"batch_size": config.batch_size, "seed": config.seed, "rows": functools.partial(local_rows, mesh)}
    order |= {"steps": config.steps} if config.steps else {"epochs": config.epochs}
    if not config.packing:
        return make_batches(examples, buckets=_buckets(examples, config), **order)
    multiple = batch_parts(mesh) * config.accumulation
    return make_packed_batches(examples, length=config.packing, multiple=multiple, **order)


def _buckets(examples, config: TrainConfig) -> tuple[int, ...]:
    """The configured lengths, and the limit itself for rows that are longer."""
    return tuple(sorted({*(b for b in config.buckets if b < config.max_length), config.max_length}))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _at(tree: dict, path: str):
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _identity(name: str, model: Model, rows: Sequence[Row], config: TrainConfig, frozen: Mapping[str, Adapter]) -> dict:
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in _FREE_FIELDS}
    return json.loads(
        json.dumps(
            {
                "name": name,
                "config": settings,
                "inputs": {
                    "base": model.fingerprint,
                    "template": model.template,
                    "rows": rows_fingerprint(rows),
                    **{name: adapter_fingerprint(adapter) for name, adapter in frozen.items()},
                },
            }
        )
    )


class Folder:
    """A run's folder: refuses to serve another run, and says whether this one is finished.

    Every process makes one; process 0 writes, and what it sees is what counts.

    Attributes:
        path: the folder.
        finished: whether `finish` was called for this very run before.

    Raises:
        UserError: the folder cannot be written, it belongs to a run with another config or other inputs, or not all
            processes see it.
    """

    def __init__(self, path: pathlib.Path, identity: dict, private: bool = False):
        self.path, self._identity = path, identity
        try:
            known = path / "run.json"
            if is_main():
                if private:
                    make_private(path.parent)
                path.mkdir(parents=True, exist_ok=True)
                if not known.exists():
                    write_json(known, identity)
            barrier(str(known))
            self._require_shared(known)
            self._compare(json.loads(known.read_text()))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}): choose another workdir or free space"
            ) from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path}/run.json: not JSON: delete {path} to start anew") from error
        self.finished = agree((path / "stage.json").exists())

    def _compare(self, known: dict) -> None:
        for part in ("config", "inputs"):
            for key in sorted({*known.get(part, {}), *self._identity[part]}):
                before, now = (_short(d.get(part, {}).get(key)) for d in (known, self._identity))
                if before != now:
                    raise UserError(
                        f"{self.path}: holds a run with another {part}: {key} was {before}, is {now}: "
                        "choose another workdir or delete that folder"
                    )

    @staticmethod
    def _require_shared(known: pathlib.Path) -> None:
        seen = gather(known.exists())
        if not all(seen):
            raise UserError(
                f"{known}: written by process 0 and not seen by process {seen.index(False)}: choose a workdir on a "
                "file system that all of them share"
            )

    def finish(self, report: dict) -> None:
        """Writes stage.json, after which the run is finished, and clears its checkpoints."""
        if is_main():
            self._finish(report)
        barrier(str(self.path))

    def _finish(self, report: dict) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        config_hash = hashlib.sha256(json.dumps(self._identity["config"], sort_keys=True).encode()).hexdigest()
        stage = {"name": self._identity["name"], "config_hash": config_hash, "inputs": self._identity["inputs"]}
        write_json(self.path / "stage.json", {**stage, **report, "finished": now})
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)


def make_private(path: pathlib.Path) -> None:
    """Makes a folder that only its owner may enter (mode 0700)."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes JSON whole or not at all; see `files.write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def _short(value) -> str:
    text = json.dumps(value)
    return text[1:13] + "..." if len(text) > 60 else text
