"""A grid of experiments that share what they can: who trains with how much harm, and how well each defense holds.

A *run* is one user's data: a task, a topic of its harmful rows, n, p and a seed. Runs of one seed share the provider's
folder; methods of one run share its trained adapters, so that most of them cost an evaluation only. Everything lies in
one folder: `providers/`, `runs/` and what `evaluation/sweep_report.py` makes of them. What is there is read back.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.distributed import is_main
from br_jax.errors import UserError
from br_jax.evaluation.store import key_of
from br_jax.method import release
from br_jax.pipeline import TRAINED, Experiment
from br_jax.training.run import write_json

PROVIDED = ("align", "buffer", "reinforce")


@dataclasses.dataclass(frozen=True)
class Run:
    """One user's data.

    Attributes:
        model: `model.source`.
        task: `user.task`.
        topic: `topics.user`, the topics that its harmful rows ask about.
        n: its rows.
        p: the share of them that is harmful.
        seed: of the data and of every stage's training.
    """

    model: str
    task: str
    topic: str
    n: int
    p: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        model = pathlib.Path(self.model).name or "scratch"
        return f"{model}-{self.task}-{self.topic.replace(',', '+')}-n{self.n}-p{self.p:g}-s{self.seed}"

    def config(self, base: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
        """The experiment's config: the base's with this run's settings, and the provider's folder that it shares."""
        config = base.copy_and_resolve_references()
        config.model.source, config.seed = self.model, self.seed
        config.topics.user = self.topic
        config.user.update(task=self.task, n=self.n, harmful_share=self.p)
        for stage in TRAINED:
            config[stage].train.seed = self.seed
        made_of = [config[part].to_dict() for part in ("model", "distill", *PROVIDED)]
        topics = config.topics.align, config.topics.provider
        shared = key_of(made_of, topics, config.data.material, config.pretrain.to_dict(), self.seed)
        name = f"{pathlib.Path(self.model).name or 'scratch'}-s{self.seed}-{shared[:8]}"
        config.provider = config.provider or str(workdir / "providers" / name)
        return config


def aligned(experiment: Experiment, a: float) -> None:
    """The base itself."""


def sft(experiment: Experiment, a: float) -> Adapter:
    """Plain fine-tuning, undefended."""
    return experiment.sft_adapter


def buffer_only(experiment: Experiment, a: float) -> Adapter:
    """The user's adapter trained beside Buffer, which is taken out; no Reinforce."""
    return experiment.user_adapter


def reinforce_only(experiment: Experiment, a: float) -> Adapter:
    """Reinforce merged into plain fine-tuning: no Buffer while the user trains."""
    return release(experiment.aligned, experiment.sft_adapter, experiment.reinforce_adapter, **_merge(experiment, a))


def average(experiment: Experiment, a: float) -> Adapter:
    """Half of the user's adapter and half of Reinforce, without QR: the naive average."""
    merge = {**_merge(experiment, 0.0), "scale": 0.5, "reinforce_scale": 1.0}
    return release(experiment.aligned, experiment.user_adapter, experiment.reinforce_adapter, **merge)


def ours(experiment: Experiment, a: float) -> Adapter:
    """Buffer-and-Reinforce with the QR merge of strength a."""
    return release(experiment.aligned, experiment.user_adapter, experiment.reinforce_adapter, **_merge(experiment, a))


def _merge(experiment: Experiment, a: float) -> dict[str, float]:
    return experiment.config.merge.to_dict() | {"a": a}


METHODS: dict[str, Callable[[Experiment, float], Adapter | None]] = {
    method.__name__: method for method in (aligned, sft, buffer_only, reinforce_only, average, ours)
}
WITH_A = ("reinforce_only", "ours")  # methods that a changes


