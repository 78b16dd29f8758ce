"""The engine: a grid of users and methods, whose runs share what they can; a single run is a grid of one.

A *run* is one user's data; a *cell* is a method scored in it, kept in a file, and known again by all that its scores
depend on. Runs of one seed share the provider's folder; cells of one run share its trained adapters, so that most of
them cost an evaluation only. Cells that are there are read back, each once; what was stopped goes on.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict
from tabulate import tabulate

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import geometry
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig
from br_jax.attackers.registry import ATTACKERS
from br_jax.calibration import RULE
from br_jax.core.bounds import require
from br_jax.core.errors import UserError, look_up
from br_jax.core.hosts import barrier, is_main, stop_if_asked
from br_jax.core.io import owned
from br_jax.core.records import file_hash, key_of, read_record, write_record
from br_jax.experiment import protocol
from br_jax.experiment.methods import DIRECTION, METHODS, OF_USER, PROVIDER_STAGES, Cell, cells_of
from br_jax.experiment.run import Experiment, job_folders
from br_jax.experiment.settings import TRAINED, Settings, bounds, settle
from br_jax.scoring.suite import evaluate, rules_version

_REFUSED = 0.2  # share of the task's prompts above which a base that refuses them is warned of
# An axis of numbers -> the setting whose bounds its values have.
_SETS = {"n": "user.n", "p": "user.harmful_share", "seeds": "seed", "a": "merge.a", "repeats": "user.repeat"}


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
    repeat: int = 1  # which training on the same rows

    @classmethod
    def of(cls, settings: Settings) -> "Run":
        """The one that settings say."""
        user, topic = settings.user, settings.topics.user
        of_data = settings.model.source, user.task, topic, user.n, user.harmful_share, settings.seed
        return cls(*of_data, user.kind, user.repeat)

    @property
    def name(self) -> str:
        """Of its folder."""
        who = "" if self.user == "plain" else f"-{self.user}"
        topic = "+".join(pathlib.Path(topic).stem for topic in self.topic.split(","))
        again = f"-r{self.repeat}" if self.repeat > 1 else ""
        return f"{self._model_name}-{self.task}-{topic}{who}-n{self.n}-p{self.p:g}-s{self.seed}{again}"

    @property
    def _model_name(self) -> str:
        return pathlib.Path(self.model).name.removesuffix(".gguf") or "scratch"

    def settings(self, base: Settings, workdir: pathlib.Path) -> Settings:
        """The base's settings with this run's, and the provider's folder that it shares with others of its seed."""
        changes = {"model.source": self.model, "seed": self.seed, "topics.user": self.topic, "user.task": self.task}
        changes |= {"user.n": self.n, "user.harmful_share": self.p, "user.kind": self.user}
        changes |= {"user.repeat": self.repeat}
        changes |= {f"{stage}.train.seed": self.seed for stage in TRAINED}
        s = base.change(changes | {"user.train.probe_every": 0})  # a table has no place for probes
        if not s.provider:
            made_of = [dataclasses.asdict(getattr(s, part)) for part in ("model", "distill", *PROVIDER_STAGES)]
            topics, material = (s.topics.align, s.topics.provider), dataclasses.asdict(s.data.texts)
            # The paper's rows are files of a config, and whether the first counts is the user's setting.
            if s.data.material == "paper":
                files = {name: dataclasses.asdict(getattr(s.data, name)) for name in ("llm_lat", "alpaca")}
                material = [material, files, s.user.index_mode]
            prompts = s.data.material, material
            shared = key_of(made_of, topics, prompts, dataclasses.asdict(s.pretrain), self.seed)
            s = s.change({"provider": str(workdir / "providers" / f"{self._model_name}-s{self.seed}-{shared[:8]}")})
        plain = dataclasses.replace(self, user="plain")
        if self != plain and s.attacker.trains_plainly() and not s.user.folder:  # it only asks, or does, otherwise
            s = s.change({"user.folder": str(workdir / "runs" / plain.name)})
        return s


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
    repeats: Sequence[int] = (1,)

    def __post_init__(self):
        limits, named = bounds(), {"methods": ("method", METHODS), "users": ("user", ATTACKERS)}
        for axis, values in vars(self).items():
            for value in values:
                if axis in _SETS:
                    require(f"the sweep's axis {axis}: a value", value, limits[_SETS[axis]])
                if axis in named:
                    look_up(named[axis][0], value, named[axis][1])
            if not values or len(set(values)) < len(values):
                wrong = f"has a value twice: {', '.join(map(str, values))}" if values else "is empty: give it a value"
                raise UserError(f"the sweep's axis {axis} {wrong}")
        (name, count), *_ = Counter(run.name for run in self.runs()).most_common(1)
        if count > 1:
            raise UserError(f"two runs of this sweep would be in the folder {name}: name their models or topics apart")

    def runs(self) -> list[Run]:
        """Every run, seeds outermost, so that the first seed's table is complete before the next begins."""
        axes = self.seeds, self.models, self.tasks, self.users, self.topics, self.n, self.p, self.repeats
        return [
            Run(model, task, topic, n, p, seed, user, repeat)
            for seed, model, task, user, topic, n, p, repeat in itertools.product(*axes)
        ]

    def cells(self) -> list[Cell]:
        """Those of every run."""
        return cells_of(self.methods, self.a)


