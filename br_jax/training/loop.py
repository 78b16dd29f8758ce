"""The loop round the step: data in, progress and metrics out, checkpoints between; resumes exactly.

`Loop` is what one run and a pool of many share; `SingleRun` is the one.
"""

import contextlib
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from br_jax.core.errors import Stopped, UserError
from br_jax.core.hosts import StopSignal, fetch, is_main
from br_jax.core.mesh import batch_parts, local_rows, place, shardings
from br_jax.core.progress import progress
from br_jax.data.batches import iterate
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.config import TrainConfig
from br_jax.training.folder import MetricWriter
from br_jax.training.step import Hyper, Stage, learning_rates, probe, restarted, restarts, train_step


class Loop:
    """Steps until nothing is left: compiled once a shape, metrics fetched together, checkpoints, a stop on SIGTERM.

    A subclass has `begin` (opens what is to be closed, and goes on from a checkpoint), `advance` (does a step and
    yields, until none is left), `record` (keeps the metrics of some steps), `snapshot` (state and data state of a
    checkpoint, None where nothing is worth one), and `unfinished`.
    """

    name: str  # shown on the progress bar, and in messages
    unit = "step"  # what is counted
    stage: Stage
    config: TrainConfig
    mesh: Mesh

    def __init__(self) -> None:
        self.step = self._saved = 0  # steps done, and those of the newest checkpoint
        self.checkpoints: Checkpoints | None = None
        self._pending: list[tuple[Any, dict]] = []  # metrics still on the device, with what they are of
        self._programs: dict[tuple, Callable] = {}
        self._mark, self._compile_seconds = time.perf_counter(), 0.0
        self._open = contextlib.ExitStack()  # what is closed at the end, each whatever another one raises

    def run(self) -> Iterator[Any]:
        """Does all steps; yields what `advance` does.

        Raises:
            UserError: a disk that is full, and what `advance` raises.
            Stopped: SIGTERM came; the state was saved after the step at hand, where there is a folder.
        """
        with jax.set_mesh(self.mesh), self._open, StopSignal() as stop:
            self.begin()
            for out in self.advance():
                self._save_if_due(stop.asked())
                yield out

    def call(self, program: Callable, *args) -> Any:
        """Calls a program of the stage, whose third argument is a batch; at a new shape it is compiled, off the clock.

        Programs stay the process': another run of the same shapes compiles nothing.
        """
        key = program, *(leaf.shape for leaf in jax.tree.leaves(args[2]))
        if key not in self._programs:
            start = time.perf_counter()
            self._programs[key] = program.lower(self.stage, *args).compile()
            seconds = time.perf_counter() - start
            self._compile_seconds += seconds
            self._mark += seconds
        return self._programs[key](*args)

    def log(self) -> None:
        """Fetches what is pending, if anything is: the one place where the host waits for the device."""
        if self._pending:
            pending, self._pending = self._pending, []
            self.record(pending)

    def _save_if_due(self, stopped: bool) -> None:
        every = self.config.checkpoint_every
        due = stopped or (every and self.step % every == 0 and self.unfinished)
        if due and self.checkpoints and self.step != self._saved:
            self.log()
            if kept := self.snapshot():
                self.checkpoints.save(self.step, *kept)
                self._saved = self.step
            self._mark = time.perf_counter()
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
    places = shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, s, full: jax.make_array_from_process_local_data(s, x, full.shape), batch, places, shapes
    )


