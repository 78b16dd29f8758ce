"""The loop round the step: data in, progress and metrics out, checkpoints between; resumes exactly."""

import contextlib
import dataclasses
import math
import pathlib
import statistics
import time

import jax

from br_jax.data.batches import iterate
from br_jax.errors import UserError
from br_jax.progress import progress
from br_jax.sharding import place, shardings
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.config import TrainConfig
from br_jax.training.metrics import MetricWriter
from br_jax.training.step import Compiled


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


def on_mesh(batch: dict, mesh) -> dict:
    """A host batch (this process's rows) as global arrays with their shardings."""
    places = shardings(batch, mesh)
    return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, x), batch, places)


def fit(
    name: str,
    step: Compiled,
    state: dict,
    frozen: dict,
    batches,
    config: TrainConfig,
    mesh,
    *,
    folder: pathlib.Path | None = None,
    probe: Compiled | None = None,
    probe_batches: dict[str, dict] | None = None,
) -> tuple[dict, Summary]:
    """Trains for `len(batches)` steps.

    Args:
        name: shown on the progress bar.
        step: compiled `make_step`.
        state: the initial state; donated.
        frozen: frozen collections, placed on the mesh.
        batches: a finite `grain.MapDataset` of numpy batches, one a step.
        config: intervals of logging, probing and checkpoints.
        mesh: where batches go.
        folder: gets metrics.jsonl, probes.jsonl and checkpoints/; a run that was stopped goes on from there.
        probe: compiled `make_probe`.
        probe_batches: named batches that the probe looks at every `config.probe_every` steps and at both ends.

    Returns:
        The final state and what it cost.

    Raises:
        UserError: a loss that is not finite, or a disk that is full.
    """
    try:
        run = _Run(name, step, place(state, mesh), frozen, batches, config, mesh, folder, probe, probe_batches or {})
        with contextlib.closing(run):
            return run.train()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}): free space, then run again"
        ) from error


class _Run:
    """The moving parts of one `fit`."""

    def __init__(self, name, step, state, frozen, batches, config, mesh, folder, probe, probe_batches):
        self.step, self.state, self.frozen, self.config, self.mesh = step, state, frozen, config, mesh
        self.probe = probe
        self.probe_batches = {key: on_mesh(batch, mesh) for key, batch in probe_batches.items()}
        self.total = len(batches)
        self.iterator = iterate(batches)
        self.summary = Summary(self.total)
        self.done = 0
        self.pending = []  # metrics still on the device, with the step and tokens they belong to
        self.step_seconds = []
        self.metrics = self.probes = self.checkpoints = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.checkpoints = Checkpoints(folder / "checkpoints")
            self._resume()
            self.metrics = MetricWriter(folder / "metrics.jsonl", self.done)
            # The probe at a checkpoint's own step comes after it was saved: it is made again.
            self.probes = MetricWriter(folder / "probes.jsonl", self.done - 1)
        self.bar = progress(self.total, name, "step", done=self.done)

    def _resume(self) -> None:
        restored = self.checkpoints.restore(self.state, self.mesh)
        if restored is None:
            return
        self.state, data_state = restored
        self.iterator.set_state(data_state["iterator"])
        self.done = data_state["step"]
        for field in ("tokens", "answer_tokens", "seconds", "compile_seconds"):
            setattr(self.summary, field, data_state[field])

    def train(self) -> tuple[dict, Summary]:
        config = self.config
        self.mark = time.perf_counter()
        while self.done < self.total:
            if self.done % config.probe_every == 0:
                self._probe()
            host = next(self.iterator)
            batch = on_mesh(host, self.mesh)
            self._warm(self.step, self.state, batch)
            self.state, metrics = self.step(self.state, self.frozen, batch)
            self.done += 1
            self.pending.append((self.done, int((host["segment_ids"] > 0).sum()), metrics))
            if self.done % config.log_every == 0 or self.done == self.total:
                self._log()
            if config.checkpoint_every and self.done % config.checkpoint_every == 0 and self.done < self.total:
                self._save()
        self._probe()
        self.summary.compiles = self.step.count
        if self.step_seconds:
            self.summary.step_seconds_median = statistics.median(self.step_seconds)
        return self.state, self.summary

    def _warm(self, function: Compiled, *args) -> None:
        """Compiles outside the step clock."""
        before, start = function.count, time.perf_counter()
        function.warm(args[0], self.frozen, args[-1])
        if function.count > before:
            self.summary.compile_seconds += time.perf_counter() - start
            self.mark += time.perf_counter() - start

    def _log(self) -> None:
        """Fetches what is pending: the one place where the host waits for the device."""
        values = jax.device_get([metrics for _, _, metrics in self.pending])
        now = time.perf_counter()
        seconds = (now - self.mark) / len(self.pending)
        tokens = sum(count for _, count, _ in self.pending)
        for (at, count, _), metrics in zip(self.pending, values, strict=True):
            record = {key: float(value) for key, value in metrics.items()}
            if not math.isfinite(record["loss"]):
                raise UserError(
                    f"{self.bar.desc} step {at}: loss is {record['loss']}: lower learning_rate or look at the rows"
                )
            self.step_seconds.append(seconds)
            self.summary.answer_tokens += int(record.pop("answer_tokens"))
            self.summary.loss = record["loss"]
            if self.metrics:
                self.metrics.write({"step": at, **record, "tokens": count, "step_seconds": seconds})
        self.summary.tokens += tokens
        self.summary.seconds += now - self.mark
        if self.metrics:
            self.metrics.flush()
        self.bar.set_postfix_str(
            f"loss {self.summary.loss:.3f}, {tokens / (now - self.mark):,.0f} tokens/s", refresh=False
        )
        self.bar.update(len(self.pending))
        self.pending = []
        self.mark = time.perf_counter()

    def _probe(self) -> None:
        if not self.probe_batches:
            return
        if self.pending:
            self._log()
        for rows, batch in self.probe_batches.items():
            loss, norm = self.probe(self.state["trainable"], self.frozen, batch)
            if self.probes:
                self.probes.write({"step": self.done, "rows": rows, "loss": float(loss), "grad_norm": float(norm)})
        if self.probes:
            self.probes.flush()
        self.mark = time.perf_counter()

    def _save(self) -> None:
        if not self.checkpoints:
            return
        if self.pending:
            self._log()
        cost = {f: getattr(self.summary, f) for f in ("tokens", "answer_tokens", "seconds", "compile_seconds")}
        self.checkpoints.save(self.done, self.state, {"iterator": self.iterator.get_state(), "step": self.done, **cost})
        self.mark = time.perf_counter()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each is closed, whatever another one raises
            for part in (self.checkpoints, self.metrics, self.probes, self.bar):
                if part is not None:
                    stack.callback(part.close)
