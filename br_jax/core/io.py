"""Files: read within limits, written completely or not at all, locked; pickles are never opened.

Whatever is read of a stranger's goes through here: regular files only (or links to them), of so many bytes at most, so
that no pipe or device keeps a reader waiting or feeds it for ever. A `UserError` names the file. What the machine
refuses (no permission, a full disk) stays an `OSError`, of which `core.cli` makes one line.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import io
import json
import os
import pathlib
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import filelock
from absl import logging
from safetensors import SafetensorError, safe_open

from br_jax.core.errors import UserError, one_line
from br_jax.core.hosts import barrier, is_main

TensorKinds = dict[str, tuple[str, tuple[int, ...]]]  # a tensor's dtype, in safetensors' words, and its shape

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # endings of files that are never opened: they run code

# The most bytes of a file that is read line by line, of one that is held at once, and of a JSON document, which a line
# of JSONL is too: parsed, it can take 30 times as much. Alpaca's rows have 23 million, a large model's index 9 million.
MAX_LINES, MAX_WHOLE, MAX_JSON = 1 << 30, 1 << 26, 25_000_000
_raised = 0  # what `--max_file_mb` has raised all of these to, in bytes
_MAX_NUMBER = 10_000_000  # of lines
_MAX_DEPTH = 100  # of a JSON document: what walks over it may be recursive
_MAX_HEADER = 1 << 24  # bytes of a safetensors file: with 10,000 tensors it has a million
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
LOCK_FILE = ".lock"


# -- reading -----------------------------------------------------------------------------------------------------------


def raise_limits(max_bytes: int) -> None:
    """Lets files and lines of so many bytes be read where less is the most; for a process, by who runs it."""
    global _raised
    _raised = max_bytes


def limit(max_bytes: int) -> int:
    """The most bytes of a file or line where `max_bytes` is what nobody has raised."""
    return max(max_bytes, _raised)


def require_file(path: str | os.PathLike, max_bytes: int | None = None, cure: str = "give the path of a file") -> None:
    """Raises a `UserError` for what is no regular file, or a link to one, or has more bytes; opens nothing."""
    if isinstance(path, int):
        raise UserError(f"{path!r} is a number, not a path: {cure}")
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): {cure}") from error
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
    """Opens a file to read bytes; raises as `require_file`, or an `OSError`."""
    require_file(path, max_bytes, cure)
    # a pipe that has taken the file's place meanwhile is not waited for
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        yield file


def read_bytes(
    path: str | os.PathLike, max_bytes: int | None = MAX_WHOLE, cure: str = "check it, or split it"
) -> bytes:
    """The content of a file; raises as `open_file`."""
    with open_file(path, max_bytes, cure) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def read_text(path: str | os.PathLike, max_bytes: int = MAX_WHOLE, cure: str = "check it, or split it") -> str:
    """The content of a UTF-8 file; raises as `open_file` and `decode_utf8`."""
    return decode_utf8(read_bytes(path, max_bytes, cure), str(path))


def text_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yields the lines of UTF-8 text, each with its end.

    Raises:
        UserError: naming file and line, or byte: one is not UTF-8, or longer than `MAX_JSON`, or one too many.
    """
    offset, longest = 0, limit(MAX_JSON)
    for number, line in enumerate(iter(functools.partial(file.readline, longest + 1), b""), start=1):
        if len(line) > longest or number > _MAX_NUMBER:
            most = f"{longest:,} bytes in a line, or {_MAX_NUMBER:,} lines"
            raise UserError(f"{name}:{number}: more than {most}; split it (scripts: --max_file_mb)")
        yield decode_utf8(line, name, offset)
        offset += len(line)


def decode_utf8(content: bytes, name: str, offset: int = 0) -> str:
    """The text of bytes without a byte-order mark; `offset` is where they begin in what messages call `name`."""
    try:
        return content.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {offset + error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike, cure: str = "copy or make it again") -> dict[str, Any]:
    """The JSON object in a file; a `UserError` where it is too large for what it should be, or no JSON object."""
    content = parse_json(read_text(path, MAX_JSON, cure), str(path), cure)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object: {cure}")
    return content


