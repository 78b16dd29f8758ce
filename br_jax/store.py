"""What was generated or judged, kept in a file as it comes: a killed evaluation goes on, a repeated one is free."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from br_jax.distributed import agree, is_main, require_shared
from br_jax.errors import UserError
from br_jax.files import read_bytes, writing

_START = b'{"key": "'  # of every line
_MAX_BYTES = 1 << 34  # some ten million answers


class Store:
    """Records by key, in a JSONL file that only grows.

    A batch is on disk when `add` returns. What a kill left of a line is cut off when the file is next added to. One run
    at a time may add to a file; on several processes all of them hold the records, and process 0 writes.

    Args:
        path: the file, made when there is something to add; None keeps the records in memory alone.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        self._whole = 0  # bytes of the file's whole lines
        if self.path is not None and self.path.exists():
            self._read()

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def holds(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key is there; the same in every process.

        Raises:
            UserError: a process does not see what process 0 wrote.
        """
        mine = [key in self for key in keys]
        known = agree(mine)
        require_shared(self.path, all(here or not there for here, there in zip(mine, known, strict=True)))
        return known

    def add(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Adds records by key; those that are there already stay as they are.

        Raises:
            UserError: the file cannot be written (full disk, no permission); what it held is still whole.
        """
        new = {key: record for key, record in records.items() if key not in self}
        if self.path is not None and new and is_main():
            lines = "".join(json.dumps({"key": k, **r}, ensure_ascii=False) + "\n" for k, r in new.items())
            content = lines.encode("utf-8", "surrogatepass")
            with writing(self.path, "free space, then run again"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.truncate(self._whole)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            self._whole += len(content)
        self._records |= new

    def _read(self) -> None:
        *lines, torn = read_bytes(self.path, _MAX_BYTES).split(b"\n")  # torn: what a kill left behind the last line
        if torn[: len(_START)] != _START[: len(torn)]:  # somebody else's file is not cut
            raise UserError(f"{self.path}: does not end as a file of an evaluation does: give another file")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line.decode("utf-8", "surrogatepass"))
                self._records[record.pop("key")] = record
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise UserError(f"{self.path}:{number}: no record of an evaluation: remove this line") from error
            self._whole += len(line) + 1
