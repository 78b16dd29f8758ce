"""A provider's service: jobs from an inbox through the pool, the merge and the gate into an outbox.

The outbox holds NAME/released (an adapter in PEFT's layout) with card.md, or NAME/held.json with the reason, and for a
file that is no job NAME+refused-.../held.json; each appears whole. All else is in its .service/, for the owner alone:
accepted rows, runs, answers, the audit log and status.json. Whatever the moment it is killed at, the next service on
the same folders goes on: no job is lost, or ends twice.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.adapters.peft import load_adapter
from br_jax.calibration import Calibration, calibrate
from br_jax.core.errors import UserError, is_machine_fault
from br_jax.core.io import make_private, owned, read_json, reserved, staged, write_json, write_text
from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.data.rows import Row, read_rows
from br_jax.method import require_parts
from br_jax.models.model import Model
from br_jax.provider import RECORDED_ADAPTERS, export_adapter, load_model, load_recorded, read_provider
from br_jax.scoring.judges import get_judge
from br_jax.scoring.judges.base import Judge
from br_jax.serving.gate import Candidate, Finding, inspect
from br_jax.serving.inbox import Accepted, Inbox, Refused
from br_jax.serving.policy import Policy
from br_jax.serving.reports import Audit, release_card
from br_jax.training.jobs import Job, Outcome
from br_jax.training.pool import Pool
from br_jax.training.run import run_identity

RELEASED, HELD, CARD = "released", "held.json", "card.md"
_PATIENCE = 16  # turns that a trained adapter waits for others to be looked at with


class Provider(NamedTuple):
    """What a provider's folder gives: the guarded base, and its two adapters."""

    model: Model
    buffer: Adapter
    reinforce: Adapter


def load_provider(folder: str | os.PathLike, matmul_precision: str = "float32") -> Provider:
    """The base of a provider's folder with its guard, and the Buffer and Reinforce that it records.

    Raises:
        UserError: as `load_model`; or it has no Buffer, or no Reinforce.
    """
    folder = pathlib.Path(folder)
    record = read_provider(folder)
    for name in RECORDED_ADAPTERS:
        if name not in record:
            raise UserError(f"{folder}: has no {name} yet: run the provider's stages first")
    model = load_model(folder, matmul_precision=matmul_precision)
    return Provider(model, *(load_recorded(folder, name, record[name], model) for name in RECORDED_ADAPTERS))


def calibrate_users(
    provider: Provider,
    policy: Policy,
    users: Mapping[str, Adapter],
    judge: Judge | None,
    base_store: Store | None = None,
) -> tuple[dict[str, Calibration], dict[str, str]]:
    """(How Reinforce is merged into each user's adapter, why nothing is merged into others), both by name."""
    fit, refused = {}, {}
    for name, user in users.items():
        try:
            require_parts(provider.model, user, provider.reinforce)
        except UserError as error:
            refused[name] = str(error)
        else:
            fit[name] = user
    if not fit:
        return {}, refused
    prompts = policy.calibrate_harmful, policy.calibrate_benign
    judging = {"judge": judge, "about": policy.about, "base_store": base_store}
    sizes = {"batch_size": policy.batch_size, "answer_tokens": policy.answer_tokens, "together": len(fit)}
    found = calibrate(provider.model, fit, provider.reinforce, *prompts, policy.merge, **judging, **sizes)
    return found, refused


