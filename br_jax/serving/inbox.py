"""The inbox: users' files as they come, taken whole or not at all, and nothing of them but text is believed.

A job is `NAME.jsonl`, and if there are settings `NAME.json`, which must be there first. A file is taken when it has not
changed for a while, so that one that is still being copied is left alone; hidden ones and those that end in .part or
.tmp are not looked at. What is taken is copied; the inbox itself is only read.
"""

import collections
import hashlib
import os
import pathlib
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from br_jax.core.errors import UserError, one_line
from br_jax.core.hashes import key_of
from br_jax.core.io import is_of_the_machine, make_private, parse_json, staged
from br_jax.core.records import read_record, write_record
from br_jax.serving.policy import Policy
from br_jax.training.jobs import NAME, NAMED

_JOB, _ROWS = "job.json", "rows.jsonl"
_UNFINISHED = (".part", ".tmp")
_MAX_SETTINGS = 1 << 16  # bytes of a NAME.json
_CHUNK = 1 << 20


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
        self._known: dict[str, _Seen] = {}  # files that are done with
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

        What it was stays, so that the same file is not taken again.
        """
        for rest in (self._jobs / name).glob("*"):
            if rest.is_dir():
                shutil.rmtree(rest, ignore_errors=True)
            elif rest.name != _JOB:
                rest.unlink()

    def scan(self, unfinished: Iterable[str] = ()) -> Iterator[Accepted | Refused]:
        """Looks for new files, and takes as many as the quotas leave room for; nothing is said of the same file twice.

        Args:
            unfinished: names of jobs that were taken and have not ended.
        """
        self.unsettled = False
        busy = collections.Counter(map(sender_of, unfinished))
        try:
            entries = sorted(  # those first who have the fewest jobs
                os.scandir(self.folder),
                key=lambda entry: (busy[sender_of(entry.name.removesuffix(".jsonl"))], os.fsencode(entry.name)),
            )
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}): check the inbox") from error
        beside = {entry.name: entry for entry in entries if entry.name.endswith(".json")}
        for entry in entries:
            if entry.name.startswith(".") or entry.name.endswith((*_UNFINISHED, ".json")):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                own = beside.get(f"{entry.name.removesuffix('.jsonl')}.json")
                settings = own and own.stat(follow_symlinks=False)
            except OSError:  # gone meanwhile
                continue
            stamp = (settings.st_size, settings.st_ctime_ns) if settings else None
            seen = _Seen(status.st_ino, status.st_size, status.st_ctime_ns, stamp)
            if self._known.get(entry.name) == seen:
                continue
            before, since = self._since.get(entry.name, (None, 0.0))
            if before != seen:
                self._since[entry.name] = seen, time.monotonic()
            if before != seen or time.monotonic() - since < self._settle:
                self.unsettled = True
                continue
            said = self._take(entry, status, busy)
            if said is _LATER:
                self.unsettled = True
                continue
            self._known[entry.name] = seen
            self._since.pop(entry.name)
            if isinstance(said, Accepted):
                busy[sender_of(said.name)] += 1
            if said is not None:
                yield said

    def _take(
        self, entry: os.DirEntry, status: os.stat_result, busy: collections.Counter
    ) -> "Accepted | Refused | None":
        """A file as a job, or why not; None for one that was taken before, `_LATER` for one that is to wait."""
        name = entry.name.removesuffix(".jsonl")
        valid = NAME.fullmatch(name) is not None
        try:
            if not stat.S_ISREG(status.st_mode):
                raise UserError("it is no regular file: hand in a file")
            if not entry.name.endswith(".jsonl"):
                raise UserError("its name does not end in .jsonl: hand in one JSON object a line")
            if not valid:
                raise UserError(NAMED)
            most = int(self._policy.quotas.megabytes * 1e6)
            if status.st_size > most:
                raise UserError(f"{status.st_size:,} bytes are too many, {most:,} are the most: split it")
            if (self._jobs / name).exists():
                return self._again(entry, name, most)
            settings = self._settings(self.folder / f"{name}.json")
            quotas = self._policy.quotas
            if busy.total() >= quotas.waiting or busy[sender_of(name)] >= quotas.jobs:
                return _LATER
            return self._accept(entry, name, settings, most)
        except (UserError, OSError) as error:
            if is_of_the_machine(error):
                raise
            why = str(error)
            if isinstance(error, OSError):
                why = f"it cannot be read ({error.strerror or one_line(error)}): check it"
            folder = f"{name[:80] if valid else ''}+refused-{key_of(entry.name, why)[:12]}"
            return Refused(folder, ascii(entry.name), why)

    def _again(self, entry: os.DirEntry, name: str, most: int) -> None:
        known = read_record(self._jobs / name / _JOB)["rows"]
        digest = hashlib.sha256()
        for part in _read(self.folder / entry.name, most):
            digest.update(part)
        if digest.hexdigest() != known:
            raise UserError(
                f"job {name} was handed in before, with other rows ({digest.hexdigest()[:8]}): give it another name"
            )

    def _accept(self, entry: os.DirEntry, name: str, settings: dict[str, Any], most: int) -> "Accepted":
        digest = hashlib.sha256()
        with staged(self._jobs / name) as place:
            make_private(place)
            with open(place / _ROWS, "wb", opener=_private) as file:
                for part in _read(self.folder / entry.name, most):
                    digest.update(part)
                    file.write(part)
            number = self._count + 1
            record = {"number": number, "settings": settings, "rows": digest.hexdigest()}
            write_record(place / _JOB, record)
        self._count = number
        return Accepted(name, number, settings, self._jobs / name / _ROWS, digest.hexdigest())

    def _settings(self, path: pathlib.Path) -> dict[str, Any]:
        """What NAME.json asks for; nothing where there is none."""
        if not os.path.lexists(path):
            return {}
        text = b"".join(_read(path, _MAX_SETTINGS)).decode("utf-8", "replace")
        asked = parse_json(text, path.name, "write one JSON object")
        if not isinstance(asked, dict):
            raise UserError(f"{path.name} holds no JSON object: write one, with settings by name")
        return self._policy.settings(asked)


_LATER = object()


def _read(path: pathlib.Path, most: int | None = None) -> Iterator[bytes]:
    """The bytes of a regular file that is no link and does not change while it is read."""
    with open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK | os.O_NOFOLLOW)) as file:
        before = os.fstat(file.fileno())
        if not stat.S_ISREG(before.st_mode):
            raise UserError(f"{path.name} is no regular file: hand in a file")
        if most is not None and before.st_size > most:
            raise UserError(f"{path.name}: {before.st_size:,} bytes are too many, {most:,} are the most")
        left = before.st_size
        while left > 0 and (part := file.read(min(left, _CHUNK))):
            left -= len(part)
            yield part
        after = os.fstat(file.fileno())
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise UserError(f"{path.name} changed while it was read: hand in a whole file, by renaming it")


def _private(name: str, how: int) -> int:
    return os.open(name, how, 0o600)
