"""The engine: a grid of users and methods, whose runs share what they can; a single run is a grid of one.

A *run* is one user's data: a model, a task, a kind of user, a topic of its harmful rows, n, p and a seed. A *cell* is a
method scored in a run. Runs of one seed share the provider's folder; methods of one run share its trained adapters, so
that most of them cost an evaluation only. Cells that are there are read back; what was stopped goes on.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from tabulate import tabulate

from br_jax.attackers.registry import ATTACKERS, attacker_of
from br_jax.calibration import RULE
from br_jax.core.bounds import require
from br_jax.core.errors import UserError, look_up
from br_jax.core.hashes import file_hash, key_of
from br_jax.core.hosts import barrier, is_main
from br_jax.core.locks import owned
from br_jax.core.records import read_record, write_record
from br_jax.experiment.methods import ADAPTERS, METHODS, OF_PROVIDER, PROVIDER_STAGES, Cell, cells_of
from br_jax.experiment.run import Experiment, job_folders
from br_jax.experiment.settings import BOUNDS, TRAINED, check_settings, settled
from br_jax.report.results import read_cells
from br_jax.scoring.suite import rules_version


@dataclasses.dataclass(frozen=True)
class Run:
    """One user's data."""

    model: str  # `model.source`
    task: str  # `user.task`
    topic: str  # `topics.user`, the topics that its harmful rows ask about
    n: int  # its rows
    p: float  # the share of them that is harmful
    seed: int  # of the data and of every stage's training
    user: str = "plain"  # `user.kind`, a name in `ATTACKERS`

    @classmethod
    def of(cls, config: ConfigDict) -> "Run":
        """The one that a config says."""
        user, topic = config.user, config.topics.user
        return cls(config.model.source, user.task, topic, user.n, user.harmful_share, config.seed, user.kind)

    @property
    def name(self) -> str:
        """Of its folder."""
        who = "" if self.user == "plain" else f"-{self.user}"
        topic = "+".join(pathlib.Path(topic).stem for topic in self.topic.split(","))
        return f"{self._model_name}-{self.task}-{topic}{who}-n{self.n}-p{self.p:g}-s{self.seed}"

    @property
    def _model_name(self) -> str:
        return pathlib.Path(self.model).name.removesuffix(".gguf") or "scratch"

    def config(self, base: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
        """The experiment's config: the base's with this run's settings, and the provider's folder that it shares."""
        config = settled(base)
        config.model.source, config.seed = self.model, self.seed
        config.topics.user = self.topic
        config.user.update(task=self.task, n=self.n, harmful_share=self.p, kind=self.user)
        for stage in TRAINED:
            config[stage].train.seed = self.seed
        config.user.train.probe_every = 0  # a table has no place for them
        made_of = [config[part].to_dict() for part in ("model", "distill", *PROVIDER_STAGES)]
        topics = config.topics.align, config.topics.provider
        prompts = config.data.material, config.data.texts.to_dict()
        shared = key_of(made_of, topics, prompts, config.pretrain.to_dict(), self.seed)
        name = f"{self._model_name}-s{self.seed}-{shared[:8]}"
        config.provider = config.provider or str(workdir / "providers" / name)
        plain = dataclasses.replace(self, user="plain")
        if self != plain and ATTACKERS[self.user].trains_plainly():  # and asks, or does, otherwise afterwards
            config.user.folder = config.user.folder or str(workdir / "runs" / plain.name)
        return config


# An axis of numbers -> what it sets in a config, whose bounds its values have.
_SETS = {"n": "user.n", "p": "user.harmful_share", "seeds": "seed", "a": "merge.a"}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The axes of a sweep, those of `Run` and of its cells; every combination is run."""

    models: Sequence[str]
    tasks: Sequence[str]
    topics: Sequence[str]
    n: Sequence[int]
    p: Sequence[float]
    seeds: Sequence[int]
    methods: Sequence[str]  # names of `METHODS`
    a: Sequence[float]  # strengths of the QR merge, for the methods that have one
    users: Sequence[str] = ("plain",)

    def __post_init__(self):
        for axis, values in vars(self).items():
            for value in values if axis in _SETS else ():
                require(f"the sweep's axis {axis}: a value", value, BOUNDS[_SETS[axis]])
            if not values or len(set(values)) < len(values):
                wrong = f"has a value twice: {', '.join(map(str, values))}" if values else "is empty: give it a value"
                raise UserError(f"the sweep's axis {axis} {wrong}")
        for method in self.methods:
            look_up("method", method, METHODS)
        for user in self.users:
            look_up("user", user, ATTACKERS)
        (name, count), *_ = Counter(run.name for run in self.runs()).most_common(1)
        if count > 1:
            raise UserError(f"two runs of this sweep would be in the folder {name}: name their models or topics apart")

    def runs(self, shard: tuple[int, int] = (0, 1)) -> list[Run]:
        """Every run of a shard, seeds outermost, so that the first seed's table is whole before the next begins."""
        if not 0 <= shard[0] < shard[1]:
            raise UserError(f"shard {shard[0]}/{shard[1]}: i/n needs an i from 0 to n - 1")
        axes = self.seeds, self.models, self.tasks, self.users, self.topics, self.n, self.p
        return [
            Run(model, task, topic, n, p, seed, user)
            for seed, model, task, user, topic, n, p in itertools.product(*axes)
        ][shard[0] :: shard[1]]

    def cells(self) -> list[Cell]:
        """Those of every run."""
        return cells_of(self.methods, self.a)


def run_sweep(
    base: ConfigDict, workdir: str | os.PathLike, grid: Grid, shard: tuple[int, int] = (0, 1)
) -> Iterator[dict]:
    """Runs a grid, or a part of it; what is finished is read back, what was stopped goes on.

    Args:
        base: config of the experiments, see configs/base.py.
        workdir: folder of the sweep, which several sweeps, and machines that share the file system, may work in.
        shard: (i, n): runs i, i + n, ... of the grid alone, to spread one sweep over machines.

    Yields:
        Each cell as it is done; see `run_cells`.

    Raises:
        UserError: wrong settings, found before the first run begins or its folder is made.
    """
    mine = _planned(base, workdir, grid, shard)
    for config, folder, left in mine:
        if left:
            Experiment(config, folder).check([cell.method for cell in left])
    for config, folder, _ in mine:
        yield from run_cells(config, folder, grid.cells())


def _planned(base: ConfigDict, workdir, grid: Grid, shard: tuple[int, int]) -> list[tuple]:
    """(config, folder, cells that are not there yet) of each run of a shard."""
    planned = []
    for run in grid.runs(shard):
        config, folder = run.config(base, pathlib.Path(workdir)), pathlib.Path(workdir) / "runs" / run.name
        check_settings(config)
        planned.append((config, folder, [cell for cell in grid.cells() if read_cell(folder, config, cell) is None]))
    return planned


def run_cells(
    config: ConfigDict, folder: pathlib.Path, cells: Sequence[Cell], experiment: Experiment | None = None
) -> Iterator[dict]:
    """Scores cells of the run of this config and folder; a model is loaded only when one of them is not there yet.

    Yields:
        Each cell as it is done: "run" (the fields of `Run`), "method", "a", "scores" (as `scoring.suite.evaluate` gives
        them; on several processes in process 0 alone), "seconds" (that it took when it was made).
    """
    # a sweep waits for another that works on the same run; a single run's caller holds its folder already
    mine = [folder, config.user.folder] if config.user.folder else [folder]
    with contextlib.ExitStack() as stack:
        for each in () if experiment else mine:
            stack.enter_context(owned(each, wait=True))
        known = {cell: read_cell(folder, config, cell) for cell in cells}
        start = time.perf_counter()
        if None in known.values():
            experiment = experiment or Experiment(config, folder).begin()
            experiment.prepare()
        for cell in cells:
            if known[cell] is None:
                known[cell] = _make_cell(experiment, cell, start)
                start = time.perf_counter()
            yield known[cell]


def _make_cell(experiment: Experiment, cell: Cell, start: float) -> dict:
    scores = experiment.score(cell)
    run, seconds = Run.of(experiment.config), time.perf_counter() - start  # of a run's first cell: training and all
    made = {"run": dataclasses.asdict(run), **cell._asdict(), "scores": scores, "seconds": seconds}
    if is_main():
        config = experiment.config
        record = {"settings": _settings(config, cell), "recipe": _recipe(config, cell), **made}
        write_record(_file(experiment.workdir, cell), record, indent=None)  # one line: an outcome a prompt
    barrier("cell")
    return made


def read_cell(folder: pathlib.Path, config: ConfigDict, cell: Cell) -> dict[str, Any] | None:
    """A finished cell, if its file was made with the same settings."""
    file = _file(folder, cell)
    if not file.exists():
        return None
    record = read_record(file, "delete it and run the same command again")
    record.pop("recipe", None)
    if record.pop("settings") == _settings(config, cell):
        return record
    logging.warning("%s: made with other settings, or by an earlier br_jax: it is made again", file)
    return None


def plan(base: ConfigDict, workdir: str | os.PathLike, grid: Grid, shard: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """What `run_sweep` would do, without doing any of it.

    Returns:
        "runs": for each its "name", its cells "done" and "left", the "trainings" that are left (the provider's not
        counted), the "rows" that these train on, and the "prompts" that are to be answered; "seconds_a_run": what
        finished runs of this folder took on average, None where there is none.
    """
    planned, seconds, planned_before = [], defaultdict(float), set()
    for config, folder, left in _planned(base, workdir, grid, shard):
        needed = {name for cell in left for name in METHODS[cell.method].needs if name not in OF_PROVIDER}
        attacker = attacker_of(config)
        jobs = job_folders(pathlib.Path(config.user.folder or folder), attacker)
        trained = {job / name / "stage.json": name for name in ADAPTERS if name in needed for job in jobs}
        to_train = [file for file in trained if file not in planned_before and not file.exists()]
        planned_before.update(trained)
        train = attacker.settings(config.user.train.to_dict(), config.user.n)
        of_a_job = train["steps"] * train["batch_size"] or attacker.size(config.user.n) * train["epochs"] // len(jobs)
        harmful = config.eval.topic * len(config.topics.eval.split(",")) * (1 + attacker.asks_itself * attacker.samples)
        prompts = harmful + config.eval.benign + config.eval.task
        planned.append(
            {
                "name": folder.name,
                "done": len(grid.cells()) - len(left),
                "left": [cell.name for cell in left],
                "trainings": [*dict.fromkeys(trained[file] for file in to_train)],
                "rows": len(to_train) * of_a_job,
                "prompts": len(left) * prompts,
            }
        )
    for cell in read_cells(workdir):
        seconds[Run(**cell["run"])] += cell.get("seconds", 0)
    return {"runs": planned, "seconds_a_run": sum(seconds.values()) / len(seconds) if seconds else None}


def render_plan(planned: dict[str, Any]) -> str:
    """`plan`'s result as plain text: a line a run, the sums, and how long it may take."""
    runs, seconds = planned["runs"], planned["seconds_a_run"]
    lines = [[r["name"], r["done"], ", ".join(r["left"]) or "nothing", " and ".join(r["trainings"])] for r in runs]
    left = sum(bool(run["left"]) for run in runs)
    rows, prompts = (sum(run[name] for run in runs) for name in ("rows", "prompts"))
    said = f"{left} of {len(runs)} runs are left: {rows:,} rows to train on, {prompts:,} prompts to answer"
    if left and seconds is None:
        said += "\ntime: no run has finished in this folder; the first one will tell"
    elif left:
        said += f"\ntime: {left * seconds / 3600:.1f} h, at {seconds / 60:.0f} min a run as for those finished here"
    return f"{tabulate(lines, ['run', 'done', 'left', 'trains'])}\n{said}"


def _file(folder: pathlib.Path, cell: Cell) -> pathlib.Path:
    return folder / "cells" / f"{cell.name}.json"


def _settings(config: ConfigDict, cell: Cell) -> str:
    """A hash of all that a cell's scores depend on, with what is in the files that the config names."""
    settings, own, attacker = _apart(config, cell)
    calibrates = config.calibrate.harmful and {"reinforce", "direction"} & {*METHODS[cell.method].needs}
    rule = RULE if calibrates else ()
    parts = *([attacker] if attacker else []), *rule, rules_version()
    return key_of(settings, own, *cell, *parts, _contents(settings))


def _recipe(config: ConfigDict, cell: Cell) -> tuple[str, str]:
    """Hashes of what all seeds and shares of a `results.Setting` should share, and of the method's own settings."""
    alike = dataclasses.replace(Run.of(config), p=0.0, seed=0).config(config, pathlib.Path())
    settings, own, attacker = _apart(alike, cell)
    return key_of(settings, attacker, rules_version()), key_of(own)


def _apart(config: ConfigDict, cell: Cell) -> tuple[dict, dict | None, dict]:
    """What scores depend on: the settings of all, the method's own where it has some, and the user's."""
    settings = {name: value for name, value in config.to_dict().items() if name not in ("provider", "mesh")}
    rivals, attackers, _ = settings.pop("defences"), settings.pop("attackers"), settings["user"].pop("folder")
    return settings, rivals.get(METHODS[cell.method].defence), attackers[config.user.kind]


def _contents(settings: Any) -> list[str]:
    """Hashes of the files that settings name, one or several with commas between."""
    if isinstance(settings, dict):
        return [found for _, value in sorted(settings.items()) for found in _contents(value)]
    paths = [path.strip() for path in settings.split(",")] if isinstance(settings, str) else []
    files = [file for path in paths if os.sep in path or "." in path for file in _files(path)]
    return [_content(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]


def _files(path: str) -> list[str]:
    if os.path.isdir(path):
        return sorted(
            entry.path for entry in os.scandir(path) if entry.name.endswith((".json", ".jinja", ".safetensors"))
        )
    return [path] if os.path.isfile(path) else []


@functools.cache
def _content(file: str, size: int, changed: int) -> str:  # once for each time of change, which is no part of it
    return file_hash(file)
