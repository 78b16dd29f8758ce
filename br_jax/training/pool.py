"""Many users' adapters trained side by side over one base: jobs come, sit in slots, and leave.

Who sits where, in which order, and how long a pool step's rows are, follows from the jobs alone. What takes long to
read is waited for, or lets others pass by its size. So the same jobs give the same adapters, to the bit.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter, pad_rank
from br_jax.core.bounds import BATCH, require
from br_jax.core.errors import UserError, is_machine_fault
from br_jax.core.hosts import agree, fetch, is_main
from br_jax.core.mesh import batch_parts, make_mesh, platform, shard
from br_jax.core.progress import progress
from br_jax.core.records import key_of
from br_jax.models.model import Model
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.config import TrainConfig
from br_jax.training.folder import Folder, MetricWriter
from br_jax.training.jobs import Job, JobState, Outcome, Reading, Schedule, fill, fitting_lengths, step_shapes
from br_jax.training.loop import Loop
from br_jax.training.run import first_adapter, load_trained, run_identity, save_trained, trained_adapter
from br_jax.training.step import (
    Hyper,
    Stage,
    Turn,
    empty_state,
    first_state,
    frozen_collections,
    pool_step,
    put,
    take,
)  # fmt: skip

_LOOK = 0.5  # seconds that rows are waited for before those who listen are heard again
_LONG = 50  # steps that are worth a program for fewer slots
_NAME = "user"  # of each job's run, so that `train_user` in the job's folder finds it finished


class Pool(Loop):
    """Slots of one base and its frozen adapters, in which users' adapters are trained side by side.

    Args:
        model, config: the base, and the settings of all jobs but for what each sets for itself (`jobs.OWN`). `rank` and
            `max_length` are the most that a job may have; `accumulation` micro-batches make a step's rows fewer.
        frozen: adapters that are attached to the base for all.
        slots: users that are trained at once; the mesh's data and fsdp axes divide it, so that a user's adapter, its
            gradients and moments lie on one device (or its tensor group) and never cross.
        workdir: each job has a folder there, in which `train_user` would find its run finished; with one a stopped pool
            goes on, also with other slots or on another mesh.
        mesh: default: all devices on the data axis.

    Attributes:
        step: pool steps done.
        rate: tokens a second, padding not counted, between the last two looks at the device.

    Raises:
        UserError: slots that the mesh does not divide, settings that do not fit the model.
    """

    name, unit = "pool", "turn"

    def __init__(
        self,
        model: Model,
        config: TrainConfig,
        *,
        frozen: Mapping[str, Adapter] | None = None,
        slots: int = 8,
        workdir: str | pathlib.Path | None = None,
        mesh: Mesh | None = None,
    ):
        super().__init__()
        self.model, self.config, self.frozen = model, config, dict(frozen or {})
        self.mesh, self.workdir = mesh or make_mesh(), None if workdir is None else pathlib.Path(workdir)
        require("slots", slots, BATCH)
        if slots % (parts := batch_parts(self.mesh)):
            raise UserError(f"slots is {slots}: it must be a multiple of {parts}, the mesh's data and fsdp axes")
        for name, adapter in self.frozen.items():
            lora.require_base(adapter, model.fingerprint, f"pool, {name}")
            lora.validate(adapter, model.params)
        self.lengths, self.rows = step_shapes(config, platform(self.mesh))
        self._fitted = not config.packing  # whether the lengths are those of the rows that came
        self.stage = Stage.of(model.decoder, dataclasses.replace(config, accumulation=1), self.mesh)
        bank = jax.eval_shape(functools.partial(first_adapter, _NAME, "user", model, config))
        self._one = jax.eval_shape(functools.partial(first_state, seed=0), bank)
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", self._one)
        self._shapes = key_of(str(shapes), (self.lengths, self.rows))  # what a checkpoint must have to go on from it
        self._base = shard(frozen_collections(model.params, self.frozen, config.frozen), self.mesh)
        self._waiting: list[Reading] = []
        self._resting: dict[str, tuple[dict, dict]] = {}  # of a checkpoint: jobs that have no slot yet
        self.rate, self._tokens = 0.0, 0
        self.slots: list[JobState | None] = []
        self._most = slots  # while few are in training, there are fewer
        self._resize(slots)

    @property
    def users(self) -> dict[str, tuple[int, int, float]]:
        """(steps done, steps in all, last known loss) of those that sit in slots."""
        return {job.name: (job.step, job.total, job.loss) for job in self.slots if job}

    @property
    def unfinished(self) -> bool:
        """Whether anybody sits in a slot."""
        return any(self.slots)

    @property
    def idle(self) -> bool:
        """Whether nobody sits in a slot, or waits for one."""
        return not (self.unfinished or self._waiting)

    def train(self, jobs: Iterable[Job | None]) -> Iterator[list[Outcome]]:
        """Trains jobs as they come; yields after each pool step who left with it, also when there is nothing to do.

        `jobs` is asked for another whenever fewer than `slots` wait; None is "not now", and its end is the pool's.
        Those that an earlier call has left come before the first None, or begin anew. Raises as `Loop.run`.
        """
        self._source, self._more, self._not_now = iter(jobs), True, False
        yield from self.run()
        if self.checkpoints and is_main():
            shutil.rmtree(self.workdir / ".pool", ignore_errors=True)

    def begin(self) -> None:
        self._bar = progress(None, "pool", "turn", done=self.step)
        self.to_close.callback(self._bar.close)
        self.to_close.callback(self._let_go)
        if self.workdir is None:
            return
        folder = self.workdir / ".pool"
        self.checkpoints = Checkpoints(folder / "checkpoints")
        data = self.checkpoints.data()
        if data and data.get("shapes") != self._shapes:
            logging.warning("pool: its settings were changed: who was in training begins anew")
            self.checkpoints.close()
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
            self.checkpoints, data = Checkpoints(folder / "checkpoints"), None
        self.to_close.callback(self.checkpoints.close)
        if data:
            state = self.checkpoints.restore({f"job{i}": self._one for i in range(len(data["jobs"]))}, self.mesh)
            self.step = self.saved = data["turn"]
            self._set_lengths(data["lengths"])
            self._resting = {job["name"]: (job, state[f"job{i}"]) for i, job in enumerate(data["jobs"])}

    def _let_go(self) -> None:
        """Closes folders and files of those in slots, each whatever another one raises."""
        with contextlib.ExitStack() as stack:
            for job in filter(None, self.slots):
                stack.push(job.held)

    def advance(self) -> Iterator[list[Outcome]]:
        while self._ask() or not self.idle:
            gone = []
            while None in self.slots and (first := self._first()):
                while not self._is_read(first):  # whoever is in training waits, too: time must not decide
                    yield gone
                    gone = []
                self._waiting.remove(first)
                gone += self._admit(first)
                if not self._not_now:  # it was room that lacked
                    self._ask()
            self._fit_slots()
            if self.unfinished:
                gone += self._step()
                self._bar.set_postfix_str(f"{len(self.users)} users", refresh=False)
                self._bar.update(1)
            yield gone

    def _ask(self) -> bool:
        """Asks for jobs while there is room to read ahead, for large ones apart; whether there will be more."""
        packing, share = self.lengths[-1] if self.config.packing else 0, platform(self.mesh) != "tpu"
        while self._more and max(len(self._ready), len(self._waiting) - len(self._ready)) < self._most:
            job = next(self._source, self)
            self._more, self._not_now = job is not self, job is None
            if job is None or job is self:
                # Jobs of a checkpoint that nobody has handed in again are let go.
                names = {each.job.name for each in self._waiting}
                self._resting = {name: rest for name, rest in self._resting.items() if name in names}
                break
            if not isinstance(job, Job):
                raise UserError(f"jobs: got a {type(job).__name__}: give br.Job(name, rows), or a dict of rows by name")
            self._waiting.append(Reading(job, self.step, self.config, self.model, packing, share))
        return self._more

    @property
    def _ready(self) -> list[Reading]:
        """Who has had its head start."""
        return [each for each in self._waiting if each.due <= self.step]

    def _first(self) -> Reading | None:
        """Who gets the next slot; where nobody is in training or ready, who will be soonest."""
        soonest = [] if self.unfinished else sorted(self._waiting, key=lambda each: each.due)
        return next(iter(self._ready or soonest), None)

    def _is_read(self, first: Reading) -> bool:
        """Whether its rows are read, or will be in a moment.

        Where rows are packed, also those of the first jobs: by them the lengths of steps are chosen, once, with longer
        ones up to the longest.
        """
        wanted = [first]
        if not self._fitted:
            wanted += [each for each in self._ready if each is not first][: self._most - 1]
        done, _ = concurrent.futures.wait([each.future for each in wanted], _LOOK)
        if not agree(len(done) == len(wanted)):
            return False
        if not self._fitted:
            read = [each.future.result() for each in wanted if not each.future.exception()]
            if needs := [need for job in read for need in job.needs()]:
                self._set_lengths(fitting_lengths(needs, self.lengths[-1], platform(self.mesh)))
        return True

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths, self._fitted = tuple(lengths), True
        self._schedule = Schedule(self.lengths, len(self.slots))

    def _admit(self, first: Reading) -> list[Outcome]:
        """Gives a free slot to a job; one that has finished, or is wrong, leaves at once."""
        name = first.job.name
        try:
            job = first.result()
            if name in self.users:
                raise UserError(f"job {name}: another of this name is being trained: give it another")
            rest = self._resting.pop(name, ({}, None))
            identity = run_identity(_NAME, self.model, job.rows_hash, job.config, self.frozen)
            if self.workdir is not None:
                job.folder = Folder(self.workdir / name / _NAME, identity)
                if not job.folder.finished:
                    job.held.enter_context(job.folder.begin())
                if job.folder.finished:
                    job.held.close()
                    return [Outcome(name, load_trained(job.folder.path, "user", self.model))]
            self._sit(self.slots.index(None), job, key_of(identity), *rest)
        except (UserError, OSError) as error:
            if is_machine_fault(error):
                raise
            return [Outcome(name, None, str(error))]
        return []

    def _sit(self, slot: int, job: JobState, identity: str, cursor: dict, state: dict | None) -> None:
        """Puts a job into a slot, where it left off if it was there before."""
        job.identity = identity
        if cursor.get("identity") == identity:
            for field in ("step", "row", "tokens", "answer_tokens"):
                setattr(job, field, cursor[field])
        else:
            first = first_adapter(_NAME, "user", self.model, job.config)
            state = first_state(pad_rank(first, self.config.rank), job.config.seed)
        self.state = put(self.state, np.int32(slot), shard(state, self.mesh))
        folder = job.folder.path if job.folder and is_main() else None
        job.metrics = MetricWriter(folder, "metrics.jsonl", job.step)
        job.held.callback(job.metrics.close)
        self.slots[slot] = job

    def _leave(self, slot: int) -> Outcome:
        """Takes a job out of its slot."""
        job, self.slots[slot] = self.slots[slot], None
        with job.held:
            if job.wrong:
                return Outcome(job.name, None, job.wrong)
            trained = jax.device_get(fetch(take(self.state, np.int32(slot))["trainable"]))
            adapter = trained_adapter(first_adapter(_NAME, "user", self.model, job.config), trained)
            try:
                lora.require_finite(adapter)
            except UserError as error:
                return Outcome(job.name, None, f"job {job.name}: {error}")
            if job.folder:
                output = save_trained(job.folder.path, self.model, adapter, self.frozen)
                cost = {"steps": job.total, "tokens": job.tokens, "answer_tokens": job.answer_tokens, "loss": job.loss}
                job.folder.finish({**cost, **job.counts, "output": output})
            return Outcome(job.name, adapter)

    def _fit_slots(self) -> None:
        """Halves the slots while half of them would do for long, and has all of them again when somebody waits."""
        taken = [job for job in self.slots if job]
        half, few = len(self.slots) // 2, len(self.slots) < self._most
        spare = not self._waiting and 0 < len(taken) <= half and half % batch_parts(self.mesh) == 0
        if few and self._waiting and len(taken) == len(self.slots):
            self._resize(self._most)
        elif spare and max(job.total - job.step for job in taken) >= _LONG:
            self._resize(half)

    def _resize(self, slots: int) -> None:
        """Moves all to the first of so many slots."""
        self.log()
        state = shard(empty_state(self._one, slots), self.mesh)
        taken = [(slot, job) for slot, job in enumerate(self.slots) if job]
        for to, (slot, _) in enumerate(taken):
            state = put(state, np.int32(to), take(self.state, np.int32(slot)))
        self.state, self._schedule = state, Schedule(self.lengths, slots)
        self.slots = [job for _, job in taken] + [None] * (slots - len(taken))

    def _step(self) -> list[Outcome]:
        """One pool step of all slots; returns who left with it."""
        slots = list(self.slots)
        length = self._schedule.choose([job.need if job else 0 for job in slots])
        taken = [job.take(length, self.rows) if job else None for job in slots]
        hypers = [Hyper.of(job.config) if job else Hyper(*[np.float32(0)] * 4) for job in slots]
        rates = np.float32([each.rate if each else 0 for each in taken])
        hyper = jax.tree.map(lambda *values: np.stack(values), *hypers)._replace(learning_rate=rates)
        flags = [np.array([bool(each and getattr(each, name)) for each in taken]) for name in ("restart", "due")]
        batch = shard(fill(taken, length, self.rows), self.mesh)
        self.state, metrics = self.call(pool_step, self.state, self._base, batch, Turn(hyper, *flags))
        ended = [(i, slots[i], slots[i].step, each.rate) for i, each in enumerate(taken) if each and each.due]
        self._tokens += sum(len(row["tokens"]) for each in taken if each for row in each.rows)
        self.pending.append((ended, metrics))
        self.step += 1
        if len(self.pending) >= self.config.log_every or any(job.done for _, job, *_ in ended):
            self.log()
        return [self._leave(slot) for slot, job in enumerate(slots) if job and (job.wrong or job.done)]

    def record(self, pending: list[tuple[list, dict]]) -> None:
        values = jax.device_get(fetch([metrics for _, metrics in pending]))
        for (ended, _), metrics in zip(pending, values, strict=True):
            for slot, job, step, rate in ended:
                loss, norm = float(metrics["loss"][slot]), float(metrics["grad_norm"][slot])
                if not math.isfinite(loss) and not job.wrong:
                    cure = "lower learning_rate or look at the rows"
                    job.wrong = f"job {job.name} step {step}: loss is {loss}: {cure}"
                if not job.wrong:
                    job.loss = loss
                    job.metrics.write({"step": step, "loss": loss, "grad_norm": norm, "learning_rate": float(rate)})
        for job in filter(None, self.slots):
            job.metrics.flush()
        now = time.perf_counter()
        self.rate, self._tokens, self.mark = self._tokens / max(now - self.mark, 1e-9), 0, now

    def snapshot(self) -> tuple[dict, dict] | None:
        """Nothing where all have left, whose folders say so: Orbax writes no empty item."""
        fields = ("name", "identity", "step", "row", "tokens", "answer_tokens")
        rests = [
            ({field: getattr(job, field) for field in fields}, take(self.state, np.int32(slot)))
            for slot, job in enumerate(self.slots)
            if job and not job.wrong
        ]
        rests += self._resting.values()
        where = {"turn": self.step, "lengths": self.lengths, "shapes": self._shapes}
        states = {f"job{i}": state for i, (_, state) in enumerate(rests)}
        return (states, {**where, "jobs": [cursor for cursor, _ in rests]}) if rests else None
