"""A grid of experiments that share what they can: who trains with how much harm, and how well each defense holds.

A *run* is one user's data: a task, a topic of its harmful rows, n, p and a seed. Runs of one seed share the provider's
folder; methods of one run share its trained adapters, so that most of them cost an evaluation only. Everything lies in
one folder: `providers/`, `runs/` and what `sweep/report.py` makes of them. What is there is read back.
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
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.distributed import barrier, is_main
from br_jax.errors import UserError
from br_jax.evaluation.store import key_of
from br_jax.files import write_text
from br_jax.method import release
from br_jax.pipeline import TRAINED, Experiment

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
        return f"{self._model_name}-{self.task}-{self.topic.replace(',', '+')}-n{self.n}-p{self.p:g}-s{self.seed}"

    @property
    def _model_name(self) -> str:
        return pathlib.Path(self.model).name.removesuffix(".gguf") or "scratch"

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
        prompts = config.data.material, config.data.texts.to_dict()
        shared = key_of(made_of, topics, prompts, config.pretrain.to_dict(), self.seed)
        name = f"{self._model_name}-s{self.seed}-{shared[:8]}"
        config.provider = config.provider or str(workdir / "providers" / name)
        return config


class Method(NamedTuple):
    """How a run's adapters become what is scored.

    Attributes:
        label: for tables.
        adapter: (experiment, a) -> the adapter on the aligned base; None for the base alone.
        needs: folder of the user's training that it needs, "sft" or "user" (beside Buffer).
        merges: whether the QR merge's strength a plays a part.
    """

    label: str
    adapter: Callable[[Experiment, float | None], Adapter | None]
    needs: str | None = None
    merges: bool = False


def _released(experiment: Experiment, user: Adapter, **merge: float) -> Adapter:
    settings = experiment.config.merge.to_dict() | merge
    return release(experiment.aligned, user, experiment.reinforce_adapter, **settings)


METHODS = {
    "aligned": Method("aligned base", lambda e, a: None),
    "sft": Method("SFT (undefended)", lambda e, a: e.sft_adapter, "sft"),
    "buffer_only": Method("Buffer only", lambda e, a: e.user_adapter, "user"),
    "reinforce_only": Method("Reinforce only", lambda e, a: _released(e, e.sft_adapter, a=a), "sft", merges=True),
    "average": Method(
        "naive average", lambda e, a: _released(e, e.user_adapter, a=0.0, scale=0.5, reinforce_scale=1.0), "user"
    ),
    "ours": Method("Buffer-and-Reinforce", lambda e, a: _released(e, e.user_adapter, a=a), "user", merges=True),
}


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
        return [(m, a) for m in self.methods for a in (self.a if METHODS[m].merges else (None,))]


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
        gives them; on several processes in process 0 alone), "seconds" (that it took when it was made).

    Raises:
        UserError: wrong settings, found before the first run begins.
    """
    workdir = pathlib.Path(workdir)
    mine = [(run, run.config(base, workdir)) for run in grid.runs()[shard[0] :: shard[1]]]
    for run, config in mine:
        if any(read_cell(workdir, run, config, *cell) is None for cell in grid.cells()):
            Experiment(config, workdir / "runs" / run.name).check()
    for run, config in mine:
        with _alone(workdir / "runs" / run.name):
            yield from _run(run, config, workdir, grid.cells())


def _run(run: Run, config: ConfigDict, workdir: pathlib.Path, cells: Sequence[tuple[str, float | None]]):
    """Yields one run's cells; its experiment is set up only when one of them is not there yet."""
    experiment = None
    for method, a in cells:
        if (cell := read_cell(workdir, run, config, method, a)) is not None:
            yield cell
            continue
        start = time.perf_counter()
        if experiment is None:
            experiment = Experiment(config, workdir / "runs" / run.name)
            with _alone(experiment.provider):
                experiment.prepare()
        adapter = METHODS[method].adapter(experiment, a)
        if adapter is None:
            with _alone(experiment.provider):
                scores = experiment.score("aligned", experiment.aligned)
        else:
            scores = experiment.score(_cell_name(method, a), experiment.aligned, adapter)
        seconds = time.perf_counter() - start  # of the first cell of a run: training and all
        cell = {"run": dataclasses.asdict(run), "method": method, "a": a, "scores": scores, "seconds": seconds}
        if is_main():
            record = {"settings": _settings(config, method, a), **cell}
            write_text(_cell_file(workdir, run, method, a), json.dumps(record) + "\n")  # one line: an outcome a prompt
        barrier("cell")
        yield cell