# -- cells -------------------------------------------------------------------------------------------------------------


def score(e: Experiment, cell: Cell) -> dict[str, Any]:
    """The scores of a cell (in process 0 alone); what is kept of its model's answers is not made again.

    They are those of `scoring.suite.evaluate`, "geometry": norms and cosines of the adapters that it is made of and
    of Buffer, and "merge": the settings of its merge, if it has one. Prompts, answers and verdicts go to
    cells/NAME.jsonl. Raises `Stopped`, see `hosts.stop_if_asked`.
    """
    stop_if_asked()
    method, defence = METHODS[cell.method], METHODS[cell.method].defence
    parts = [released(e, cell, job) for job in range(1 if method.of_provider else len(e.jobs))]
    adapter, merge = parts[0]
    if len(parts) > 1:
        adapter = lora.stack([each for each, _ in parts])
    if adapter is not None and not method.of_provider:
        adapter = e.settings.attacker.after(adapter)
    model, adapter = e.as_scored(e.model(method.base), adapter, cell.name)
    home = e.provider if method.of_provider else e.trained
    scores = evaluate(
        model,
        dataclasses.replace(e.suite, instruction=e.defence(defence).instruction if defence else ""),
        adapter,
        name=cell.name,
        records=e.workdir / "cells" / f"{cell.name}.jsonl",
        store=e.store(home),
        verdicts=e.store(home, "verdicts"),
        forced=e.store(home, "forced"),
    )
    names = dict.fromkeys((*method.needs, "buffer")) if method.needs else ()
    scores |= {"geometry": geometry({name: e.adapter(name) for name in names}), "suite": e.suite.key[:16]}
    scores |= {"merge": dataclasses.asdict(merge)} if merge else {}
    refused = scores["task_refused"]["score"] or 0.0
    if is_main() and cell.method == "aligned" and refused > _REFUSED:
        logging.warning(
            "the aligned base refuses %.0f %% of the task's prompts: what a user learns beside Buffer loses "
            "by that when Buffer is taken out; align it on benign prompts of such kinds too",
            100 * refused,
        )
    return scores if is_main() else {}


def released(e: Experiment, cell: Cell, job: int = 0) -> tuple[Adapter | None, MergeConfig | None]:
    """What a method puts on its base, and the merge that it is of, if it is."""
    method = METHODS[cell.method]
    if method.merge is not None:
        user, reinforce = method.needs
        strength = {"a": cell.a} if method.merges else {}
        merge = dataclasses.replace(e.merge_of(user, reinforce, job, **strength, **method.merge), **method.after)
        return e.merged(user, reinforce, merge, job), merge
    adapters = [e.adapter(name, job) for name in method.needs]
    if method.defence:
        return e.defence(method.defence).release(e.case(method.defence, job), *adapters), None
    return lora.stack(adapters) if len(adapters) > 1 else next(iter(adapters), None), None


def settings_key(settings: Settings, cell: Cell) -> str:
    """A hash of all that a cell's scores depend on, with what is in the files that the settings name."""
    shared, own, attacker = _apart(settings, cell)
    calibrates = settings.calibrate.harmful and {"reinforce", DIRECTION} & {*METHODS[cell.method].needs}
    parts = *([attacker] if attacker else []), *(RULE if calibrates else ()), rules_version()
    return key_of(shared, own, *cell, *parts, _contents(shared))


def _recipe(settings: Settings, cell: Cell) -> tuple[str, str]:
    """Hashes of what all seeds and shares of a table should share, and of the method's own settings."""
    alike = dataclasses.replace(Run.of(settings), p=0.0, seed=0, repeat=1).settings(settings, pathlib.Path())
    shared, own, attacker = _apart(alike, cell)
    return key_of(shared, attacker, rules_version()), key_of(own)


def _common(settings: Settings) -> dict:
    """What all cells of a table share, whatever the axes of its grids."""
    usual, axes = Settings(), ("model.source", "topics.user", "user.task", "user.n", "user.kind")
    alike = dataclasses.replace(Run.of(settings), p=0.0, seed=0, repeat=1).settings(settings, pathlib.Path())
    alike = alike.change({axis: functools.reduce(getattr, axis.split("."), usual) for axis in axes})
    shared = dataclasses.asdict(alike)
    del shared["provider"], shared["mesh"], shared["user"]["folder"]
    return shared


