"""The loop round the step: data in, progress and metrics out, checkpoints between; resumes exactly."""

import contextlib
import dataclasses
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from br_jax.core.compiles import Compiles
from br_jax.core.errors import Stopped, UserError
from br_jax.core.hosts import StopSignal, is_main
from br_jax.core.io import writing
from br_jax.core.mesh import batch_parts, local_rows, place, shardings
from br_jax.core.progress import progress
from br_jax.data.batches import iterate
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.config import TrainConfig
from br_jax.training.metrics import MetricWriter
from br_jax.training.stage import Hyper, Stage, cycles, learning_rates, probe, restarted, train_step


@dataclasses.dataclass
class Summary:
    """What a run cost: optimizer steps, tokens (padding not counted), answer tokens, seconds, compilations."""

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
    """The rows of a batch that are this process' (see `sharding.local_rows`) as global arrays with their shardings."""
    parts = batch_parts(mesh)
    here = len(local_rows(mesh, parts))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) * parts // here, *x.shape[1:]), x.dtype), batch)
    places = shardings(shapes, mesh)
    return jax.tree.map(
        lambda x, s, whole: jax.make_array_from_process_local_data(s, x, whole.shape), batch, places, shapes
    )


@dataclasses.dataclass
class Loop:
    """One life of a run: `fit` trains for `len(batches)` steps, or from the step on at which an earlier life ended."""

    name: str  # shown on the progress bar
    stage: Stage  # what is compiled
    state: dict  # of `init_state`; donated
    frozen: dict  # frozen collections, placed on the mesh
    batches: grain.MapDataset  # finite, of numpy batches, one a step: this process' rows of them
    config: TrainConfig  # hyper-parameters, and intervals of logging, probing and checkpoints
    mesh: Mesh  # where batches go
    folder: pathlib.Path | None = None  # gets metrics.jsonl, probes.jsonl and checkpoints/
    probe_batches: Mapping[str, dict] = dataclasses.field(default_factory=dict)  # as `batches`; probed at both ends too
    watch: Callable[[int, dict], None] | None = None  # called where it probes, with the trainable collections

    def fit(self) -> tuple[dict, Summary]:
        """Trains.

        Returns:
            The final state and what it cost.

        Raises:
            UserError: a loss that is not finite, or a disk that is full.
            Stopped: SIGTERM came; the state was saved after the step at hand, where there is a folder.
        """
        with writing(self.folder, "free space, then run again"), jax.set_mesh(self.mesh):
            self._open()
            with contextlib.closing(self), StopSignal() as stop:
                return self._train(stop)

    def _open(self) -> None:
        config, folder = self.config, self.folder
        self.state = place(self.state, self.mesh)
        self.probe_batches = {rows: on_mesh(batch, self.mesh) for rows, batch in self.probe_batches.items()}
        self.total, self.done = len(self.batches), 0
        self.rates, self.hyper = learning_rates(config, self.total), Hyper.of(config)
        self.restarts = {part.start for part in cycles(config, self.total)} - {0}
        self.iterator = iterate(self.batches)
        self.summary = Summary(self.total)
        self.pending = []  # metrics still on the device, with the step they belong to
        self.step_seconds = []
        self.checkpoints = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(folder / "checkpoints")
            self._resume()
        kept = folder if is_main() else None
        self.metrics = MetricWriter(kept, "metrics.jsonl", self.done)
        # The probe at a checkpoint's own step comes after it was saved: it is made again.
        self.probes = MetricWriter(kept, "probes.jsonl", self.done - 1)
        self.bar = progress(self.total, self.name, "step", done=self.done)

    def _resume(self) -> None:
        if restored := self.checkpoints.restore(self.state, self.mesh):
            self.state, kept = restored
            self.iterator.set_state(kept["iterator"])
            self.done = kept["step"]
            for field in _KEPT:
                setattr(self.summary, field, kept[field])

    def _train(self, stop: StopSignal) -> tuple[dict, Summary]:
        config = self.config
        self.mark = time.perf_counter()
        while self.done < self.total:
            if config.probe_every and self.done % config.probe_every == 0:
                self._probe()
            if self.done in self.restarts:
                self.state = {**self.state, "opt_state": restarted(self.state["opt_state"])}
            batch = on_mesh(next(self.iterator), self.mesh)
            progress = np.float32(self.done / self.total)
            hyper = self.hyper._replace(learning_rate=self.rates[self.done], progress=progress)
            self.state, metrics = self._call(train_step, self.state, self.frozen, batch, hyper)
            self.done += 1
            self.pending.append((self.done, metrics))
            if self.done % config.log_every == 0 or self.done == self.total:
                self._log()
            due = config.checkpoint_every and self.done % config.checkpoint_every == 0 and self.done < self.total
            stopped = stop.asked()
            if self.checkpoints and (due or stopped):
                self._save()
            if stopped:
                after = "the same command goes on from there" if self.checkpoints else "without a workdir, all is lost"
                raise Stopped(f"{self.name}: stopped by SIGTERM at step {self.done}: {after}")
        self._probe()
        if self.step_seconds:
            self.summary.step_seconds_median = statistics.median(self.step_seconds)
        return self.state, self.summary

    def _call(self, program, *args):
        """Calls a program of the stage; what compiling it takes, at a new shape, is kept off the step clock."""
        start = time.perf_counter()
        with Compiles() as compiles:
            out = program(self.stage, *args)
        if compiles.names:
            seconds = time.perf_counter() - start
            self.summary.compiles += program is train_step
            self.summary.compile_seconds += seconds
            self.mark += seconds
        return out

    def _log(self) -> None:
        """Fetches what is pending, if anything is: the one place where the host waits for the device."""
        if not self.pending:
            return
        values = jax.device_get([metrics for _, metrics in self.pending])
        now = time.perf_counter()
        passed, tokens = now - self.mark, sum(int(metrics["tokens"]) for metrics in values)
        seconds = passed / len(values)
        for (at, _), metrics in zip(self.pending, values, strict=True):
            record = {key: value.item() for key, value in metrics.items()}
            loss = self.summary.loss = record["loss"]
            if not math.isfinite(loss):
                raise UserError(f"{self.name} step {at}: loss is {loss}: lower learning_rate or look at the rows")
            self.step_seconds.append(seconds)
            self.summary.answer_tokens += int(record.pop("answer_tokens"))
            self.metrics.write({"step": at, **record, "step_seconds": seconds})
        self.metrics.flush()
        self.summary.tokens += tokens
        self.summary.seconds += passed
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens / passed:,.0f} tokens/s", refresh=False)
        self.bar.update(len(values))
        self.pending = []
        self.mark = time.perf_counter()

    def _probe(self) -> None:
        if not self.probe_batches and self.watch is None:
            return
        self._log()
        for rows, batch in self.probe_batches.items():
            loss, norm = self._call(probe, self.state["trainable"], self.frozen, batch, self.hyper.scale)
            self.probes.write({"step": self.done, "rows": rows, "loss": float(loss), "grad_norm": float(norm)})
        self.probes.flush()
        if self.watch is not None:
            self.watch(self.done, self.state["trainable"])
        self.mark = time.perf_counter()

    def _save(self) -> None:
        self._log()
        kept = {field: getattr(self.summary, field) for field in _KEPT}
        self.checkpoints.save(self.done, self.state, {"iterator": self.iterator.get_state(), "step": self.done, **kept})
        self.mark = time.perf_counter()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each is closed, whatever another one raises
            for part in (self.checkpoints, self.metrics, self.probes, self.bar):
                if part is not None:
                    stack.callback(part.close)
