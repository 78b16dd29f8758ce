"""Users' jobs in a pool: what was asked for, how far each has come, how its rows are read; how long pool steps are."""

import contextlib
import dataclasses
import itertools
import math
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError, is_machine_fault, near_names, one_line
from br_jax.data.batches import Batch, packed_steps
from br_jax.data.rows import Rows, as_rows
from br_jax.models.model import Model
from br_jax.training.batching import encode_for, packed_unit, padded_lengths, run_order
from br_jax.training.config import TrainConfig, require_fit
from br_jax.training.folder import Folder, MetricWriter
from br_jax.training.run import rows_fingerprint
from br_jax.training.step import learning_rates, restarts

# What a job may set for itself; the rest is the pool's, for it is a part of the program that all run.
OWN = (
    "rank", "alpha", "learning_rate", "warmup_ratio", "weight_decay", "clip_norm", "epochs", "cycles", "steps",
    "batch_size", "max_length", "loss_mean", "seed", "same_start",
)  # fmt: skip
_LIMITED = ("rank", "max_length")  # those that the pool's own are the most of
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
NAMED = "name it by at most 100 letters, digits, dots, dashes, underscores"
# What long rows may cost the others: as much as half of the steps that these would have had without them.
_SURCHARGE = 0.5
_SHARES = (0.1, 0.5, 0.9, 1.0)  # of the first jobs' rows, that fit each length
_GROWTH = 1.4  # from one longer length to the next
# Rows of at most so many bytes are waited for. Of more, so many are taken to be read while a pool makes a step.
_SMALL, _BYTES_A_STEP, _BYTES_A_ROW = 1_000_000, 100_000, 250


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
            if getattr(made, name) > (most := getattr(pool, name)):
                raise UserError(f"job {self.name}: {name} is {getattr(made, name)}: the pool's {most} is the most")
        return made

    @property
    def head_start(self) -> int:
        """Pool steps in which others may go before it while its rows are read; by their size alone, not by time.

        A file's size is known, and that of rows in memory by their number; others may have a `size` in bytes.
        """
        size = 0
        with contextlib.suppress(OSError, ValueError):  # reading them will tell
            if isinstance(self.rows, str | os.PathLike):
                size = os.stat(self.rows).st_size
            elif not isinstance(size := getattr(self.rows, "size", None), int):
                size = len(self.rows) * _BYTES_A_ROW if isinstance(self.rows, Sequence) else 0
        return size // _BYTES_A_STEP if size > _SMALL else 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job: an adapter, or one line that says why there is none."""

    name: str
    adapter: Adapter | None
    error: str = ""


class Taken(NamedTuple):
    """What a job puts into a pool step."""

    rows: list[Batch]  # arrays [n] each; the weights of all rows of a step add to 1
    first: int  # which of its step's rows the first of them is
    rate: float  # of the step
    restart: bool  # whether its optimizer begins anew before it
    due: bool  # whether it ends the optimizer step


@dataclasses.dataclass(eq=False)
class JobState:
    """How far a job has come: which rows of which step are next. Its steps are those of a run by itself."""

    name: str
    config: TrainConfig
    steps: Sequence[list[Batch]]
    rows_hash: str
    counts: dict[str, int]  # of its rows, see `encode_for`
    step: int = 0
    row: int = 0  # of the step
    tokens: int = 0
    answer_tokens: int = 0
    loss: float = math.nan  # the last known
    wrong: str = ""  # why it must go
    identity: str = ""  # a hash of the run that it is
    folder: Folder | None = None
    metrics: MetricWriter | None = None
    held: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)  # folder and metrics

    def __post_init__(self):
        self.total = len(self.steps)
        self._rates, self._restarts = learning_rates(self.config, self.total), restarts(self.config, self.total)
        self._loaded, self._rows = -1, []

    @classmethod
    def of(cls, job: Job, pool: TrainConfig, model: Model, packing: int, share: bool) -> "JobState":
        """Reads and encodes a job's rows; a `UserError` for what a run by itself would refuse, too.

        A packed row has at most `packing` tokens (0: none is packed); with `share`, what all begin with is run once.
        """
        name, config = f"job {job.name}", job.config(pool)
        rows = as_rows(job.rows, f"{name}: rows")
        require_fit(config, model.spec, len(rows), owner=f"{name}: ")
        examples, counts = encode_for(name, model, rows, config)
        times = config.steps * config.batch_size / len(examples) if config.steps else config.epochs
        tokens = times * sum(len(example["tokens"]) for example in examples)
        if tokens > job.max_tokens:
            most = f"{job.max_tokens:,.0f} are the most: fewer rows, or epochs"
            raise UserError(f"{name}: {tokens:,.0f} tokens in {times:g} epochs are too many, {most}")
        steps = packed_steps(examples, length=packing, share=share, **run_order(config))
        return cls(job.name, config, steps, rows_fingerprint(rows), counts)

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
        return [len(row["tokens"]) for step in range(min(steps, self.total)) for row in self.steps[step]]

    def take(self, length: int, count: int) -> Taken | None:
        """The next rows of the step at hand, as many as fit a pool step of `count` rows of a length, if any does."""
        left = itertools.islice(self._current, self.row, self.row + count)
        rows = list(itertools.takewhile(lambda row: len(row["tokens"]) <= length, left))
        if not rows:
            return None
        rate, first, restart = self._rates[self.step], self.row, self.row == 0 and self.step in self._restarts
        self.row += len(rows)
        due = self.row == len(self._current)
        if due:
            self.step, self.row = self.step + 1, 0
        self.tokens += sum(len(row["tokens"]) for row in rows)
        self.answer_tokens += sum(int(np.count_nonzero(row["weights"])) for row in rows)
        return Taken(rows, first, rate, restart, due)

    @property
    def _current(self) -> list[Batch]:
        if self._loaded != self.step:
            rows = self.steps[self.step]
            total = max(sum(float(row["weights"].sum()) for row in rows), 1.0)
            self._rows = [row | {"weights": row["weights"] / np.float32(total)} for row in rows]
            self._loaded = self.step
        return self._rows