class SingleRun(Loop):
    """One run: `fit` trains for `len(batches)` steps, or from the step on at which an earlier life of it ended.

    Args:
        state: of `init_state`; donated.
        frozen: frozen collections, placed on the mesh.
        batches: finite, of numpy batches, one a step: this process' rows of them.
        probe_batches: as `batches`; probed at both ends too.
        watch: called where it probes, with the step and the trainable collections.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        state: dict,
        frozen: dict,
        batches: grain.MapDataset,
        config: TrainConfig,
        mesh: Mesh,
        probe_batches: Mapping[str, dict] | None = None,
        watch: Callable[[int, dict], None] | None = None,
    ):
        super().__init__()
        self.name, self.stage, self.state, self.frozen, self.config = name, stage, state, frozen, config
        self.mesh, self.total, self._iterator = mesh, len(batches), iterate(batches)
        self._probe_batches, self._watch = dict(probe_batches or {}), watch
        self._summary, self._step_seconds = Summary(self.total), []

    def fit(self, folder: pathlib.Path | None = None) -> tuple[dict, Summary]:
        """Trains.

        Args:
            folder: gets metrics.jsonl, probes.jsonl and checkpoints/.

        Returns:
            The trained collections, whole in each process, and what they cost.

        Raises:
            UserError, Stopped: as `run`; and a loss that is not finite.
        """
        self.folder = folder
        for _ in self.run():
            pass
        self._summary.compile_seconds += self._compile_seconds
        self._summary.compiles = sum(program is train_step for program, *_ in self._programs)
        if self._step_seconds:
            self._summary.step_seconds_median = statistics.median(self._step_seconds)
        return fetch(self.stage.objective.end(self.state["trainable"], self.state["objective"])), self._summary

    def begin(self) -> None:
        """See `Loop`."""
        self.state = place(self.state, self.mesh)
        self._probe_batches = {rows: on_mesh(batch, self.mesh) for rows, batch in self._probe_batches.items()}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(self.folder / "checkpoints")
            self._open.callback(self.checkpoints.close)
            if kept := self.checkpoints.data():
                self.state = self.checkpoints.restore(self.state, self.mesh)
                self._iterator.set_state(kept["iterator"])
                self.step = self._saved = kept["step"]
                for field in _KEPT:
                    setattr(self._summary, field, kept[field])
        folder = self.folder if is_main() else None
        self._metrics = MetricWriter(folder, "metrics.jsonl", self.step)
        # The probe at a checkpoint's own step comes after it was saved: it is made again.
        self._probes = MetricWriter(folder, "probes.jsonl", self.step - 1)
        self._bar = progress(self.total, self.name, "step", done=self.step)
        for part in (self._metrics, self._probes, self._bar):
            self._open.callback(part.close)

    def advance(self) -> Iterator[None]:
        """See `Loop`."""
        config, rates, hyper = self.config, learning_rates(self.config, self.total), Hyper.of(self.config)
        anew = restarts(config, self.total)
        self._mark = time.perf_counter()
        while self.unfinished:
            if config.probe_every and self.step % config.probe_every == 0:
                self._probe()
            if self.step in anew:
                self.state = {**self.state, "opt_state": restarted(self.state["opt_state"])}
            batch, done = on_mesh(next(self._iterator), self.mesh), np.float32(self.step / self.total)
            now = hyper._replace(learning_rate=rates[self.step], progress=done)
            self.state, metrics = self.call(train_step, self.state, self.frozen, batch, now)
            self.step += 1
            self._pending.append((self.step, metrics))
            if self.step % config.log_every == 0 or not self.unfinished:
                self.log()
            yield
        self._probe()

    @property
    def unfinished(self) -> bool:
        """See `Loop`."""
        return self.step < self.total

    def record(self, pending: list[tuple[int, dict]]) -> None:
        """See `Loop`."""
        values = jax.device_get([metrics for _, metrics in pending])
        passed, tokens = time.perf_counter() - self._mark, sum(int(metrics["tokens"]) for metrics in values)
        seconds = passed / len(values)
        for (at, _), metrics in zip(pending, values, strict=True):
            record = {key: value.item() for key, value in metrics.items()}
            loss = self._summary.loss = record["loss"]
            if not math.isfinite(loss):
                raise UserError(f"{self.name} step {at}: loss is {loss}: lower learning_rate or look at the rows")
            self._step_seconds.append(seconds)
            self._summary.answer_tokens += int(record.pop("answer_tokens"))
            self._metrics.write({"step": at, **record, "step_seconds": seconds})
        self._metrics.flush()
        self._summary.tokens += tokens
        self._summary.seconds += passed
        self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens / passed:,.0f} tokens/s", refresh=False)
        self._bar.update(len(values))
        self._mark = time.perf_counter()

    def _probe(self) -> None:
        if not self._probe_batches and self._watch is None:
            return
        self.log()
        for rows, batch in self._probe_batches.items():
            scale = np.float32(self.config.alpha / self.config.rank)
            loss, norm = self.call(probe, self.state["trainable"], self.frozen, batch, scale)
            self._probes.write({"step": self.step, "rows": rows, "loss": float(loss), "grad_norm": float(norm)})
        self._probes.flush()
        if self._watch is not None:
            self._watch(self.step, self.state["trainable"])
        self._mark = time.perf_counter()

    def snapshot(self) -> tuple[dict, dict]:
        """See `Loop`."""
        kept = {field: getattr(self._summary, field) for field in _KEPT}
        kept["compile_seconds"] += self._compile_seconds
        return self.state, {"iterator": self._iterator.get_state(), "step": self.step, **kept}