class Service:
    """See the module.

    Args:
        provider: see there.
        inbox, outbox: folders; this service alone works in them.
        once: ends when all that lies in the inbox is done, in place of waiting for more.
        settle: see `Inbox`.
    """

    def __init__(
        self,
        provider: Provider,
        inbox: str | os.PathLike,
        outbox: str | os.PathLike,
        policy: Policy,
        *,
        once: bool = False,
        settle: float = 2.0,
        slots: int | None = None,
    ):
        self.provider, self.policy = provider, policy
        self.outbox, self._once = pathlib.Path(outbox), once
        self._own = self.outbox / ".service"
        self._jobs = self._own / "jobs"
        self._inbox_folder, self._settle, self._slots = pathlib.Path(inbox), settle, slots or policy.slots
        self._judge = get_judge(policy.judge) if policy.judge else None
        self._accepted: dict[str, Accepted] = {}  # those that have not ended
        self._ready: dict[str, Adapter] = {}  # trained, and to be looked at
        self._waited = 0
        self._logged: set[tuple[str, str]] = set()  # (event, job)
        self.status: dict[str, Any] = {}

    def run(self) -> Iterator[dict]:
        """Serves.

        Yields:
            After each turn, and where there is nothing to do, its `status`.

        Raises:
            UserError: another service works in one of the folders; a full disk; a changed audit log.
            Stopped: SIGTERM came; the next service goes on.
        """
        if not self._inbox_folder.is_dir():
            raise UserError(f"{self._inbox_folder}: no such folder: make the inbox first")
        model, frozen = self.provider.model, {"buffer": self.provider.buffer}
        with contextlib.ExitStack() as stack:
            make_private(self._own)
            stack.enter_context(owned(self._own))
            stack.enter_context(reserved(self._inbox_folder))
            self._audit = Audit(self._own / "audit.jsonl")
            stack.callback(self._audit.close)
            self._open()
            pool = Pool(model, self.policy.train, frozen=frozen, slots=self._slots, workdir=self._jobs)
            before = 0
            for gone in pool.train(self._incoming()):
                for outcome in gone:
                    self._trained(outcome)
                self._waited += bool(self._ready)
                if len(self._ready) >= self._slots or self._waited >= _PATIENCE or (self._ready and pool.idle):
                    self._release()
                self._report(pool)
                yield self.status
                if pool.idle and pool.step == before:
                    time.sleep(min(0.2, self._settle))
                before = pool.step
            self._release()
            self._report(pool)
            yield self.status

    def _open(self) -> None:
        """Reads what an earlier service has left, and ends what it had begun to write."""
        for rest in [*self.outbox.glob(".*-*"), *self._jobs.glob(".*-*")]:  # of a kill in `staged`
            shutil.rmtree(rest, ignore_errors=True)
        self._answers = Store(self._own / "answers.jsonl")
        make_private(self._jobs)
        self._inbox = Inbox(self._inbox_folder, self._jobs, self.policy, self._settle)
        self._logged = {(entry["event"], entry["job"]) for entry in self._audit.entries}
        for folder in self.outbox.iterdir():
            if not folder.name.startswith("."):
                self._log_end(folder.name)
        for job in self._inbox.accepted():
            self._log("received", job.name, rows=job.sha256, settings=job.settings)
            if not self._is_done(job.name):
                self._accepted[job.name] = job
        # What was trained in another way and has not left begins anew: its run would be refused as another's.
        run = run_identity("user", self.provider.model, "", self.policy.train, {"buffer": self.provider.buffer})
        key, record = key_of(run, self.policy.held_back), self._own / "training.json"
        if record.exists() and read_json(record)["key"] != key:
            for name in self._accepted:
                shutil.rmtree(self._jobs / name / "user", ignore_errors=True)
        write_json(record, {"key": key})

    # -- the log ---------------------------------------------------------------------------------------------------

    def _log(self, event: str, job: str, **figures: Any) -> None:
        """Adds to the log what is not there yet."""
        if (event, job) not in self._logged:
            self._audit.write(event, job, **figures)
            self._logged.add((event, job))

    def _is_done(self, name: str) -> bool:
        """Whether the log says how it ended, as the outbox does."""
        return not self._logged.isdisjoint({("held", name), (RELEASED, name)})

    def _log_end(self, name: str) -> None:
        """Writes to the log what the outbox says of a job, once."""
        self._accepted.pop(name, None)
        held, card = self.outbox / name / HELD, self.outbox / name / "card.json"
        if held.exists():
            why = read_json(held)["why"]
            self._log("held", name, why=key_of(why)[:16], reasons=len(why))
        elif card.exists():
            record = read_json(card)
            figures = {kind: record["gate"][kind]["score"] for kind in ("answered", "over_refused", "degenerate")}
            self._log(RELEASED, name, adapter=record["released"], merge=record["merge"], **figures)
            self._inbox.forget(name)
        else:
            raise UserError(f"{self.outbox / name}: neither {HELD} nor a card is in it: take it away")

    # -- in --------------------------------------------------------------------------------------------------------

    def _incoming(self) -> Iterator[Job | None]:
        """The jobs that are left, then those that come; None where none has come."""
        yield from self._for_pool(list(self._accepted.values()))
        while True:
            # a few, so that training goes on
            came = list(itertools.islice(self._inbox.scan(self._accepted), self._slots))
            for job in came:
                if isinstance(job, Refused):
                    self._hold(job.name, {"why": [job.why], "file": job.file})
                elif self._is_done(job.name):  # its folder here was deleted, its file was not
                    self._inbox.forget(job.name)
                else:
                    self._accepted[job.name] = job
                    self._log("received", job.name, rows=job.sha256, settings=job.settings)
            yield from self._for_pool([job for job in came if job.name in self._accepted])
            if self._once and not came and not self._inbox.unsettled:
                return
            yield None

    def _for_pool(self, jobs: Sequence[Accepted]) -> Iterator[Job]:
        """Jobs for the pool; one whose settings the policy has since forbidden is held back.

        An adapter's scale, alpha / rank, stays the policy's where a user sets the rank alone.
        """
        train = self.policy.train
        for job in jobs:
            try:
                settings = self.policy.settings(job.settings)
            except UserError as error:
                self._hold(job.name, {"why": [str(error)]})
            else:
                if "rank" in settings:
                    settings = {"alpha": train.alpha * settings["rank"] / train.rank} | settings
                yield Job(job.name, _Rows(job, self.policy, held_back=False), settings, self.policy.quotas.tokens)

    # -- out -------------------------------------------------------------------------------------------------------

    def _trained(self, outcome: Outcome) -> None:
        if outcome.adapter is None:
            self._hold(outcome.name, {"why": [outcome.error]})
        else:
            self._log("trained", outcome.name, adapter=lora.fingerprint(outcome.adapter))
            self._ready[outcome.name] = outcome.adapter

    def _release(self) -> None:
        """Merges, looks and hands over all that is trained."""
        users, self._ready, self._waited = self._ready, {}, 0
        policy, model = self.policy, self.provider.model
        found, refused = calibrate_users(self.provider, policy, users, self._judge, self._answers)
        for name, why in refused.items():
            self._hold(name, {"why": [why]})
        if not found:
            return
        with contextlib.ExitStack() as stack:
            folders, candidates = {}, {}
            for name, one in found.items():
                folders[name] = stack.enter_context(staged(self.outbox / name))
                job = self._accepted[name]
                try:
                    merged = qr_merge(users[name], self.provider.reinforce, one.merge)
                    export_adapter(model, merged, folders[name] / RELEASED)
                    # what leaves is what was written
                    released = load_adapter(folders[name] / RELEASED, model.params, fingerprint=model.fingerprint)
                    rows = tuple(_Rows(job, policy, held_back=True))
                except UserError as error:
                    if is_machine_fault(error):
                        raise
                    _write_held(folders[name], {"why": [str(error)]})
                    continue
                length = job.settings.get("max_length", policy.train.max_length)
                candidates[name] = Candidate(released, users[name], rows, length)
            for name, finding in inspect(model, candidates, policy, self._answers, self._judge).items():
                self._write(folders[name], self._accepted[name], candidates[name], found[name].merge, finding)
        for name in found:
            self._log_end(name)

    def _write(
        self, folder: pathlib.Path, job: Accepted, candidate: Candidate, merge: MergeConfig, finding: Finding
    ) -> None:
        trained = self._jobs / job.name / "user" / "stage.json"
        record = {
            "job": job.name,
            "rows": job.sha256,
            "settings": job.settings,
            "policy": self.policy.key,
            "base": self.provider.model.fingerprint,
            "user": lora.fingerprint(candidate.user),
            "merge": dataclasses.asdict(merge),
            "training": read_json(trained) if trained.exists() else {},
            "gate": finding.figures,
        }
        if finding.passed:
            record["released"] = lora.fingerprint(candidate.released)
            write_text(folder / CARD, release_card(record, self.policy))
            write_json(folder / "card.json", record)
        else:
            _write_held(folder, record | {"why": list(finding.why)})

    def _hold(self, name: str, record: Mapping) -> None:
        """Writes into the outbox why there is nothing, but once: what was written may have been collected."""
        if not self._is_done(name):
            with staged(self.outbox / name) as folder:
                _write_held(folder, record)
            self._log_end(name)

    def _report(self, pool: Pool) -> None:
        users = {
            name: {"step": step, "of": total, "loss": loss if math.isfinite(loss) else None}  # JSON has no NaN
            for name, (step, total, loss) in pool.users.items()
        }
        ends = collections.Counter(event for event, _ in self._logged)
        status = {
            "turn": pool.step,
            "tokens_per_second": pool.rate,
            "training": users,
            "to_be_looked_at": list(self._ready),
            "waiting": [name for name in self._accepted if name not in users and name not in self._ready],
            RELEASED: ends[RELEASED],
            "held": ends["held"],
        }
        if status != self.status:
            self.status = status
            write_json(self._own / "status.json", status, durable=False)  # each turn