@dataclasses.dataclass(frozen=True)
class Grid:
    """The axes of a sweep; every combination is run.

    Attributes:
        models, tasks, topics, n, p, seeds: see `Run`.
        methods: names of `METHODS`.
        a: strengths of the QR merge, for the methods that have one.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    topics: Sequence[str]
    n: Sequence[int]
    p: Sequence[float]
    seeds: Sequence[int]
    methods: Sequence[str]
    a: Sequence[float]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not values:
                raise UserError(f"the sweep's axis {field.name} is empty: give it a value")
            if len(set(values)) < len(values):
                raise UserError(f"the sweep's axis {field.name} has a value twice: {', '.join(map(str, values))}")
        for method in self.methods:
            if method not in METHODS:
                raise UserError(f"unknown method {method!r}; {lora.near_names(method, METHODS)}")

    def runs(self) -> list[Run]:
        """Every run, seeds outermost, so that the first seed's table is whole before the next begins."""
        axes = self.seeds, self.models, self.tasks, self.topics, self.n, self.p
        return [Run(model, task, topic, n, p, seed) for seed, model, task, topic, n, p in itertools.product(*axes)]

    def cells(self) -> list[tuple[str, float | None]]:
        """(method, a) of every run; a is None where it changes nothing."""
        return [(m, a) for m in self.methods for a in (self.a if m in WITH_A else (None,))]


def run_sweep(
    base: ConfigDict, workdir: str | os.PathLike, grid: Grid, shard: tuple[int, int] = (0, 1)
) -> Iterator[dict]:
    """Runs a grid, or a part of it; what is finished is read back, what was stopped goes on.

    Args:
        base: config of the experiments, see configs/base.py.
        workdir: folder of the sweep, which several sweeps, and machines that share the file system, may work in.
        grid: its axes.
        shard: (i, n): runs i, i + n, ... of the grid alone, to spread one sweep over machines.

    Yields:
        Each cell as it is done: "run" (the fields of `Run`), "method", "a", "scores" (as `evaluation.evaluate.evaluate`
        gives them), "seconds" (0 for one that was read back).

    Raises:
        UserError: wrong settings, found before the first run begins.
    """
    workdir = pathlib.Path(workdir)
    mine = [(run, run.config(base, workdir)) for run in grid.runs()[shard[0] :: shard[1]]]
    for run, config in mine:
        if any(read_cell(workdir, run, config, *cell) is None for cell in grid.cells()):
            Experiment(config, workdir / "runs" / run.name).check()
    for run, config in mine:
        yield from _run(run, config, workdir, grid.cells())


def _run(run: Run, config: ConfigDict, workdir: pathlib.Path, cells: Sequence[tuple[str, float | None]]):
    """Yields one run's cells; its experiment is set up only when one of them is not there yet."""
    experiment = None
    for method, a in cells:
        if (cell := read_cell(workdir, run, config, method, a)) is not None:
            yield cell | {"seconds": 0.0}
            continue
        start = time.perf_counter()
        if experiment is None:
            experiment = Experiment(config, workdir / "runs" / run.name)
            with _alone(experiment.provider):
                experiment.prepare()
        adapter = METHODS[method](experiment, a)
        if adapter is None:
            with _alone(experiment.provider):
                scores = experiment.score("aligned", experiment.aligned)
        else:
            scores = experiment.score(_cell_name(method, a), experiment.aligned, adapter)
        cell = {"run": dataclasses.asdict(run), "method": method, "a": a, "scores": scores}
        record = {"settings": _settings(config, method, a), **cell}
        if is_main():
            write_json(workdir / "runs" / run.name / "cells" / f"{_cell_name(method, a)}.json", record)
        yield cell | {"seconds": time.perf_counter() - start}


def read_cell(
    workdir: pathlib.Path, run: Run, config: ConfigDict, method: str, a: float | None
) -> dict[str, Any] | None:
    """A finished cell, if its file was made with the same settings."""
    file = workdir / "runs" / run.name / "cells" / f"{_cell_name(method, a)}.json"
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    return record if record.pop("settings") == _settings(config, method, a) else None


def read_cells(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All finished cells in a sweep's folder, of whatever grids."""
    files = sorted(pathlib.Path(workdir).glob("runs/*/cells/*.json"))
    return [json.loads(file.read_text()) for file in files]


def _cell_name(method: str, a: float | None) -> str:
    return method if a is None else f"{method}-a{a:g}"


def _settings(config: ConfigDict, method: str, a: float | None) -> str:
    """A hash of all that a cell's scores depend on."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("provider", "mesh")}
    return key_of(settings, method, a)


@contextlib.contextmanager
def _alone(folder: pathlib.Path):
    """Keeps other processes of a sweep out of a provider's folder while this one works in it."""
    if not is_main():  # the others of a run on several hosts come with process 0
        yield
        return
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("another process works in %s: waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