def _apart(settings: Settings, cell: Cell) -> tuple[dict, dict | None, dict]:
    """What scores depend on: the settings of all, the method's own where it has some, and the user's."""
    shared = dataclasses.asdict(settings)
    del shared["provider"], shared["mesh"], shared["user"]["folder"]
    rivals, attackers = shared.pop("defences"), shared.pop("attackers")
    return shared, rivals.get(METHODS[cell.method].defence), attackers[settings.user.kind]


def _contents(settings: Any) -> list[str]:
    """Hashes of the files that settings name, one or several with commas between."""
    if isinstance(settings, dict):
        return [found for _, value in sorted(settings.items()) for found in _contents(value)]
    found = []
    for path in map(str.strip, settings.split(",") if isinstance(settings, str) else ()):
        if os.sep in path or "." in path:
            files = [path] if os.path.isfile(path) else []
            if os.path.isdir(path):
                files = sorted(x.path for x in os.scandir(path) if x.name.endswith((".json", ".jinja", ".safetensors")))
            found += [_content(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return found


@functools.cache
def _content(file: str, size: int, changed: int) -> str:  # once for each time of change, which is no part of it
    return file_hash(file)


# -- sweeps ------------------------------------------------------------------------------------------------------------


class CellFile(NamedTuple):
    """A cell of a run, and its record where it is finished."""

    path: pathlib.Path
    record: dict[str, Any] | None

    @property
    def shown(self) -> dict[str, Any]:
        """What callers get of it."""
        return {name: value for name, value in self.record.items() if name not in ("settings", "recipe")}


def read_cell(folder: pathlib.Path, settings: Settings, cell: Cell) -> CellFile:
    """A cell of a run's folder; its record counts if it was made with the same settings."""
    path = folder / "cells" / f"{cell.name}.json"
    record = read_record(path, "delete it and run the same command again") if path.exists() else None
    if record and record["settings"] != settings_key(settings, cell):
        logging.warning("%s: made with other settings, or by an earlier br_jax: it is made again", path)
        record = None
    return CellFile(path, record)


def read_run(settings: Settings, folder: pathlib.Path, cells: Sequence[Cell]) -> dict[Cell, CellFile]:
    """Cells of a run's folder."""
    return {cell: read_cell(folder, settings, cell) for cell in cells}


def run_cells(
    settings: Settings,
    folder: pathlib.Path,
    known: dict[Cell, CellFile],
    experiment: Experiment | None = None,
    table: pathlib.Path | None = None,
) -> Iterator[CellFile]:
    """Scores cells of one run; a model is loaded only when one of them is not there yet.

    Args:
        known: the cells as `read_run` found them; those that are made take their places in it.
        experiment: the run, where its folder is held by the caller already.
        table: the sweep's folder, whose cells of test seeds are all made in one way; default: the run's own.

    Yields:
        Each cell as it is done: "run" (the fields of `Run`), "method", "a", "scores" (as `score` gives them), and
        "seconds", of which a run's first cell pays for its training.
    """
    with contextlib.ExitStack() as stack:
        if any(cell.record is None for cell in known.values()):
            # a sweep waits for another that works on the same run
            for each in () if experiment else filter(None, (folder, settings.user.folder)):
                stack.enter_context(owned(each, wait=True))
            # which the other may have made
            known |= {cell: read_cell(folder, settings, cell) for cell in known if known[cell].record is None}
        start, ledger = time.perf_counter(), protocol.Ledger(table or folder)
        is_test, made = protocol.role(settings.seed) == "test", {}
        if any(cell.record is None for cell in known.values()):
            experiment = experiment or Experiment(settings, folder).begin()
            experiment.prepare()
            made = protocol.made_with(_common(settings), experiment.suite.judges)
            for path, record in known.values() if is_test else ():
                ledger.require(path, record.get("made", {}) if record else made, there=record is not None)
        for cell, (path, record) in known.items():
            if record is None:
                scores = score(experiment, cell)
                record = {"settings": settings_key(settings, cell), "recipe": _recipe(settings, cell)}
                record |= {"run": dataclasses.asdict(Run.of(settings)), **cell._asdict(), "scores": scores}
                record |= {"made": made, "seconds": time.perf_counter() - start}
                if is_main():
                    write_record(path, record, indent=None)  # one line: an outcome a prompt
                    if is_test:
                        ledger.add(path, made)
                barrier("cell")
                known[cell] = CellFile(path, record)
                start = time.perf_counter()
            yield known[cell]


Planned = tuple[Settings, pathlib.Path, dict[Cell, CellFile]]  # a run's settings, folder and cells, see `read_run`
Engine = Callable[[Sequence[Planned], pathlib.Path], Iterator[CellFile]]  # makes the cells of a table in a folder


def in_turn(planned: Sequence[Planned], table: pathlib.Path) -> Iterator[CellFile]:
    """An engine: one run after the other, here."""
    for run in planned:
        yield from run_cells(*run, table=table)


def run_sweep(
    base: ConfigDict,
    workdir: str | os.PathLike,
    grid: Grid,
    records: dict[pathlib.Path, dict] | None = None,
    engine: Engine = in_turn,
) -> Iterator[dict]:
    """Runs a grid; what is finished is read back, what was stopped goes on.

    Args:
        base: config of the experiments, see configs/base.py.
        workdir: folder of the sweep, which several sweeps, and machines that share the file system, may work in.
        records: gets each cell's file and what is in it, for `report.write_report`, which need not read it again.
        engine: who makes them, and where; see `experiment.cluster` for a cluster.

    Yields:
        Each cell as it is done; see `run_cells`.

    Raises:
        UserError: wrong settings, found before the first run begins or its folder is made.
    """
    planned = _plan(base, workdir, grid)
    for settings, folder, known in planned:
        if left := [cell.method for cell, (_, record) in known.items() if record is None]:
            Experiment(settings, folder).check(left)
    for cell in engine(planned, pathlib.Path(workdir)):
        if records is not None:
            records[cell.path] = cell.record
        yield cell.shown


def _plan(base: ConfigDict, workdir: str | os.PathLike, grid: Grid) -> list[Planned]:
    workdir, base = pathlib.Path(workdir), settle(base)
    runs = [(run.settings(base, workdir), workdir / "runs" / run.name) for run in grid.runs()]
    return [(*run, read_run(*run, grid.cells())) for run in runs]


def plan(base: ConfigDict, workdir: str | os.PathLike, grid: Grid) -> dict[str, Any]:
    """What `run_sweep` would do, without doing any of it.

    Returns:
        "runs": for each its "name", its cells "done" and "left", the "trainings" that are left (the provider's not
        counted), the "rows" that these train on, and the "prompts" that are to be answered; "seconds_a_run": what
        finished runs of this grid took on average, None where there is none.
    """
    planned, seconds, seen = [], Counter(), set()
    for settings, folder, known in _plan(base, workdir, grid):
        attacker, user = settings.attacker, settings.user
        left = [cell for cell, file in known.items() if not file.record]
        for file in known.values():
            seconds[folder] += file.record.get("seconds", 0) if file.record else 0
        needed = {name for cell in left for name in METHODS[cell.method].needs}
        jobs = job_folders(pathlib.Path(user.folder or folder), attacker.jobs)
        trained = {job / name / "stage.json": name for name in OF_USER if name in needed for job in jobs}
        to_train = [file for file in trained if file not in seen and not file.exists()]
        seen.update(trained)
        train = settings.train("user")
        of_a_job = train.steps * train.batch_size or attacker.size(user.n) * train.epochs // len(jobs)
        asked = settings.eval.topic * len(settings.topics.eval.split(","))
        asked += asked * attacker.asks_itself * attacker.samples
        planned.append(
            {
                "name": folder.name,
                "done": len(known) - len(left),
                "left": [cell.name for cell in left],
                "trainings": [*dict.fromkeys(trained[file] for file in to_train)],
                "rows": len(to_train) * of_a_job,
                "prompts": len(left) * (asked + settings.eval.benign + settings.eval.task),
            }
        )
    finished = [run for run in planned if run["done"]]
    return {"runs": planned, "seconds_a_run": seconds.total() / len(finished) if finished else None}


def render_plan(planned: dict[str, Any]) -> str:
    """`plan`'s result as plain text: a line a run, the sums, and how long it may take."""
    runs, seconds = planned["runs"], planned["seconds_a_run"]
    lines = [[r["name"], r["done"], ", ".join(r["left"]) or "nothing", " and ".join(r["trainings"])] for r in runs]
    left = sum(bool(run["left"]) for run in runs)
    rows, prompts = (sum(run[name] for run in runs) for name in ("rows", "prompts"))
    text = f"{left} of {len(runs)} runs are left: {rows:,} rows to train on, {prompts:,} prompts to answer"
    if left and seconds is None:
        text += "\ntime: no run has finished in this folder; the first one will tell"
    elif left:
        text += f"\ntime: {left * seconds / 3600:.1f} h, at {seconds / 60:.0f} min a run as for those finished here"
    return f"{tabulate(lines, ['run', 'done', 'left', 'trains'])}\n{text}"
