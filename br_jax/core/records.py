"""What br_jax knows things by: hashes of arrays, files and JSON; and the records that it writes to read again.

A record is sealed by its hash, so that what was changed or damaged since is noticed. A seal is no signature: it holds
against a flipped bit, a cut or swapped file or a slip of the hand, not against a forger.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from br_jax.core.errors import UserError
from br_jax.core.hosts import fetch
from br_jax.core.io import open_file, read_json, write_text

_SEAL = "sha256"


def fingerprint(tree, extra: str = "") -> str:
    """SHA-256 over paths, shapes, dtypes and bytes of a pytree of arrays, fetched a layer at a time from accelerators.

    All processes of a run get the same one.
    """
    digest = hashlib.sha256(extra.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)}{leaf.shape}{leaf.dtype}".encode())
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu":
            leaf = np.asarray(leaf)  # it is there already; slices would need a program for each shape
        for part in (leaf[i] for i in range(len(leaf))) if leaf.ndim > 2 else [leaf]:
            array = np.ascontiguousarray(fetch(part) if isinstance(part, jax.Array) else part)
            digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def code_hash(*modules: ModuleType) -> str:
    """A hash of modules' source, for what is kept only as long as its rules are the same."""
    return key_of(*(Path(module.__file__).read_text(encoding="utf-8") for module in modules))


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(path: str | os.PathLike, record: dict[str, Any], indent: int | None = 1) -> None:
    """Writes a JSON object with its seal."""
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
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    shown = [name for name in names if name.parts[0] not in left_out and not name.parts[0].startswith(".")]
    return {str(name): file_hash(folder / name) for name in shown}


def require_unchanged(folder: Path, hashes: dict[str, str], cure: str) -> None:
    """Raises a `UserError` where a file of a folder is gone, or is not what it was."""
    for name, known in hashes.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: is gone: {cure}")
        if file_hash(path) != known:
            raise UserError(f"{path}: was changed or damaged since the run finished: {cure}")
