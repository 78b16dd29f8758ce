"""Files: read with errors in one line, written whole or not at all; and those that are never opened."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

from safetensors import SafetensorError, safe_open

from br_jax.errors import UserError, one_line

TensorKinds = dict[str, tuple[str, tuple[int, ...]]]  # a tensor's dtype, in safetensors' words, and its shape

# Endings of files that are never opened: to read one can run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_JSON = 1 << 26  # bytes: a real config has a few thousand, the index of a large model a few hundred thousand


@contextlib.contextmanager
def reading(path: str | os.PathLike, cure: str = "check its permissions") -> Iterator[None]:
    """Makes a `UserError` of a file that is not there or cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: check the path") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or one_line(error)}): {cure}") from error


@contextlib.contextmanager
def writing(path: str | os.PathLike, cure: str = "free space or choose another folder") -> Iterator[None]:
    """Makes a `UserError` of a file or folder that cannot be written: no permission, a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or one_line(error)}): {cure}") from error


def read_text(path: str | os.PathLike) -> str:
    """The content of a UTF-8 file; a `UserError` if it cannot be read, or is not UTF-8."""
    with reading(path):
        content = pathlib.Path(path).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike, cure: str = "copy or make it again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, is too large for what it should be, or holds no JSON object.
    """
    with reading(path):
        size = os.stat(path).st_size
    if size > _MAX_JSON:
        raise UserError(f"{path}: {size:,} bytes are too many for such a file: {cure}")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({one_line(error)}): {cure}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object: {cure}")
    return content


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line cut off by a kill is left out, an absent file has none.

    Raises:
        UserError: it cannot be read, or a whole line is not JSON.
    """
    if not os.path.exists(path):
        return []
    whole_lines = read_text(path).rpartition("\n")[0]
    return [record for _, _, record in json_lines(whole_lines, str(path))]


def json_lines(text: str, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (number, "name:number", its JSON object) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{name}:{number}"
        try:
            record = json.loads(line)
        # ValueError: also a number of thousands of digits; RecursionError: thousands of brackets.
        except (ValueError, RecursionError) as error:
            raise UserError(f"{origin}: not valid JSON ({one_line(error)}); write one JSON object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{origin}: holds a JSON {type(record).__name__}; write one JSON object a line")
        yield number, origin, record


@contextlib.contextmanager
def open_safetensors(path: pathlib.Path) -> Iterator[safe_open]:
    """Opens a safetensors file; one that is cut short or not of this format is a `UserError`."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({one_line(error)}); copy or save it again") from error


def safetensors_header(path: pathlib.Path) -> tuple[TensorKinds, dict[str, str]]:
    """The tensors of a safetensors file by name, and the notes in its header; no tensor is read."""
    with open_safetensors(path) as opened:
        slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
        tensors = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        return tensors, dict(opened.metadata() or {})


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file by way of a temporary one, so that on an error what was there stays; its folder is made."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def staged(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder that takes the place of `folder` once all is in it; on an error nothing has changed."""
    folder = pathlib.Path(folder)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as staging:
            new = pathlib.Path(staging) / "new"
            new.mkdir()
            yield new
            if folder.exists():
                os.rename(folder, pathlib.Path(staging) / "old")
            os.rename(new, folder)


def make_private(folder: pathlib.Path) -> None:
    """Makes a folder that only its owner may enter (mode 0700)."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)


def require_replaceable(folder: str | os.PathLike, kind: str, marks: Iterable[str]) -> None:
    """Raises a `UserError` where a folder holds something other than an earlier one of its kind.

    Any of the files named in `marks` makes a folder one of that kind.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir() or (not any((folder / mark).is_file() for mark in marks) and any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is no {kind} folder: choose another place or remove it")
