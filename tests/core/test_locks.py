"""Two runs and one folder: one works, the other is told who does, and what a dead one left counts for nothing."""

import json
import os
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
    """A process that holds the folder until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "w")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_who_works_there_whatever_the_file_says(tmp_path, holder):
    lock = tmp_path / "w" / LOCK_FILE
    with pytest.raises(UserError) as caught, owned(tmp_path / "w"):
        pytest.fail("two at once")
    assert f"w: process {holder.pid} on {socket.gethostname()} (since 2" in str(caught.value)
    assert "\n" not in str(caught.value) and lock.read_text()  # a reader is not kept waiting
    for left in ("", "{", "[]", '{"pid": 3}', "\x00" * 9):
        lock.write_text(left)
        with pytest.raises(UserError, match="w: another process works there"), owned(tmp_path / "w"):
            pytest.fail("two at once")
    holder.stdin.close()  # it ends, now or in a moment
    with owned(tmp_path / "w", wait=True):
        holder.wait()
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_killed_one_lets_go(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / "w" / LOCK_FILE).read_text())["pid"] == holder.pid
    with owned(tmp_path / "w"):
        pass


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
