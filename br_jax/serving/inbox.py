"""The inbox: users' files are taken whole or not at all, and only as text.

A job is `NAME.jsonl`, and if there are settings `NAME.json`, which must be there first. A file is taken when it has not
changed for a while, so that one that is still being copied is left alone; hidden ones and those that end in .part or
.tmp are not looked at. What is taken is copied; the inbox itself is only read.
"""

import collections
import hashlib
import itertools
import os
import pathlib
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from br_jax.core.errors import UserError, is_machine_fault, one_line
from br_jax.core.io import make_private, parse_json, staged
from br_jax.core.records import key_of, read_record, write_record
from br_jax.serving.policy import Policy
from br_jax.training.jobs import NAME, NAMED

_JOB, _ROWS = "job.json", "rows.jsonl"
_LEFT_ALONE = (".part", ".tmp", ".json")
_MAX_SETTINGS = 1 << 16  # bytes of a NAME.json
_CHUNK = 1 << 20
_AGAIN = 100  # files that are done with, of which a scan looks whether they were changed


class Accepted(NamedTuple):
    """A job that was taken."""

    name: str
    number: int  # in the order of coming
    settings: dict[str, Any]
    rows: pathlib.Path  # our copy of the file
    sha256: str  # of it


class Refused(NamedTuple):
    """A file that is no job."""

    name: str  # of its folder in the outbox: no job's, for a job of that file may be running, or come yet
    file: str  # its own name, as Python would write it
    why: str


class _Later(Exception):
    """A file must wait until other jobs have ended."""


class _Seen(NamedTuple):
    inode: int
    size: int
    changed: int  # ns; its permissions too, so that a file that may be read now is looked at again
    settings: tuple[int, int] | None  # size and ns of the settings beside it


def sender_of(name: str) -> str:
    """Whose a job is: what its name has before the first dot."""
    return name.partition(".")[0]


