"""The loop round the turn: jobs come, sit in slots, and leave with an adapter or with a line that says why not."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter, pad_rank
from br_jax.core.errors import Stopped, UserError
from br_jax.core.hashes import key_of
from br_jax.core.hosts import StopSignal, agree, fetch, is_main
from br_jax.core.io import is_of_the_machine, writing
from br_jax.core.mesh import batch_parts, make_mesh, place, platform
from br_jax.core.progress import progress
from br_jax.models.model import Model
from br_jax.pool.jobs import Course, Job, Outcome, Taken
from br_jax.pool.reading import aside, result
from br_jax.pool.schedule import Schedule
from br_jax.pool.shapes import fill, fitting_lengths, turn_shapes
from br_jax.pool.step import Turn, begin, empty_state, pool_turn, put, take
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.config import TrainConfig
from br_jax.training.folder import Folder
from br_jax.training.metrics import MetricWriter
from br_jax.training.run import first_adapter, load_trained, run_identity, save_trained, trained_adapter
from br_jax.training.stage import Hyper, Stage, frozen_collections

_FIRST, _REST = 30, 2  # seconds that half of the first jobs are waited for, then the rest, to see their rows' lengths
_LOOK = 0.5  # seconds that rows are waited for before those who listen are heard again
_LONG = 50  # steps that are worth a program for fewer slots
_NAME = "user"  # of each job's run, so that `train_user` in the job's folder finds it finished


@dataclasses.dataclass
class _Seat:
    """Who sits in a slot."""

    course: Course
    folder: Folder | None
    held: contextlib.ExitStack  # the folder's lock, and its metrics
    metrics: MetricWriter
    tokens: int = 0
    answer_tokens: int = 0
    loss: float = math.nan
    wrong: str = ""  # why it must go


class Pool:
    """Slots of one base and its frozen adapters, in which users' adapters are trained side by side.

    Args:
        model, config: the base, and the settings of all jobs but for what each sets for itself (`jobs.OWN`). `rank` and
            `max_length` are the most that a job may have; `accumulation` micro-batches make a turn's rows fewer.
        frozen: adapters that are attached to the base for all.
        slots: users that are trained at once; the mesh's data and fsdp axes divide it, so that a user's adapter, its
            gradients and moments lie on one device (or its tensor group) and never cross.
        workdir: each job has a folder there, in which `train_user` would find its run finished; with one a stopped pool
            goes on, also with other slots or on another mesh.
        mesh: default: all devices on the data axis.

    Raises:
        UserError: slots that the mesh does not divide, settings that do not fit the model.
    """

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
        self.model, self.config, self.frozen = model, config, dict(frozen or {})
        self.mesh = make_mesh() if mesh is None else mesh
        if slots < 1 or slots % (parts := batch_parts(self.mesh)):
            raise UserError(f"slots is {slots}: it must be a multiple of {parts}, the mesh's data and fsdp axes")
        for name, adapter in self.frozen.items():
            lora.require_base(adapter, model.fingerprint, f"pool, {name}")
            lora.validate(adapter, model.params)
        self.slots = slots
        self.workdir = None if workdir is None else pathlib.Path(workdir)
        self.lengths, self.rows = turn_shapes(config, platform(self.mesh))
        self._fitted = not config.packing  # whether the lengths are those of the rows that came
        self._stage = Stage.of(model.decoder, dataclasses.replace(config, accumulation=1), self.mesh)
        bank = jax.eval_shape(functools.partial(first_adapter, _NAME, "user", model, config))
        self._one = jax.eval_shape(functools.partial(begin, seed=0), bank)
        self._base = place(frozen_collections(model.params, self.frozen, config.frozen), self.mesh)
        self._waiting: collections.deque[tuple[Job, concurrent.futures.Future]] = collections.deque()
        self._pending: list[tuple[list, dict]] = []
        self._resting: dict[str, tuple[dict, dict]] = {}  # of a checkpoint: jobs that have no slot yet
        self._checkpoints, self.turn, self._saved = None, 0, 0  # the last: the turn of the newest checkpoint
        self.rate = 0.0  # tokens a second, padding not counted, between the last two looks at the device
        self._tokens, self._mark = 0, time.perf_counter()
        self._seats: list[_Seat | None] = []
        self._resize(slots)

    @property
    def users(self) -> dict[str, tuple[int, int, float]]:
        """(steps done, steps in all, last known loss) of those that sit in slots."""
        seats = [seat for seat in self._seats if seat]
        return {seat.course.job.name: (seat.course.step, seat.course.total, seat.loss) for seat in seats}

    @property
    def idle(self) -> bool:
        """Whether nobody sits in a slot, or waits for one."""
        return not (any(self._seats) or self._waiting)

    def turns(self, jobs: Iterable[Job | None]) -> Iterator[list[Outcome]]:
        """Trains jobs as they come.

        Args:
            jobs: asked for another whenever fewer than `slots` wait; None is "not now", and its end is the pool's.
                Those that an earlier call has left come before the first None, or begin anew.

        Yields:
            After each turn, who left with it; and so when there is nothing to do.

        Raises:
            Stopped: SIGTERM came; where there is a workdir, what was reached is saved.
            UserError: a disk that is full.
        """
        place_of = self.workdir and self.workdir / ".pool"
        with contextlib.closing(self), writing(place_of, "free space, then run again"), jax.set_mesh(self.mesh):
            self._open(place_of)
            source, more = iter(jobs), True
            with StopSignal() as stop, progress(None, "pool", "turn", done=self.turn) as bar:
                while more or not self.idle:
                    while more and len(self._waiting) < self.slots:
                        job = next(source, stop)
                        more = job is not stop
                        if job is stop or job is None:
                            self._forget()
                            break
                        self._waiting.append((job, aside(functools.partial(self._read, job))))
                    gone = self._admit()
                    self._fit()
                    if any(self._seats):
                        gone += self._turn()
                        bar.set_postfix_str(f"{len(self.users)} users", refresh=False)
                        bar.update(1)
                    self._save_if_due(stop.asked())
                    yield gone
            if self._checkpoints and is_main():
                self._checkpoints.close()
                shutil.rmtree(place_of, ignore_errors=True)

    # -- who comes and goes ----------------------------------------------------------------------------------------

    def _read(self, job: Job) -> Course:
        packing, share = self.lengths[-1] if self.config.packing else 0, platform(self.mesh) != "tpu"
        return Course.of(job, job.config(self.config), self.model, packing, share)

    def _admit(self) -> list[Outcome]:
        """Gives free slots to those whose rows are read, in the order of their coming; who is done needs none."""
        gone = []
        while self._waiting and None in self._seats:
            if not any(self._seats):
                waiting = [future for _, future in self._waiting]
                concurrent.futures.wait(waiting, _LOOK, return_when=FIRST_COMPLETED)
            if not self._fitted:
                self._fit_lengths()
            ready = agree([future.done() for _, future in self._waiting])
            if True not in ready:
                break
            job, future = self._waiting[ready.index(True)]
            del self._waiting[ready.index(True)]
            try:
                adapter = self._sit(self._seats.index(None), result(job, future))
            except UserError as error:
                if is_of_the_machine(error):
                    raise
                gone.append(Outcome(job.name, None, str(error)))
            else:
                gone += [Outcome(job.name, adapter)] if adapter else []
        return gone

    def _sit(self, slot: int, course: Course) -> Adapter | None:
        """Puts a job into a slot, where it left off if it was there before; returns its adapter if it has finished."""
        job, config, held = course.job, course.config, contextlib.ExitStack()
        if any(seat and seat.course.job.name == job.name for seat in self._seats):
            raise UserError(f"job {job.name}: another of this name is being trained: give it another")
        identity = run_identity(_NAME, self.model, course.rows_hash, config, self.frozen)
        folder, (cursor, state) = None, self._resting.pop(job.name, ({}, None))
        if self.workdir is not None:
            folder = Folder(self.workdir / job.name / _NAME, identity)
            if not folder.finished:
                held.enter_context(folder.begin())
            if folder.finished:
                held.close()
                return load_trained(folder.path, "user", self.model)
        known = key_of(identity)
        if cursor.get("identity") == known:
            course.step, course.row = cursor["step"], cursor["row"]
        else:
            first = first_adapter(_NAME, "user", self.model, config)
            cursor, state = {}, begin(pad_rank(first, self.config.rank), config.seed)
        self._state = put(self._state, np.int32(slot), place(state, self.mesh))
        metrics = MetricWriter(folder.path if folder and is_main() else None, "metrics.jsonl", course.step)
        held.callback(metrics.close)
        kept = {name: cursor[name] for name in ("tokens", "answer_tokens") if name in cursor}
        course.identity = known
        self._seats[slot] = _Seat(course, folder, held, metrics, **kept)
        return None

    def _leave(self, slot: int) -> Outcome:
        """Takes a job out of its slot."""
        seat, self._seats[slot] = self._seats[slot], None
        job, config = seat.course.job, seat.course.config
        with seat.held:
            if seat.wrong:
                return Outcome(job.name, None, seat.wrong)
            trained = jax.device_get(fetch(take(self._state, np.int32(slot))["trainable"]))
            adapter = trained_adapter(first_adapter(_NAME, "user", self.model, config), trained)
            try:
                lora.require_finite(adapter)
            except UserError as error:
                return Outcome(job.name, None, f"job {job.name}: {error}")
            if seat.folder:
                output = save_trained(seat.folder.path, self.model, adapter, self.frozen)
                cost = {"steps": seat.course.total, "tokens": seat.tokens, "answer_tokens": seat.answer_tokens}
                seat.folder.finish({**cost, "loss": seat.loss, **seat.course.counts, "output": output})
            return Outcome(job.name, adapter)

    def _fit_lengths(self) -> None:
        """Chooses the lengths of turns by the packed rows of the first jobs, with longer ones up to the longest."""
        first = [future for _, future in itertools.islice(self._waiting, self.slots)]
        with contextlib.suppress(TimeoutError):
            list(itertools.islice(concurrent.futures.as_completed(first, _FIRST), -(-len(first) // 2)))
        concurrent.futures.wait(first, _REST)
        read = agree([future.done() and not future.exception() for future in first])
        needs = [need for future, here in zip(first, read, strict=True) if here for need in future.result().needs()]
        if needs:
            self._set_lengths(fitting_lengths(needs, self.lengths[-1], platform(self.mesh)))

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self.lengths, self._fitted = tuple(lengths), True
        self._schedule = Schedule(self.lengths, len(self._seats))

    def _fit(self) -> None:
        """Halves the slots while half of them would do for long, and has all of them again when somebody waits."""
        taken = [seat for seat in self._seats if seat]
        half, few = len(self._seats) // 2, len(self._seats) < self.slots
        spare = not self._waiting and 0 < len(taken) <= half and half % batch_parts(self.mesh) == 0
        if few and self._waiting and len(taken) == len(self._seats):
            self._resize(self.slots)
        elif spare and max(seat.course.total - seat.course.step for seat in taken) >= _LONG:
            self._resize(half)

    def _resize(self, slots: int) -> None:
        """Moves all to the first of so many slots."""
        self._log()
        state = place(empty_state(self._one, slots), self.mesh)
        taken = [(slot, seat) for slot, seat in enumerate(self._seats) if seat]
        for to, (slot, _) in enumerate(taken):
            state = put(state, np.int32(to), take(self._state, np.int32(slot)))
        self._state, self._schedule = state, Schedule(self.lengths, slots)
        self._seats = [seat for _, seat in taken] + [None] * (slots - len(taken))

    # -- turns -----------------------------------------------------------------------------------------------------

    def _turn(self) -> list[Outcome]:
        """One turn of all slots; returns who left with it."""
        seats = self._seats
        length = self._schedule.choose([seat.course.need if seat else 0 for seat in seats])
        taken = [seat.course.take(length, self.rows) if seat else None for seat in seats]
        batch = fill(taken, length, self.rows)
        self._state, metrics = pool_turn(
            self._stage, self._state, self._base, place(batch, self.mesh), self._as_turn(taken)
        )
        ended = [
            (slot, seats[slot], seats[slot].course.step, each.rate)
            for slot, each in enumerate(taken)
            if each and each.due
        ]
        for seat, each in zip(seats, taken, strict=True):
            for row in each.rows if each else ():
                seat.tokens += len(row["tokens"])
                self._tokens += len(row["tokens"])
                seat.answer_tokens += int(np.count_nonzero(row["weights"]))
        self._pending.append((ended, metrics))
        self.turn += 1
        if len(self._pending) >= self.config.log_every or any(seat.course.done for _, seat, *_ in ended):
            self._log()
        return [self._leave(slot) for slot, seat in enumerate(seats) if seat and (seat.wrong or seat.course.done)]

    def _as_turn(self, taken: list[Taken | None]) -> Turn:
        hypers = [Hyper.of(seat.course.config) if seat else Hyper(*[np.float32(0)] * 4) for seat in self._seats]
        rates = np.float32([each.rate if each else 0 for each in taken])
        hyper = jax.tree.map(lambda *values: np.stack(values), *hypers)._replace(learning_rate=rates)
        flags = [np.array([bool(each and getattr(each, name)) for each in taken]) for name in ("restart", "due")]
        return Turn(hyper, *flags)

    def _log(self) -> None:
        """Fetches what is pending: the one place where the host waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        values = jax.device_get(fetch([metrics for _, metrics in pending]))
        for (ended, _), metrics in zip(pending, values, strict=True):
            for slot, seat, step, rate in ended:
                loss, norm = float(metrics["loss"][slot]), float(metrics["grad_norm"][slot])
                if not math.isfinite(loss) and not seat.wrong:
                    cure = "lower learning_rate or look at the rows"
                    seat.wrong = f"job {seat.course.job.name} step {step}: loss is {loss}: {cure}"
                if seat.wrong:
                    continue
                seat.loss = loss
                seat.metrics.write({"step": step, "loss": loss, "grad_norm": norm, "learning_rate": float(rate)})
        for seat in filter(None, self._seats):
            seat.metrics.flush()
        now = time.perf_counter()
        self.rate, self._tokens, self._mark = self._tokens / max(now - self._mark, 1e-9), 0, now

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _open(self, folder: pathlib.Path | None) -> None:
        if folder is None:
            return
        self._checkpoints = Checkpoints(folder / "checkpoints")
        data = self._checkpoints.data()
        if data is None:
            return
        if data.get("shapes") != self._shapes:
            logging.warning("pool: its settings were changed: who was in training begins anew")
            self._checkpoints.close()
            if is_main():
                shutil.rmtree(folder, ignore_errors=True)
            self._checkpoints = Checkpoints(folder / "checkpoints")
            return
        abstract = {f"job{i}": self._one for i in range(len(data["jobs"]))}
        state, _ = self._checkpoints.restore(abstract, self.mesh)
        self.turn = self._saved = data["turn"]
        self._set_lengths(data["lengths"])
        self._resting = {job["name"]: (job, state[f"job{i}"]) for i, job in enumerate(data["jobs"])}

    @property
    def _shapes(self) -> str:
        """A hash of what a checkpoint must have for this pool to go on from it."""
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{leaf.shape}", self._one)
        return key_of(str(shapes), turn_shapes(self.config, platform(self.mesh)))

    def _forget(self) -> None:
        """Lets go of jobs of a checkpoint that nobody has handed in again."""
        waiting = {job.name for job, _ in self._waiting}
        self._resting = {name: rest for name, rest in self._resting.items() if name in waiting}

    def _save_if_due(self, stopped: bool) -> None:
        every = self.config.checkpoint_every
        due = stopped or (every and self.turn % every == 0 and any(self._seats))
        if due and self._checkpoints and self.turn != self._saved:
            self._save()
        if stopped:
            after = "the same call goes on from there" if self._checkpoints else "without a workdir, all is lost"
            raise Stopped(f"pool: stopped by SIGTERM at turn {self.turn}: {after}")

    def _save(self) -> None:
        self._log()
        jobs, states = [], []
        for slot, seat in enumerate(self._seats):
            if seat and not seat.wrong:
                course = seat.course
                place_ = {"name": course.job.name, "identity": course.identity, "step": course.step, "row": course.row}
                jobs.append({**place_, "tokens": seat.tokens, "answer_tokens": seat.answer_tokens})
                states.append(take(self._state, np.int32(slot)))
        for cursor, state in self._resting.values():
            jobs.append(cursor)
            states.append(state)
        if not jobs:  # all have left, whose folders say so; Orbax writes no empty item
            return
        self._saved = self.turn
        named = {f"job{i}": state for i, state in enumerate(states)}
        where = {"turn": self.turn, "lengths": self.lengths, "shapes": self._shapes}
        self._checkpoints.save(self.turn, named, {**where, "jobs": jobs})

    def close(self) -> None:
        """Lets go of folders and files."""
        with contextlib.ExitStack() as stack:
            for seat in filter(None, self._seats):
                stack.push(seat.held)
            if self._checkpoints:
                stack.callback(self._checkpoints.close)
