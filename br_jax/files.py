"""Files that appear whole or not at all, and files that are not opened."""

import os
import pathlib
from collections.abc import Iterable

from br_jax.errors import UserError

# Endings of files that are never opened: to read one can run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file (UTF-8) by way of a temporary one beside it; its folder is made.

    Raises:
        UserError: when it cannot be written (no permission, full disk); what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}): free space or choose another workdir") from error


def require_replaceable(folder: str | os.PathLike, kind: str, marks: Iterable[str]) -> None:
    """Checks that a folder may be written anew: it is not there, is empty, or is an earlier one of its kind.

    Args:
        folder: to be written.
        kind: what it will be, for the message.
        marks: files, any of which makes a folder one of that kind.

    Raises:
        UserError: something else is there.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir() or (not any((folder / mark).is_file() for mark in marks) and any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no {kind} folder: choose another place or remove it")
