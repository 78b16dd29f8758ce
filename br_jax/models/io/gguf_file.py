"""An opened GGUF file: its tensors, and its key-value pairs, with errors that name the file and the key."""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import reading, require_file

# What a corrupt or truncated file makes the reader and the dequantizer raise.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError)
_MAX_PARTS = 3_000_000  # strings count twice; Gemma-3, of the largest vocabulary, has two million


class _Reader(GGUFReader):
    """Of plain arrays over the mapped file: as `memmap`s the pieces of a vocabulary take twice the time and memory.

    Where the file ends early, gguf goes on with empty arrays, for as long as a count in the file says.
    """

    _parts = 0

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)

    def _get(self, offset: int, dtype, count: int = 1, override_order: str | None = None) -> np.ndarray:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ValueError(f"more than {_MAX_PARTS:,} values")
        found = super()._get(offset, dtype, count, override_order)
        if len(found) != count:
            raise ValueError(f"it ends early, in what is at byte {offset:,}")
        return found


class GGUFFile:
    """The file at `path`; its `tensors` are mapped, not read."""

    def __init__(self, path: str | Path):
        """Opens it; a `UserError` says that it cannot be read, is no GGUF file, or is truncated."""
        require_file(path)
        try:
            with reading(path):
                reader = _Reader(path)
        except BROKEN as error:
            raise UserError(
                f"{path}: not a GGUF file, or a truncated or damaged one ({one_line(error)}): check the path or "
                "download it again"
            ) from error
        self.path, self.tensors, self.fields = path, reader.tensors, reader.fields

    def get(self, key: str, default=None):
        """The value of a key, or the default where the file does not have it."""
        try:
            return self.fields[key].contents() if key in self.fields else default
        except BROKEN as error:
            raise UserError(f"{self.path}: metadata {key} is damaged ({one_line(error)}): download it again") from error

    def need(self, key: str):
        """The value of a key that must be there."""
        if key not in self.fields:
            raise UserError(f"{self.path}: metadata {key} is missing: convert it again with a current llama.cpp")
        return self.get(key)

    def items(self, key: str, kind: type, default: list | None = None) -> list:
        """The list that a key holds, of items of one kind; it must be there, unless there is a default."""
        items = self.need(key) if default is None else self.get(key, default)
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise UserError(f"{self.path}: {key} is no list of {kind.__name__}: convert it again")
        return items

    def demand(self, key: str, allowed: Collection, default=None):
        """The value of a key, which must be one of those that are implemented."""
        if (value := self.get(key, default)) not in (*allowed,):
            raise UserError(f"{self.path}: {key} is {value!r}, only {', '.join(map(str, allowed))} is supported")
        return value

    def token(self, name: str, count: int) -> int | None:
        """The id of a named token, e.g. "eos"; one that is among so many, or None where the file does not say."""
        key = f"tokenizer.ggml.{name}_token_id"
        if (index := self.get(key)) is not None and (type(index) is not int or not 0 <= index < count):
            raise UserError(f"{self.path}: {key} is {one_line(repr(index))}, but there are {count} tokens")
        return index
