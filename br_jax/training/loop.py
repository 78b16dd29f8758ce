"""The loop round the step: data in, progress and metrics out, checkpoints between; resumes exactly.

`Loop` is what one run and a pool of many share; `SingleRun` is the one.
"""

import contextlib
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from br_jax.core.errors import Stopped, UserError
from br_jax.core.hosts import StopSignal, fetch, is_main
from br_jax.core.mesh import batch_parts, local_rows, shard, shardings
from br_jax.core.progress import progress
from br_jax.data.batches import iterate
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.config import TrainConfig
from br_jax.training.folder import MetricWriter
from br_jax.training.step import Hyper, Stage, learning_rates, probe, restarted, restarts, train_step


class Loop:
    """Steps until nothing is left: compiled once a shape, metrics fetched together, checkpoints, a stop on SIGTERM.

    A subclass has `name`, `stage`, `config` and `mesh`; `begin` (opens what is to be closed, and goes on from a
    checkpoint), `advance` (does a step and yields, until none is left), `record` (keeps the metrics of some steps),
    `snapshot` (state and data state of a checkpoint, None where nothing is worth one), and `unfinished`.
    """

    unit = "step"  # what is counted

    def __init__(self):
        self.step = self.saved = 0  # steps done, and those of the newest checkpoint
        self.checkpoints: Checkpoints | None = None
        self.pending: list[tuple[Any, dict]] = []  # metrics still on the device, with what they are of
        self.programs: dict[tuple, Callable] = {}
        self.mark, self.compile_seconds = time.perf_counter(), 0.0
        self.to_close = contextlib.ExitStack()  # at the end, each whatever another one raises

    def run(self) -> Iterator[Any]:
        """Does all steps, and yields what `advance` does; `Stopped` after the step at hand where SIGTERM came."""
        with jax.set_mesh(self.mesh), self.to_close, StopSignal() as stop:
            self.begin()
            for out in self.advance():
                self._save_if_due(stop.asked())
                yield out

    def call(self, program: Callable, *args) -> Any:
        """Calls a program of the stage, whose third argument is a batch; at a new shape it is compiled, off the clock.

        Programs stay the process': another run of the same shapes compiles nothing.
        """
        key = program, *(leaf.shape for leaf in jax.tree.leaves(args[2]))
        if key not in self.programs:
            start = time.perf_counter()
            self.programs[key] = program.lower(self.stage, *args).compile()
            seconds = time.perf_counter() - start
            self.compile_seconds += seconds
            self.mark += seconds
        return self.programs[key](*args)

    def log(self) -> None:
        """Has what is pending fetched, if anything is: the one place where the host waits for the device."""
        if self.pending:
            pending, self.pending = self.pending, []
            self.record(pending)

    def _save_if_due(self, stopped: bool) -> None:
        every = self.config.checkpoint_every
        due = stopped or (every and self.step % every == 0 and self.unfinished)
        if due and self.checkpoints and self.step != self.saved:
            self.log()
            if kept := self.snapshot():
                self.checkpoints.save(self.step, *kept)
                self.saved = self.step
            self.mark = time.perf_counter()
        if stopped:
            after = "the same command goes on from there" if self.checkpoints else "without a workdir, all is lost"
            raise Stopped(f"{self.name}: stopped by SIGTERM at {self.unit} {self.step}: {after}")


@dataclasses.dataclass
class Summary:
    """What a run cost: optimizer steps, tokens (padding not counted), answer tokens, seconds, programs of the step."""

    steps: int
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    step_seconds_median: float = 0.0
    compiles: int = 0
    loss: float = math.nan


# What a checkpoint keeps of a summary.
_KEPT = ("tokens", "answer_tokens", "seconds", "compile_seconds", "loss")


def on_mesh(batch: dict, mesh) -> dict:
    """The rows of a batch that are this process' (see `mesh.local_rows`) as global arrays with their shardings."""
    parts = batch_parts(mesh)
    here = len(local_rows(mesh, parts))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * parts // here, *x.shape[1:]), x.dtype), batch)
    return jax.tree.map(
        lambda x, s, full: jax.make_array_from_process_local_data(s, x, full.shape),
        batch, shardings(shapes, mesh), shapes,
    )  # fmt: skip