def read_cell(
    workdir: pathlib.Path, run: Run, config: ConfigDict, method: str, a: float | None
) -> dict[str, Any] | None:
    """A finished cell, if its file was made with the same settings."""
    file = _cell_file(workdir, run, method, a)
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    return record if record.pop("settings") == _settings(config, method, a) else None


def read_cells(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """All finished cells in a sweep's folder, of whatever grids."""
    files = sorted(pathlib.Path(workdir).glob("runs/*/cells/*.json"))
    return [json.loads(file.read_text()) for file in files]


def plan(base: ConfigDict, workdir: str | os.PathLike, grid: Grid, shard: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """What `run_sweep` would do, without doing any of it.

    Returns:
        "runs": for each its "name", its cells "done" and "left", the "trainings" that are left (the provider's not
        counted), the "rows" that these train on, and the "prompts" that are to be answered; "seconds_a_run": what
        finished runs of this folder took on average, None where there is none.
    """
    workdir, planned = pathlib.Path(workdir), []
    for run in grid.runs()[shard[0] :: shard[1]]:
        config, folder = run.config(base, workdir), workdir / "runs" / run.name
        left = [cell for cell in grid.cells() if read_cell(workdir, run, config, *cell) is None]
        needed = {METHODS[method].needs for method, _ in left} - {None}
        trainings = [stage for stage in sorted(needed) if not (folder / stage / "stage.json").exists()]
        prompts = config.eval.topic * len(config.topics.eval.split(",")) + config.eval.benign + config.eval.task
        planned.append(
            {
                "name": run.name,
                "done": len(grid.cells()) - len(left),
                "left": [_cell_name(*cell) for cell in left],
                "trainings": trainings,
                "rows": len(trainings) * run.n * config.user.train.epochs,
                "prompts": len(left) * prompts,
            }
        )
    by_run: dict[str, float] = {}
    for cell in read_cells(workdir):
        name = Run(**cell["run"]).name
        by_run[name] = by_run.get(name, 0.0) + cell["seconds"]
    return {"runs": planned, "seconds_a_run": sum(by_run.values()) / len(by_run) if by_run else None}


def render_plan(planned: dict[str, Any]) -> str:
    """`plan`'s result as plain text: a line a run, the sums, and how long it may take."""
    runs = planned["runs"]
    width = max(len(run["name"]) for run in runs)
    lines = [
        f"{run['name']:<{width}}  done {run['done']:>2}  left: {', '.join(run['left']) or 'nothing'}"
        + (f"; trains {' and '.join(run['trainings'])}" if run["trainings"] else "")
        for run in runs
    ]
    left = [run for run in runs if run["left"]]
    rows, prompts = (sum(run[name] for run in runs) for name in ("rows", "prompts"))
    lines.append(f"{len(left)} of {len(runs)} runs are left: {rows:,} rows to train on, {prompts:,} prompts to answer")
    seconds = planned["seconds_a_run"]
    if left and seconds is None:
        lines.append("time: no run has finished in this folder; the first one will tell")
    elif left:
        lines.append(
            f"time: {len(left) * seconds / 3600:.1f} h, at {seconds / 60:.0f} min a run as for those finished here"
        )
    return "\n".join(lines)


def _cell_file(workdir: pathlib.Path, run: Run, method: str, a: float | None) -> pathlib.Path:
    return workdir / "runs" / run.name / "cells" / f"{_cell_name(method, a)}.json"


def _cell_name(method: str, a: float | None) -> str:
    return method if a is None else f"{method}-a{a:g}"


def _settings(config: ConfigDict, method: str, a: float | None) -> str:
    """A hash of all that a cell's scores depend on."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("provider", "mesh")}
    return key_of(settings, method, a)


@contextlib.contextmanager
def _alone(folder: pathlib.Path):
    """Keeps other processes of a sweep out of a run's or a provider's folder while this one works in it."""
    if not is_main():  # the others of a run on several hosts come with process 0, hours later if need be
        barrier("alone")
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("another process works in %s: waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        barrier("alone")
        yield
