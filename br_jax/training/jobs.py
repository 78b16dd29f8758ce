"""A user's job in a pool: what was asked for, and how far it has come."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError, near_names
from br_jax.data.batches import Batch
from br_jax.data.packing import packed_steps
from br_jax.data.rows import Rows, as_rows
from br_jax.models.model import Model
from br_jax.training.config import TrainConfig, require_fit
from br_jax.training.run import encode_for, rows_fingerprint
from br_jax.training.stage import cycles, learning_rates

# What a job may set for itself; the rest is the pool's, for it is a part of the program that all run.
OWN = (
    "rank", "alpha", "learning_rate", "warmup_ratio", "weight_decay", "clip_norm", "epochs", "cycles", "steps",
    "batch_size", "max_length", "loss_mean", "seed", "same_start",
)  # fmt: skip
_LIMITED = ("rank", "max_length")  # those that the pool's own are the most of
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
NAMED = "name it by at most 100 letters, digits, dots, dashes, underscores"


@dataclasses.dataclass(frozen=True)
class Job:
    """One user's rows, and how they are to be trained on.

    Attributes:
        name: of the job and its folder: letters, digits, dot, dash and underscore, at most 100.
        rows: the rows, or the JSONL file that holds them.
        settings: some of `OWN`, in place of the pool's.
        max_tokens: the most that are trained on: those of its rows, cut at `max_length`, times its epochs.
    """

    name: str
    rows: Rows
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_tokens: float = math.inf

    def __post_init__(self):
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise UserError(f"job {self.name!r}: {NAMED}")

    def config(self, pool: TrainConfig) -> TrainConfig:
        """The pool's config with the job's own settings; a `UserError` for what it may not set."""
        for name in self.settings:
            if name not in OWN:
                raise UserError(f"job {self.name}: {name!r} is the same for all of a pool; {near_names(name, OWN)}")
        try:
            made = dataclasses.replace(pool, **self.settings, accumulation=1)
        except UserError as error:
            raise UserError(f"job {self.name}: {error}") from error
        for name in _LIMITED:
            if getattr(made, name) > getattr(pool, name):
                most = getattr(pool, name)
                raise UserError(f"job {self.name}: {name} is {getattr(made, name)}: the pool's {most} is the most")
        return made


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job: an adapter, or one line that says why there is none."""

    name: str
    adapter: Adapter | None
    error: str = ""


class Taken(NamedTuple):
    """What a job puts into a turn."""

    rows: list[Batch]  # arrays [n] each; the weights of all rows of a step add to 1
    first: int  # which of its step's rows the first of them is
    rate: float  # of the step
    restart: bool  # whether its optimizer begins anew before this turn
    due: bool  # whether the turn ends the step


class Course:
    """How far a job has come: which rows of which step are next. Its steps are those of a run by itself."""

    def __init__(self, job: Job, config: TrainConfig, steps: Sequence[list[Batch]], rows_hash: str, counts: dict):
        self.job, self.config, self.rows_hash, self.counts = job, config, rows_hash, counts
        self.step, self.row, self.identity = 0, 0, ""  # the last: a hash of the run that it is
        self._steps, self._rates = steps, learning_rates(config, len(steps))
        self._restarts = {part.start for part in cycles(config, len(steps))} - {0}
        self._loaded, self._rows = -1, []

    @classmethod
    def of(cls, job: Job, config: TrainConfig, model: Model, packing: int, share: bool) -> "Course":
        """Reads and encodes a job's rows.

        Args:
            packing: the most tokens of a packed row, 0 for none.
            share: whether what all rows begin with is run once for those of a packed row.

        Raises:
            UserError: rows or settings that a run by itself would refuse, too.
        """
        rows = as_rows(job.rows, f"job {job.name}: rows")
        require_fit(config, model.spec, len(rows), owner=f"job {job.name}: ")
        examples, dropped = encode_for(f"job {job.name}", model, rows, config)
        once = sum(len(example["tokens"]) for example in examples)
        times = config.steps * config.batch_size / len(examples) if config.steps else config.epochs
        if once * times > job.max_tokens:
            raise UserError(
                f"job {job.name}: {once * times:,.0f} tokens in {times:g} epochs are too many, {job.max_tokens:,.0f} "
                "are the most: fewer rows, or epochs"
            )
        length = {"steps": config.steps} if config.steps else {"epochs": config.epochs}
        order = {"batch_size": config.batch_size, "seed": config.seed, **length}
        counts = {"rows": dropped.rows, "dropped": dropped.total, "truncated": dropped.truncated}
        steps = packed_steps(examples, length=packing, share=share, **order)
        return cls(job, config, steps, rows_fingerprint(rows), counts)

    @property
    def total(self) -> int:
        """Optimizer steps."""
        return len(self._steps)

    @property
    def done(self) -> bool:
        """Whether no step is left."""
        return self.step >= self.total

    @property
    def need(self) -> int:
        """Tokens of the next row."""
        return len(self._current[self.row]["tokens"])

    def needs(self, steps: int = 16) -> list[int]:
        """Tokens of the rows of the first steps."""
        return [len(row["tokens"]) for step in range(min(steps, self.total)) for row in self._steps[step]]

    def take(self, length: int, count: int) -> Taken | None:
        """The next rows of the step at hand, as many as fit a turn of `count` rows of a length; None if the next does
        not fit.
        """
        left = itertools.islice(self._current, self.row, self.row + count)
        rows = list(itertools.takewhile(lambda row: len(row["tokens"]) <= length, left))
        if not rows:
            return None
        rate, first, at_start = self._rates[self.step], self.row, self.row == 0 and self.step in self._restarts
        self.row += len(rows)
        due = self.row == len(self._current)
        if due:
            self.step, self.row = self.step + 1, 0
        return Taken(rows, first, rate, at_start, due)

    @property
    def _current(self) -> list[Batch]:
        if self._loaded != self.step:
            rows = self._steps[self.step]
            total = max(sum(float(row["weights"].sum()) for row in rows), 1.0)
            self._rows = [row | {"weights": row["weights"] / np.float32(total)} for row in rows]
            self._loaded = self.step
        return self._rows
