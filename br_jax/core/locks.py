"""Who works in a folder: one process at a time writes there; whoever only reads is not kept waiting."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from absl import logging

from br_jax.core.errors import UserError
from br_jax.core.hosts import barrier, is_main
from br_jax.core.io import writing

LOCK_FILE = ".lock"


@contextlib.contextmanager
def owned(folder: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Keeps a folder to this run while it lasts; of several processes of a run, process 0 holds it for all.

    The system takes the lock from a process that ends, however it ends: what it left in the file counts for nothing.

    Args:
        folder: made if absent.
        wait: for another run to end, which is said; without it another run's folder is an error.

    Raises:
        UserError: another run works there, or the folder cannot be written.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        if is_main():  # the others of a run on several hosts come with process 0, hours later if need be
            with writing(folder, "choose another workdir"):
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(folder / LOCK_FILE, "a+", encoding="utf-8", opener=_no_link))
            try:
                lock(file, wait=False)
            except BlockingIOError as error:
                holder = _holder(file)
                if not wait:
                    raise UserError(
                        f"{folder}: {holder} works there: wait until it has ended, or choose another folder"
                    ) from error
                logging.warning("%s: %s works there: waiting for it", folder, holder)
                lock(file)
            with writing(folder):
                _sign(file)
        barrier("owned")
        yield


@contextlib.contextmanager
def reserved(folder: str | os.PathLike) -> Iterator[None]:
    """As `owned`, for a folder that strangers write in: the folder itself is locked, and nothing is written there."""
    with contextlib.ExitStack() as stack:
        if is_main():
            with writing(folder, "choose another folder"):
                place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, place)
            try:
                lock(place, wait=False)
            except BlockingIOError as error:
                raise UserError(f"{folder}: another process works there: wait until it has ended") from error
        barrier("reserved")
        yield


def lock(file: IO | int, wait: bool = True) -> None:
    """Locks an open file or folder until it is closed.

    Raises:
        BlockingIOError: another process holds it, and `wait` is off.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:  # a file system without locks
        name = getattr(file, "name", "a folder")
        logging.warning("%s: cannot be locked (%s): run nothing else there", name, error.strerror)


def _no_link(name: str, how: int) -> int:
    return os.open(name, how | os.O_NOFOLLOW, 0o666)


def _sign(file: IO) -> None:
    """Writes who holds the lock, for whoever comes next."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now, "command": " ".join(sys.argv)}
    file.truncate(0)
    file.write(json.dumps(holder) + "\n")
    file.flush()


def _holder(file: IO) -> str:
    """Who holds the lock, as far as that can be read."""
    file.seek(0)
    try:
        said = json.loads(file.read())
        return f"process {said['pid']} on {said['host']} (since {said['since']}: {said['command'][:80]})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
