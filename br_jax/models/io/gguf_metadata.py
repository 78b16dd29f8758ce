"""What a GGUF file says of itself, before its tensors: key-value pairs, with errors that name the file and the key."""

from pathlib import Path

from gguf import GGUFReader

from br_jax.errors import UserError

# What a corrupt or truncated file makes the reader and the dequantizer raise.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


class Metadata:
    """The file's key-value pairs."""

    def __init__(self, reader: GGUFReader, path: str | Path):
        self.fields, self.path = reader.fields, path

    def get(self, key: str, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key: str):
        if key not in self.fields:
            raise UserError(f"{self.path}: metadata {key} is missing: convert it again with a current llama.cpp")
        return self.fields[key].contents()

    def demand(self, key: str, allowed, default):
        """Refuses any value of `key` other than the one that is implemented."""
        if (value := self.get(key, default)) != allowed:
            raise UserError(f"{self.path}: {key} is {value!r}, only {allowed!r} is supported")

    def choose(self, key: str, table: dict):
        """What `table` holds for the value of `key`; refuses any that it does not hold."""
        value = self.get(key)
        if not isinstance(value, str) or value not in table:
            raise UserError(f"{self.path}: {key} is {value!r}, only {', '.join(table)} are supported")
        return table[value]


def open_gguf(path: str | Path) -> GGUFReader:
    """The reader of a file, its tensors mapped but not read.

    Raises:
        UserError: it cannot be read, is no GGUF file, or is truncated.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise UserError(f"{path}: not a GGUF file (begins with {magic!r}): check the path or download again")
    try:
        return GGUFReader(path)
    except BROKEN as error:
        raise UserError(f"{path}: truncated or damaged GGUF file ({error}): download it again") from error
