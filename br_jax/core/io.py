"""Files: read with errors in one line, written whole or not at all; and those that are never opened.

Whatever is read of a stranger's goes through here: regular files only (or links to them), of so many bytes at most. A
folder, pipe, device or socket is a `UserError`, so that none of them keeps a reader waiting or feeds it for ever.
"""

import contextlib
import errno
import functools
import io
import json
import os
import pathlib
import stat
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from br_jax.core.errors import UserError, one_line

TensorKinds = dict[str, tuple[str, tuple[int, ...]]]  # a tensor's dtype, in safetensors' words, and its shape

# Endings of files that are never opened: to read one can run any code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# The most bytes of a file that is read line by line, of one that is held whole, and of a JSON document, as which a line
# of JSONL counts: parsed, it can take 30 times as much. Alpaca's rows have 23 million, a large model's index 9 million.
MAX_LINES, MAX_WHOLE, MAX_JSON = 1 << 30, 1 << 26, 25_000_000
_raised = 0  # what `--max_file_mb` has raised all of these to, in bytes
_MAX_NUMBER = 10_000_000  # of lines
_MAX_DEPTH = 100  # of a JSON document: what walks over it may be recursive
_MAX_HEADER = 1 << 24  # bytes of a safetensors file: with 10,000 tensors it has a million

_OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
)  # fmt: skip

_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


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


def is_of_the_machine(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is of a full or broken disk, or of too many open files: nobody's fault."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            return True
        error = error.__cause__
    return False


def raise_limits(max_bytes: int) -> None:
    """Lets files and lines of so many bytes be read where less is the most; for a process, by who runs it."""
    global _raised
    _raised = max_bytes


def limit(max_bytes: int) -> int:
    """The most bytes of a file or line where `max_bytes` is what nobody has raised."""
    return max(max_bytes, _raised)


def require_file(path: str | os.PathLike, max_bytes: int | None = None, cure: str = "give the path of a file") -> None:
    """Raises a `UserError` for what is no regular file, or a link to one, or has more bytes; opens nothing."""
    with reading(path, cure):
        status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "device")
        raise UserError(f"{path}: cannot be read (it is a {kind}, not a file): {cure}")
    if max_bytes is not None and status.st_size > (most := limit(max_bytes)):
        raise UserError(
            f"{path}: {status.st_size:,} bytes are too many, {most:,} are the most: {cure} (scripts: --max_file_mb)"
        )


@contextlib.contextmanager
def open_file(
    path: str | os.PathLike, max_bytes: int | None = None, cure: str = "give the path of a file"
) -> Iterator[BinaryIO]:
    """Opens a file to read bytes; raises as `require_file`, and for what goes wrong while it is open."""
    require_file(path, max_bytes, cure)
    # a pipe that has taken the file's place meanwhile is not waited for
    with reading(path, cure), open(path, "rb", opener=lambda name, how: os.open(name, how | os.O_NONBLOCK)) as file:
        yield file


def read_bytes(
    path: str | os.PathLike, max_bytes: int | None = MAX_WHOLE, cure: str = "check it, or split it"
) -> bytes:
    """The content of a file; raises as `require_file`."""
    with open_file(path, max_bytes, cure) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(path: str | os.PathLike, max_bytes: int = MAX_WHOLE, cure: str = "check it, or split it") -> str:
    """The content of a UTF-8 file; a `UserError` if it cannot be read, is too large, or is not UTF-8."""
    return decode_utf8(read_bytes(path, max_bytes, cure), str(path))


def text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yields the lines of UTF-8 text, each with its end.

    Raises:
        UserError: naming file and line, or byte: one is not UTF-8, or longer than `MAX_JSON`, or one too many.
    """
    place, longest = 0, limit(MAX_JSON)
    for number, line in enumerate(iter(functools.partial(file.readline, longest + 1), b""), start=1):
        if len(line) > longest or number > _MAX_NUMBER:
            most = f"{longest:,} bytes in a line, or {_MAX_NUMBER:,} lines"
            raise UserError(f"{name}:{number}: more than {most}; split it (scripts: --max_file_mb)")
        yield decode_utf8(line, name, place)
        place += len(line)


def decode_utf8(content: bytes, name: str, place: int = 0) -> str:
    """The text of bytes, the first of which has that place in what messages call `name`; without a BOM."""
    try:
        return content.decode("utf-8" if place else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {place + error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike, cure: str = "copy or make it again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: it cannot be read, is too large for what it should be, or holds no JSON object.
    """
    content = parse_json(read_text(path, MAX_JSON, cure), str(path), cure)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object: {cure}")
    return content


def parse_json(text: str, origin: str, cure: str) -> Any:
    """The value of a JSON document; a `UserError` if it is none, or a deep one."""
    try:
        content = json.loads(text, object_pairs_hook=_without_duplicates)
        if _is_deep(content):
            raise ValueError(f"more than {_MAX_DEPTH} levels deep")
    # ValueError: also a number of thousands of digits; RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON ({one_line(error)}); {cure}") from error
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {one_line(twice, 60)!r} is there twice")
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(_MAX_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, list | dict))
        level = [value for values in inner for value in values]
        if not level:
            return False
    return True


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line cut off by a kill is left out, an absent file has none.

    Raises:
        UserError: it cannot be read, or a whole line is not JSON.
    """
    if not os.path.exists(path):
        return []
    whole_lines = io.BytesIO(read_bytes(path, MAX_LINES).rpartition(b"\n")[0])
    return [record for _, _, record in json_lines(whole_lines, str(path))]


def json_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yields (number, "name:number", its JSON object) of each line that is not blank."""
    for number, line in enumerate(text_lines(file, name), start=1):
        if not line.strip():
            continue
        origin = f"{name}:{number}"
        record = parse_json(line, origin, "write one JSON object a line")
        if not isinstance(record, dict):
            raise UserError(f"{origin}: holds a JSON {type(record).__name__}; write one JSON object a line")
        yield number, origin, record


@contextlib.contextmanager
def open_safetensors(path: pathlib.Path) -> Iterator[safe_open]:
    """Opens a safetensors file; one that is cut short or not of this format is a `UserError`."""
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
    try:
        if length > _MAX_HEADER:
            raise SafetensorError(f"a header of {length:,} bytes")
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


def write_text(path: str | os.PathLike, text: str, *, durable: bool = True) -> None:
    """Writes a UTF-8 file by way of a temporary one, so that on an error what was there stays; its folder is made.

    Without `durable` the disk is not waited for: of a file that is written often, and may be lost with the power.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may be writing the same file
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            if durable:
                sync(temporary)
            os.replace(temporary, path)
            if durable:
                sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync(path: str | os.PathLike) -> None:
    """Has what was written to a file, or to a folder's list of names, on disk when it returns, if that can be had."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # of a file system without it
            raise
    finally:
        os.close(descriptor)


def write_json(path: str | os.PathLike, content: Any, *, durable: bool = True) -> None:
    """Writes JSON; see `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n", durable=durable)


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
            for place, _, files in os.walk(new):
                for each in (place, *(os.path.join(place, name) for name in files)):
                    sync(each)
            if folder.exists():
                os.rename(folder, pathlib.Path(staging) / "old")
            os.rename(new, folder)
            sync(folder.parent)


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
