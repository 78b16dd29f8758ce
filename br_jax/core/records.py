"""What br_jax writes for itself to read again: sealed by a hash, so that what was changed or damaged since is noticed.

A seal is no signature: it holds against a flipped bit, a cut or swapped file or a slip of the hand, not a forger.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from br_jax.core.errors import UserError
from br_jax.core.hashes import file_hash, key_of
from br_jax.core.io import read_json, write_text

_SEAL = "sha256"


def write_record(path: str | os.PathLike, record: dict[str, Any], indent: int | None = 1) -> None:
    """Writes a JSON object with its seal, whole or not at all."""
    record = json.loads(json.dumps(record))  # what will be read: lists for tuples, text for keys
    write_text(path, json.dumps(record | {_SEAL: key_of(record)}, indent=indent) + "\n")


def read_record(path: str | os.PathLike, cure: str = "delete it to make it again") -> dict[str, Any]:
    """The object, without its seal; one without a seal, as earlier versions wrote them, is taken as it is.

    Raises:
        UserError: no file, no JSON object, or one that is not what was written.
    """
    record = read_json(path, cure)
    if _SEAL in record and record.pop(_SEAL) != key_of(record):
        raise UserError(f"{path}: was changed or damaged since it was written: {cure}")
    return record


def file_hashes(folder: Path, left_out: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its path from there, but for hidden ones and some names at the top."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    return {
        str(name): file_hash(path)
        for path, name in names.items()
        if name.parts[0] not in left_out and not name.parts[0].startswith(".")
    }


def require_unchanged(folder: Path, hashes: dict[str, str], cure: str) -> None:
    """Raises a `UserError` where a file of a folder is gone, or is not what it was."""
    for name, known in hashes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is gone: {cure}")
        if file_hash(path) != known:
            raise UserError(f"{path}: was changed or damaged since the run finished: {cure}")
