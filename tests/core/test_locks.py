"""Two runs and one folder: one works, the other is told who does, and what a dead one left counts for nothing."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from br_jax.core.errors import UserError, explain
from br_jax.core.io import LOCK_FILE, owned, reserved

HOLD = (
    "import sys; from br_jax.core.io import owned\n"
    "with owned(sys.argv[1]):\n print('held', flush=True); sys.stdin.read()"
)


@pytest.fixture
def holder(tmp_path):
    """holder() -> a process that holds the folder until its input ends."""
    processes = []

    def start():
        command = [sys.executable, "-c", HOLD, str(tmp_path / "w")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_the_second_is_told_who_works_there(tmp_path, holder):
    first = holder()
    with pytest.raises(UserError) as caught, owned(tmp_path / "w"):
        pytest.fail("two at once")
    assert f"w: process {first.pid} on {socket.gethostname()} (since 2" in str(caught.value)
    assert "\n" not in str(caught.value) and (tmp_path / "w" / LOCK_FILE).read_text()  # a reader is not kept waiting
    first.stdin.close()
    first.wait()
    with owned(tmp_path / "w"):
        assert json.loads((tmp_path / "w" / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_a_killed_one_lets_go(tmp_path, holder):
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / "w" / LOCK_FILE).read_text())["pid"] == process.pid
    with owned(tmp_path / "w"):
        pass


def test_who_waits_comes_next(tmp_path, holder):
    process = holder()
    process.stdin.close()  # it ends, now or in a moment
    with owned(tmp_path / "w", wait=True):
        process.wait()


def test_whatever_the_file_says_is_survived(tmp_path, holder):
    holder()
    for left in ("", "{", "[]", '{"pid": 3}', "\x00" * 9):
        (tmp_path / "w" / LOCK_FILE).write_text(left)
        with pytest.raises(UserError, match="w: another process works there"), owned(tmp_path / "w"):
            pytest.fail("two at once")


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "w" / LOCK_FILE).symlink_to(tmp_path / "kept")
    with pytest.raises(OSError) as caught, owned(tmp_path / "w"):
        pass
    assert str(tmp_path / "w") in explain(caught.value)
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_reserved_folder_stays_as_it_is(tmp_path):
    with reserved(tmp_path):
        with pytest.raises(UserError, match="another process works there"), reserved(tmp_path):
            pytest.fail("two at once")
        assert not [*tmp_path.iterdir()]
    with reserved(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError) as caught, owned(tmp_path / "file/w"):
        pass
    assert explain(caught.value) == f"{tmp_path}/file/w: Not a directory: choose another place"