class Inbox:
    """See the module.

    Args:
        folder: the inbox.
        jobs: where accepted jobs are kept, a folder each.
        settle: seconds for which a file must not have changed.
    """

    def __init__(self, folder: str | os.PathLike, jobs: pathlib.Path, policy: Policy, settle: float = 2.0):
        self.folder, self._jobs, self._policy, self._settle = pathlib.Path(folder), jobs, policy, settle
        self._since: dict[str, tuple[_Seen, float]] = {}  # what a file was, and since when
        self._done: dict[str, _Seen] = {}  # what a file was that is done with; those looked at longest ago come first
        self._count = max((job.number for job in self.accepted()), default=0)
        self.unsettled = False  # whether the last scan left anything for the next

    def accepted(self) -> list[Accepted]:
        """All jobs that were ever taken, in the order of their coming."""
        found = []
        for place in self._jobs.glob(f"*/{_JOB}"):
            record = read_record(place, f"delete {place.parent} to have the file taken anew")
            rows = place.parent / _ROWS
            found.append(Accepted(place.parent.name, record["number"], record["settings"], rows, record["rows"]))
        return sorted(found, key=lambda job: job.number)

    def forget(self, name: str) -> None:
        """Deletes what a released job was made of: our copy of its rows, and what was trained on them.

        Its record stays, so that the same file is not taken again.
        """
        for rest in (self._jobs / name).glob("*"):
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
            elif rest.name != _JOB:
                rest.unlink()

    def scan(self, unfinished: Iterable[str] = ()) -> Iterator[Accepted | Refused]:
        """Takes as many new files as the quotas leave room for; none is reported twice.

        Files that are done with are looked at again a few a scan, so that a scan costs what is new.

        Args:
            unfinished: names of jobs that were taken and have not ended.
        """
        self.unsettled = False
        busy = collections.Counter(map(sender_of, unfinished))
        entries = {entry.name: entry for entry in os.scandir(self.folder)}
        for known in (self._since, self._done):
            for gone in known.keys() - entries.keys():
                del known[gone]
        again = list(itertools.islice(self._done, _AGAIN))
        due = [name for name in (*(entries.keys() - self._done.keys()), *again) if not name.endswith(_LEFT_ALONE)]
        due.sort(
            key=lambda name: (busy[sender_of(name.removesuffix(".jsonl"))], os.fsencode(name))
        )  # fewest jobs first
        for name in due:
            if name.startswith("."):
                continue
            try:
                status = entries[name].stat(follow_symlinks=False)
                own = entries.get(f"{name.removesuffix('.jsonl')}.json")
                settings = own and own.stat(follow_symlinks=False)
            except OSError:  # gone meanwhile
                continue
            stamp = (settings.st_size, settings.st_ctime_ns) if settings else None
            seen = _Seen(status.st_ino, status.st_size, status.st_ctime_ns, stamp)
            if self._done.pop(name, None) == seen:
                self._done[name] = seen  # behind all others
                continue
            before, since = self._since.get(name, (None, 0.0))
            if before != seen:
                self._since[name] = seen, time.monotonic()
            if before != seen or time.monotonic() - since < self._settle:
                self.unsettled = True
                continue
            try:
                found = self._take(name, status, busy)
            except _Later:
                self.unsettled = True
                continue
            self._done[name] = seen
            del self._since[name]
            if isinstance(found, Accepted):
                busy[sender_of(found.name)] += 1
            if found is not None:
                yield found

    def _take(self, file: str, status: os.stat_result, busy: collections.Counter) -> Accepted | Refused | None:
        """A file as a job, or why not; None for one that was taken before."""
        name, quotas, most = file.removesuffix(".jsonl"), self._policy.quotas, int(self._policy.quotas.megabytes * 1e6)
        valid = NAME.fullmatch(name) is not None
        try:
            if not stat.S_ISREG(status.st_mode):
                raise UserError("it is no regular file: hand in a file")
            if not file.endswith(".jsonl"):
                raise UserError("its name does not end in .jsonl: hand in one JSON object a line")
            if not valid:
                raise UserError(NAMED)
            if status.st_size > most:
                raise UserError(f"{status.st_size:,} bytes are too many, {most:,} are the most: split it")
            if (self._jobs / name).exists():
                digest = _copy(self.folder / file, most)
                if digest != read_record(self._jobs / name / _JOB)["rows"]:
                    cure = "give it another name"
                    raise UserError(f"job {name} was handed in before, with other rows ({digest[:8]}): {cure}")
                return None
            settings = self._settings(self.folder / f"{name}.json")
            if busy.total() >= quotas.waiting or busy[sender_of(name)] >= quotas.jobs:
                raise _Later
            with staged(self._jobs / name) as place:
                make_private(place)
                with open(place / _ROWS, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as copy:
                    digest = _copy(self.folder / file, most, copy)
                record = {"number": self._count + 1, "settings": settings, "rows": digest}
                write_record(place / _JOB, record)
            self._count += 1
            return Accepted(name, self._count, settings, self._jobs / name / _ROWS, digest)
        except (UserError, OSError) as error:
            if is_machine_fault(error):
                raise
            why = str(error)
            if isinstance(error, OSError):
                why = f"it cannot be read ({error.strerror or one_line(error)}): check it"
            return Refused(f"{name[:80] if valid else ''}+refused-{key_of(file, why)[:12]}", ascii(file), why)

    def _settings(self, path: pathlib.Path) -> dict[str, Any]:
        """What NAME.json asks for; nothing where there is none."""
        if not os.path.lexists(path):
            return {}
        text = b"".join(_read(path, _MAX_SETTINGS)).decode("utf-8", "replace")
        asked = parse_json(text, path.name, "write one JSON object")
        if not isinstance(asked, dict):
            raise UserError(f"{path.name} holds no JSON object: write one, with settings by name")
        return self._policy.settings(asked)


def _copy(path: pathlib.Path, most: int, to: BinaryIO | None = None) -> str:
    """The SHA-256 of a file, which is copied on the way."""
    digest = hashlib.sha256()
    for part in _read(path, most):
        digest.update(part)
        if to:
            to.write(part)
    return digest.hexdigest()


def _read(path: pathlib.Path, most: int) -> Iterator[bytes]:
    """The bytes of a regular file that is no link and does not change while it is read."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOFOLLOW)) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise UserError(f"{path.name} is no regular file: hand in a file")
        if before.st_size > most:
            raise UserError(f"{path.name}: {before.st_size:,} bytes are too many, {most:,} are the most")
        left = before.st_size
        while left > 0 and (part := file.read(min(left, _CHUNK))):
            left -= len(part)
            yield part
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path.name} changed while it was read: hand in a whole file, by renaming it")