@dataclasses.dataclass
class SingleRun(Loop):
    """One run: `fit` trains for `len(batches)` steps, or from the step on at which an earlier life of it ended."""

    name: str  # shown on the progress bar
    stage: Stage
    state: dict  # of `init_state`; donated
    frozen: dict  # frozen collections, placed on the mesh
    batches: grain.MapDataset  # finite, of numpy batches, one a step: this process' rows of them
    config: TrainConfig
    mesh: Mesh
    probe_batches: dict[str, dict] = dataclasses.field(default_factory=dict)  # as `batches`; probed at both ends too
    watch: Callable[[int, dict], None] | None = None  # called where it probes, with the step and what is trainable

    def __post_init__(self):
        super().__init__()
        self.summary, self._folder = Summary(len(self.batches)), None
        self._iterator, self._step_seconds = iterate(self.batches), []

    def fit(self, folder: pathlib.Path | None = None) -> tuple[dict, Summary]:
        """(The trained collections, whole in each process, what they cost); raises as `run`, and for a loss of NaN.

        A folder gets metrics.jsonl, probes.jsonl and checkpoints/.
        """
        self._folder = folder
        for _ in self.run():
            pass
        self.summary.compile_seconds += self.compile_seconds
        self.summary.compiles = sum(program is train_step for program, *_ in self.programs)
        if self._step_seconds:
            self.summary.step_seconds_median = statistics.median(self._step_seconds)
        return fetch(self.stage.objective.end(self.state["trainable"], self.state["objective"])), self.summary

    def begin(self) -> None:
        self.state = shard(self.state, self.mesh)
        self.probe_batches = {rows: on_mesh(batch, self.mesh) for rows, batch in self.probe_batches.items()}
        if self._folder is not None:
            self.checkpoints = Checkpoints(self._folder / "checkpoints")
            self.to_close.callback(self.checkpoints.close)
            if kept := self.checkpoints.data():
                self.state = self.checkpoints.restore(self.state, self.mesh)
                self._iterator.set_state(kept["iterator"])
                self.step = self.saved = kept["step"]
                self.summary = dataclasses.replace(self.summary, **{field: kept[field] for field in _KEPT})
        folder = self._folder if is_main() else None
        self._metrics = MetricWriter(folder, "metrics.jsonl", self.step)
        # The probe at a checkpoint's own step comes after it was saved: it is made again.
        self._probes = MetricWriter(folder, "probes.jsonl", self.step - 1)
        self._bar = progress(self.summary.steps, self.name, "step", done=self.step)
        for part in (self._metrics, self._probes, self._bar):
            self.to_close.callback(part.close)

    def advance(self) -> Iterator[None]:
        config, total, hyper = self.config, self.summary.steps, Hyper.of(self.config)
        rates, anew = learning_rates(config, total), restarts(config, total)
        self.mark = time.perf_counter()
        while self.unfinished:
            if config.probe_every and self.step % config.probe_every == 0:
                self._probe()
            if self.step in anew:
                self.state = {**self.state, "opt_state": restarted(self.state["opt_state"])}
            batch, done = on_mesh(next(self._iterator), self.mesh), np.float32(self.step / total)
            now = hyper._replace(learning_rate=rates[self.step], progress=done)
            self.state, metrics = self.call(train_step, self.state, self.frozen, batch, now)
            self.step += 1
            self.pending.append((self.step, metrics))
            if self.step % config.log_every == 0 or not self.unfinished:
                self.log()
            yield
        self._probe()

    @property
    def unfinished(self) -> bool:
        return self.step < self.summary.steps

    def record(self, pending: list[tuple[int, dict]]) -> None:
        values = jax.device_get([metrics for _, metrics in pending])
        passed, tokens = time.perf_counter() - self.mark, sum(int(metrics["tokens"]) for metrics in values)
        seconds = passed / len(values)
        for (at, _), metrics in zip(pending, values, strict=True):
            record = {key: value.item() for key, value in metrics.items()}
            loss = self.summary.loss = record["loss"]
            if not math.isfinite(loss):
                raise UserError(f"{self.name} step {at}: loss is {loss}: lower learning_rate or look at the rows")
            self._step_seconds.append(seconds)
            self.summary.answer_tokens += int(record.pop("answer_tokens"))
            self._metrics.write({"step": at, **record, "step_seconds": seconds})
        self._metrics.flush()
        self.summary.tokens += tokens
        self.summary.seconds += passed
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens / passed:,.0f} tokens/s", refresh=False)
        self._bar.update(len(values))
        self.mark = time.perf_counter()

    def _probe(self) -> None:
        if not self.probe_batches and self.watch is None:
            return
        self.log()
        trainable, scale = self.state["trainable"], Hyper.of(self.config).scale
        for rows, batch in self.probe_batches.items():
            loss, norm = self.call(probe, trainable, self.frozen, batch, scale)
            self._probes.write({"step": self.step, "rows": rows, "loss": float(loss), "grad_norm": float(norm)})
        self._probes.flush()
        if self.watch is not None:
            self.watch(self.step, trainable)
        self.mark = time.perf_counter()

    def snapshot(self) -> tuple[dict, dict]:
        kept = {field: getattr(self.summary, field) for field in _KEPT}
        kept["compile_seconds"] += self.compile_seconds
        return self.state, {"iterator": self._iterator.get_state(), "step": self.step, **kept}
