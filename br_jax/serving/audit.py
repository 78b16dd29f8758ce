"""What the service did, in a file that only grows: fingerprints and figures, and no word of a user's."""

import datetime
import json
import os
import pathlib
from typing import Any

from br_jax.core.errors import UserError
from br_jax.core.io import open_file, writing
from br_jax.core.records import key_of

_MOST = 1 << 34  # bytes


class Audit:
    """One JSON object a line; each holds the hash of the one before it, so that none is changed or left out unseen.

    What a kill left of a last line is cut off. The time is the machine's, and may be wrong; the number is not.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._number, self._last, whole = path, 0, "", 0
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            with open_file(path, _MOST) as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._follow(line)
                    whole += len(line)
        with writing(path):
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
            os.truncate(self._file, whole)

    def _follow(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
            known, number, before = entry.pop("hash"), entry["number"], entry["before"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._path}:{self._number + 1}: no entry of an audit log: restore the file") from error
        if known != key_of(entry) or number != self._number + 1 or before != self._last:
            raise UserError(f"{self._path}:{self._number + 1}: was changed, or one before it is gone: restore the file")
        self._number, self._last = number, known
        self.entries.append(entry)

    def write(self, event: str, job: str, **figures: Any) -> None:
        """Adds an entry, which is on disk when this returns."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"number": self._number + 1, "before": self._last, "time": now, "event": event, "job": job, **figures}
        entry = json.loads(json.dumps(entry))
        self._number, self._last = entry["number"], key_of(entry)
        with writing(self._path):
            line = (json.dumps(entry | {"hash": self._last}) + "\n").encode()
            while line:  # of a disk that is nearly full, a part at a time
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        self.entries.append(entry)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
