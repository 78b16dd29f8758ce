"""The engine: a grid of users and methods, whose runs share what they can; a single run is a grid of one.

Runs of one seed share the provider's folder; cells of one run share its trained adapters, so that most of them cost an
evaluation only. Cells that are there are read back, each once; what was stopped goes on.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from tabulate import tabulate

from br_jax.attackers.registry import ATTACKERS
from br_jax.core.bounds import require
from br_jax.core.errors import UserError, look_up
from br_jax.core.io import owned
from br_jax.experiment.cells import Run, make_cell, read_cell
from br_jax.experiment.methods import METHODS, OF_USER, Cell, cells_of
from br_jax.experiment.run import Experiment, job_folders
from br_jax.experiment.settings import Settings, bounds, settle

# An axis of numbers -> the setting whose bounds its values have.
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
        limits = bounds()
        for axis, values in vars(self).items():
            for value in values if axis in _SETS else ():
                require(f"the sweep's axis {axis}: a value", value, limits[_SETS[axis]])
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
        """Every run of a shard, seeds outermost, so that the first seed's table is complete before the next begins."""
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


class _Planned(NamedTuple):
    """A run of a sweep, and its cells that are there already."""

    settings: Settings
    folder: pathlib.Path
    known: dict[Cell, dict | None]

    @property
    def left(self) -> list[Cell]:
        return [cell for cell, record in self.known.items() if record is None]


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
    planned = _plan(base, workdir, grid, shard)
    for run in planned:
        if run.left:
            Experiment(run.settings, run.folder).check([cell.method for cell in run.left])
    for run in planned:
        yield from run_cells(run.settings, run.folder, run.known)


def _plan(base: ConfigDict, workdir: str | os.PathLike, grid: Grid, shard: tuple[int, int]) -> list[_Planned]:
    planned, workdir, base = [], pathlib.Path(workdir), settle(base)
    for run in grid.runs(shard):
        settings, folder = run.settings(base, workdir), workdir / "runs" / run.name
        planned.append(_Planned(settings, folder, {cell: read_cell(folder, settings, cell) for cell in grid.cells()}))
    return planned


def run_cells(
    settings: Settings, folder: pathlib.Path, known: Mapping[Cell, dict | None], experiment: Experiment | None = None
) -> Iterator[dict]:
    """Scores cells of one run; a model is loaded only when one of them is not there yet.

    Args:
        known: the cells, and those that were read back.
        experiment: the run, where its folder is held by the caller already.

    Yields:
        Each cell as it is done, see `cells.make_cell`.
    """
    known = dict(known)
    with contextlib.ExitStack() as stack:
        if None in known.values():
            # a sweep waits for another that works on the same run
            for each in () if experiment else filter(None, (folder, settings.user.folder)):
                stack.enter_context(owned(each, wait=True))
            for cell, record in known.items():  # which the other may have made
                known[cell] = record or read_cell(folder, settings, cell)
        start = time.perf_counter()
        if None in known.values():
            experiment = experiment or Experiment(settings, folder).begin()
            experiment.prepare()
        for cell in known:
            if known[cell] is None:
                known[cell] = make_cell(experiment, cell, start)
                start = time.perf_counter()
            yield known[cell]


def plan(base: ConfigDict, workdir: str | os.PathLike, grid: Grid, shard: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """What `run_sweep` would do, without doing any of it.

    Returns:
        "runs": for each its "name", its cells "done" and "left", the "trainings" that are left (the provider's not
        counted), the "rows" that these train on, and the "prompts" that are to be answered; "seconds_a_run": what
        finished runs of this grid took on average, None where there is none.
    """
    planned, seconds, planned_before = [], defaultdict(float), set()
    for settings, folder, known in (runs := _plan(base, workdir, grid, shard)):
        attacker, user, left = settings.attacker, settings.user, [cell for cell in known if known[cell] is None]
        needed = {name for cell in left for name in METHODS[cell.method].needs}
        jobs = job_folders(pathlib.Path(user.folder or folder), attacker.jobs)
        trained = {job / name / "stage.json": name for name in OF_USER if name in needed for job in jobs}
        to_train = [file for file in trained if file not in planned_before and not file.exists()]
        planned_before.update(trained)
        train = settings.train("user")
        of_a_job = train.steps * train.batch_size or attacker.size(user.n) * train.epochs // len(jobs)
        asked = 1 + attacker.asks_itself * attacker.samples
        harmful = settings.eval.topic * len(settings.topics.eval.split(",")) * asked
        planned.append(
            {
                "name": folder.name,
                "done": len(known) - len(left),
                "left": [cell.name for cell in left],
                "trainings": [*dict.fromkeys(trained[file] for file in to_train)],
                "rows": len(to_train) * of_a_job,
                "prompts": len(left) * (harmful + settings.eval.benign + settings.eval.task),
            }
        )
    for cell in (cell for run in runs for cell in run.known.values() if cell):
        seconds[Run(**cell["run"])] += cell.get("seconds", 0)
    return {"runs": planned, "seconds_a_run": sum(seconds.values()) / len(seconds) if seconds else None}


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
