"""Spoilt files, at random: each is read, or refused in one line, with few calls and in little memory."""

import contextlib
import itertools
import os
import pathlib
import sys

import pytest
from fuzz.mutations import mutate
from fuzz.readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError

ABSENT = ("run.json", "stage.json", "results.json", "metrics.jsonl", "metrics.jsonl of a run")  # need not be there
LONGER = ("model.gguf", "described model.gguf")  # what is behind the tensors is not read
_ROOM = 2 << 30  # bytes of address space, of which a thread's stack and heap may take 100 million unused
_CALLS = 20_000_000  # of functions, of which a good file takes some thousands: to find what does not end


@pytest.mark.parametrize("files", [25, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_spoilt_files(name, tmp_path, files):
    path, read = READERS[name](name, tmp_path)
    content = path.read_bytes()
    read()  # the good one; and now every thread and cache is there

    @settings(max_examples=files, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))
    def one(random):
        path.write_bytes(mutate(random, content))
        with little_memory():
            read_or_refuse(read)

    one()


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_or_has_no_end(name, tmp_path):
    path, read = READERS[name](name, tmp_path)
    content = path.read_bytes()
    for spoil in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path)):
        path.unlink()
        spoil(path)
        assert not read_or_refuse(read) or name in ABSENT
        path.rmdir() if path.is_dir() else path.unlink()
        path.write_bytes(content)
    os.truncate(path, 1 << 36)  # none of which are on the disk
    assert not read_or_refuse(read) or name in LONGER


class TooLong(BaseException):
    """More calls than any file may take; no reader catches it."""


def read_or_refuse(read):
    """Whether a file is read; it ends what calls Python's functions, or builtin ones, more than `_CALLS` times."""
    calls = itertools.count()

    def count(frame, event, arg):
        if next(calls) > _CALLS:
            sys.setprofile(None)
            raise TooLong

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    finally:
        sys.setprofile(before)
    return True


@contextlib.contextmanager
def little_memory():
    """Lets the process have `_ROOM` more than it has; elsewhere than on Linux nothing says how much it has."""
    if sys.platform != "linux":
        yield
        return
    import resource

    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + _ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