def parse_json(text: str, origin: str, cure: str) -> Any:
    """The value of a JSON document; a `UserError` if it is none, a deep one, or has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()  # in linear time: a stranger's object may have a million keys
            raise ValueError(f"key {next(key for key, _ in pairs if key in seen or seen.add(key))!r} twice")
        return found

    try:
        content = json.loads(text, object_pairs_hook=unique)
        if _is_deep(content):
            raise ValueError(f"more than {_MAX_DEPTH} levels deep")
    # ValueError: also a number of thousands of digits; RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: not valid JSON ({one_line(error)}); {cure}") from error
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
    """The records of a JSONL file; a last line cut off by a kill is left out, an absent file has none."""
    if not os.path.exists(path):
        return []
    complete = io.BytesIO(read_bytes(path, MAX_LINES).rpartition(b"\n")[0])
    return [record for _, _, record in json_lines(complete, str(path))]


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
        raise UserError(
            f"{path}: not a complete safetensors file ({one_line(error)}); copy or save it again"
        ) from error


def safetensors_header(path: pathlib.Path) -> tuple[TensorKinds, dict[str, str]]:
    """The tensors of a safetensors file by name, and the notes in its header; no tensor is read."""
    with open_safetensors(path) as opened:
        slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
        tensors = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
        return tensors, dict(opened.metadata() or {})


# -- writing -----------------------------------------------------------------------------------------------------------


def write_bytes(path: str | os.PathLike, content: bytes, *, mode: int = 0o666, durable: bool = True) -> None:
    """Writes a file by way of a temporary one, so that on an error what was there stays; its folder is made.

    Args:
        mode: of a new file, less the umask.
        durable: whether the disk is waited for; not so for a file that is written often and may be lost with the power.

    Raises:
        OSError: the disk is full, or the folder cannot be written; it has the file's name.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may be writing the same file
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, *, durable: bool = True) -> None:
    """Writes a UTF-8 file; see `write_bytes`."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: str | os.PathLike, content: Any, *, durable: bool = True) -> None:
    """Writes JSON; see `write_bytes`."""
    write_text(path, json.dumps(content, indent=1) + "\n", durable=durable)


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


@contextlib.contextmanager
def staged(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary folder that takes the place of `folder` once all is in it; on an error nothing has changed.

    What a killed process has left of one is cleared.
    """
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _cleared(folder.parent, f".{folder.name}-") as staging:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        yield new
        for place, _, files in os.walk(new):
            for each in (place, *(os.path.join(place, name) for name in files)):
                sync(each)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise
        sync(folder.parent)


@contextlib.contextmanager
def _cleared(parent: pathlib.Path, prefix: str) -> Iterator[pathlib.Path]:
    """A temporary folder, locked while it lasts; those with this prefix that nobody holds any more are removed."""
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(filelock.Timeout, OSError), filelock.FileLock(left / LOCK_FILE, blocking=False):
            # A kill may have come between two renames: then what was there before is put back.
            if (left / "old").exists() and not (parent / prefix[1:-1]).exists():
                os.rename(left / "old", parent / prefix[1:-1])
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as made, filelock.FileLock(f"{made}/{LOCK_FILE}"):
        yield pathlib.Path(made)


def make_private(folder: pathlib.Path) -> None:
    """Makes a folder that only its owner may enter (mode 0700)."""
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


# -- locks: one process at a time writes in a folder; whoever only reads is not kept waiting --------------------------


@contextlib.contextmanager
def owned(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Keeps a folder to this run while it lasts; of several processes of a run, process 0 holds it for all.

    The system takes the lock from a process that ends, however it ends: what it left in the file counts for nothing.

    Args:
        folder: made if absent.
        wait: for another run to end, which is logged; without it another run's folder is a `UserError`.
    """
    folder = pathlib.Path(folder)
    with contextlib.ExitStack() as stack:
        if is_main():  # the others of a run on several hosts come with process 0, hours later if need be
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / LOCK_FILE
            try:
                stack.enter_context(locked(file, wait=False))
            except filelock.Timeout as error:
                if not wait:
                    raise UserError(
                        f"{folder}: {_holder(file)} works there: wait until it has ended, or choose another folder"
                    ) from error
                logging.warning("%s: %s works there: waiting for it", folder, _holder(file))
                stack.enter_context(locked(file))
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "command": " ".join(sys.argv)}
            file.write_text(json.dumps(holder) + "\n", encoding="utf-8")
        barrier("owned")
        yield


@contextlib.contextmanager
def locked(file: str | os.PathLike, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock file, which stays; on a file system without locks that is logged, and nothing is held.

    Raises:
        filelock.Timeout: another process holds it, and `wait` is off.
    """
    lock = filelock.FileLock(file, mode=0o666, blocking=wait, is_singleton=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
        logging.warning("%s: cannot be locked (%s): run nothing else there", file, one_line(error))
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def reserved(folder: str | os.PathLike) -> Iterator[None]:
    """As `owned`, for a folder that strangers write in: the folder itself is locked, and nothing is written there."""
    with contextlib.ExitStack() as stack:
        if is_main():
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: another process works there: wait until it has ended") from error
            except OSError as error:  # a file system without locks
                logging.warning("%s: cannot be locked (%s): run nothing else there", folder, error.strerror)
        barrier("reserved")
        yield


def _holder(file: pathlib.Path) -> str:
    """Who holds the lock, as far as that can be read."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} (since {holder['since']}: {holder['command'][:80]})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
