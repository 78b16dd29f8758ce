"""What was generated or judged, kept in a file as it comes: a killed evaluation goes on, a repeated one is free."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from br_jax.core.errors import UserError
from br_jax.core.hosts import agree, is_main, require_shared
from br_jax.core.io import locked, open_file
from br_jax.core.records import key_of

_START = b'{"key": "'  # of every line
_MAX_BYTES = 1 << 34  # some ten million answers


class Store:
    """Records by key, in a JSONL file that only grows.

    A batch is on disk when `add` returns. What a kill left of a line is cut off when the file is next added to. Several
    runs may add to a file at once; on several processes of one run all hold the records, and process 0 writes. Every
    line carries a hash of itself.

    Args:
        path: the file, made when there is something to add; None keeps the records in memory alone.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        self.path = None if path is None else Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        self._end = self._count = 0  # of the file's complete lines: where they end, and how many they are
        self._of_others: set[str] = set()  # keys that other runs have added since
        if self.path is not None and os.path.lexists(self.path):
            with open_file(self.path, _MAX_BYTES) as file:
                self._records = self._read(file)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._records[key]

    def holds(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key is there; the same in every process (a `UserError` where one does not see what 0 wrote)."""
        mine = [key in self for key in keys]
        known = agree(mine)
        require_shared(self.path, all(here or not there for here, there in zip(mine, known, strict=True)))
        return known

    def add(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Adds records by key; those that are there already stay. On an error (a full disk) the file loses nothing."""
        new = {key: record for key, record in records.items() if key not in self}
        if self.path is not None and new and is_main():
            self._append(new)
        self._records |= new

    def _append(self, new: Mapping[str, dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path.with_name(f".{self.path.name}.lock")), self.path.open("a+b") as file:
                self._of_others |= self._read(file).keys()
                lines = [
                    json.dumps({"key": key, **record, "check": _check(key, record)}, ensure_ascii=False) + "\n"
                    for key, record in new.items()
                    if key not in self._of_others
                ]
                content = "".join(lines).encode("utf-8", "surrogatepass")
                file.truncate(self._end)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk does not say of which file
            raise
        self._end += len(content)
        self._count += len(lines)

    def _read(self, file: BinaryIO) -> dict[str, dict[str, Any]]:
        """What the file holds behind the lines that are known; all of it, where it has become shorter than these."""
        if file.seek(0, os.SEEK_END) < self._end:
            self._end = self._count = 0
        file.seek(self._end)
        records, (*lines, torn) = {}, file.read().split(b"\n")  # torn: what a kill left behind the last line
        if torn[: len(_START)] != _START[: len(torn)]:  # somebody else's file is not cut
            raise UserError(f"{self.path}: does not end as a file of an evaluation does: give another file")
        for line in lines:
            self._count += 1
            try:
                record = json.loads(line.decode("utf-8", "surrogatepass"))
                key, check = record.pop("key"), record.pop("check", None)
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
                raise UserError(f"{self.path}:{self._count}: no record of an evaluation: remove this line") from error
            if check not in (None, _check(key, record)):  # earlier versions wrote none
                raise UserError(f"{self.path}:{self._count}: changed or damaged since it was written: remove this line")
            records[key] = record
            self._end += len(line) + 1
        return records


def _check(key: str, record: Mapping[str, Any]) -> str:
    return key_of(key, record)[:16]