def _write_held(folder: pathlib.Path, record: Mapping) -> None:
    """Writes why there is nothing in place of the release, of which nothing is left."""
    if (folder / RELEASED).exists():
        shutil.rmtree(folder / RELEASED)
    write_json(folder / HELD, dict(record))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of an accepted file that are trained on, or those that are held back; read when they are asked for."""

    job: Accepted
    policy: Policy
    held_back: bool

    @property
    def size(self) -> int:
        """Bytes of its file: while a large one is read, a pool lets others pass."""
        return self.job.rows.stat().st_size

    def __iter__(self) -> Iterator[Row]:
        quotas = self.policy.quotas
        try:
            rows = read_rows(self.job.rows, max_rows=quotas.rows + 1)
        except UserError as error:  # by the name that its sender knows
            raise UserError(str(error).replace(str(self.job.rows), f"{self.job.name}.jsonl")) from error
        if len(rows) > quotas.rows:
            raise UserError(f"more than {quotas.rows:,} rows, which are the most: split the file")
        kept = set(_held_back(rows, self.policy.count_held_back(len(rows))))
        for i, row in enumerate(rows):
            if (i in kept) == self.held_back:
                yield dataclasses.replace(row, origin=f"line {row.origin.rpartition(':')[2]}")


def _held_back(rows: Sequence[Row], count: int) -> list[int]:
    """Which rows are held back: by a hash of what they say, so that it is the same whenever it is asked."""
    return sorted(range(len(rows)), key=lambda i: key_of(rows[i].turns, rows[i].input))[:count]