class Reading:
    """A job whose rows are read in a thread of their own; where threads have priorities, it yields to the training."""

    def __init__(self, job: Job, step: int, *how):
        """`step`: of the pool, when the job came; `how`: what `JobState.of` takes behind the job."""
        self.job, self.due, self._how, self.future = job, step + job.head_start, how, Future()
        threading.Thread(target=self._run, name="br_jax-rows", daemon=True).start()  # the program's end waits for none

    def _run(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + 10)
        try:
            self.future.set_result(JobState.of(self.job, *self._how))
        except BaseException as error:
            self.future.set_exception(error)

    def result(self) -> JobState:
        """The job, once it is read; whatever went wrong in that is the job's, but for what is the machine's."""
        try:
            return self.future.result()
        except Exception as error:
            if isinstance(error, UserError) or is_machine_fault(error):
                raise
            name, what = self.job.name, f"{type(error).__name__}: {one_line(error)}"
            logging.exception("job %s: its rows cannot be read", name)
            raise UserError(f"job {name}: its rows cannot be read ({what})") from error


class Schedule:
    """Chooses the length of the next pool step among a few, each a program of its own.

    A step costs as much as all its slots' rows at its length, used or not. A slot whose next row is longer waits. The
    length that computes the most real tokens for its cost is taken, but no slot waits longer than `patience` says: so
    many steps that giving in to it makes the other slots at most half as slow again.
    """

    def __init__(self, lengths: Sequence[int], slots: int):
        """`lengths` ascend."""
        self.lengths, self._waited = tuple(lengths), [0] * slots

    def choose(self, needs: Sequence[int]) -> int:
        """The length of the next step; `needs` are tokens of each slot's next row, 0 for none, but not all."""
        fits = [next(length for length in self.lengths if length >= need) if need else 0 for need in needs]

        def worth(length: int) -> float:
            return sum(need for need, fit in zip(needs, fits, strict=True) if fit <= length) / length

        best = max(sorted(set(fits) - {0}), key=worth)
        for slot, fit in enumerate(fits):
            if self._waited[slot] >= self.patience(best, fit):
                best = max(best, fit)
        self._waited = [(n + 1) * (fit > best) for n, fit in zip(self._waited, fits, strict=True)]
        return best

    def patience(self, short: int, long: int) -> int:
        """How many steps a row of one length waits where steps of another are worth more."""
        return -int(-(long - short) / (_SURCHARGE * short) // 1)


def step_shapes(config: TrainConfig, on: str) -> tuple[tuple[int, ...], int]:
    """(The lengths that a pool step may have, ascending; its rows of a slot); of packed rows the longest alone."""
    rows = config.batch_size // config.accumulation
    if not config.packing:
        return padded_lengths(config), rows
    unit, most = packed_unit(on), min(config.packing, rows * config.max_length)
    return (-(-most // unit) * unit,), 1


def fitting_lengths(needs: Sequence[int], most: int, on: str) -> tuple[int, ...]:
    """Lengths of pool steps, ascending, for packed rows of so many tokens, and longer ones up to `most` for others."""
    needs, unit = sorted(needs), packed_unit(on)
    fitting = [needs[int(share * (len(needs) - 1))] for share in _SHARES]
    while fitting[-1] < most:
        fitting.append(min(int(_GROWTH * fitting[-1]) + 1, most))
    return tuple(sorted({min(-(-length // unit) * unit, most) for length in fitting}))


def fill(taken: Sequence[Taken | None], length: int, rows: int) -> dict[str, np.ndarray]:
    """The batch of a pool step, [slots x rows, length]: each slot's rows together, the rest padding."""
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), np.int32) | {"weights": np.float32}
    batch = {name: np.zeros((len(taken) * rows, length), kind) for name, kind in kinds.items()}
    batch["piece"] = np.zeros(len(taken) * rows, np.int32)
    for slot, each in enumerate(taken):
        for i, row in enumerate(each.rows if each else ()):
            for name in kinds:
                batch[name][slot * rows + i, : len(row[name])] = row[name]
            batch["piece"][slot * rows + i] = each.first + i
    return batch
