"""Hashes by which things are known again: arrays, files, and whatever JSON can hold."""

import hashlib
import json
import os
import pathlib
from types import ModuleType
from typing import Any

import jax
import numpy as np

from br_jax.core.hosts import fetch
from br_jax.core.io import open_file


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
    return key_of(*(pathlib.Path(module.__file__).read_text(encoding="utf-8") for module in modules))


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
