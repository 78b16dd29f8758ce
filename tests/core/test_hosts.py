"""Joining, and what the functions of several processes do in one; tests/training/test_hosts.py has two."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from br_jax.core import hosts as distributed
from br_jax.core import progress
from br_jax.core.errors import Stopped, UserError
from br_jax.core.mesh import local_rows, make_mesh
from br_jax.training import loop
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.run import train_adapter


def test_what_cannot_be_joined_is_one_line():
    for arguments, message in (
        ({"coordinator": "host:1"}, "--process_id, or --multihost alone"),
        ({"multihost": True, "process_id": 0}, "--process_id, or --multihost alone"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 1}, "--coordinator=host .*write host:port"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "--process_id=2: write host:port"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            distributed.join(**arguments)
        assert "\n" not in str(caught.value) and not jax.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("multihost=True", 2, "error: the processes could not be joined ("),
        ("'{address}', 2, 0, wait=1", -signal.SIGABRT, "process 0 of 2 waits 1 s for the others; should JAX abort it"),
    ],
)
def test_processes_that_do_not_come_are_told_of(arguments, status, said):
    script = f"from br_jax.core import cli as c; c.run_main(int, lambda: c.hosts.join({arguments}))"
    with socket.create_server(("127.0.0.1", 0)) as free:
        script = script.format(address=f"127.0.0.1:{free.getsockname()[1]}")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status  # an abort is JAX's
    assert any(line.startswith(said) for line in done.stderr.splitlines())


def test_one_process_is_the_case_in_which_nothing_happens_but_a_stop(monkeypatch):
    assert distributed.join() is False and not jax.distributed.is_initialized()
    assert distributed.is_main() and distributed.agree(True) and not distributed.agree(False)
    assert distributed.gather(True) == [True]
    assert distributed.main_first(lambda: 7) == 7
    np.testing.assert_array_equal(local_rows(make_mesh(2, 2, 2), 8), np.arange(8))
    with pytest.raises(UserError, match=r"axis batch of size 6 cannot be split in 4"):
        local_rows(make_mesh(2, 2, 2), 6)
    monkeypatch.setattr(distributed, "_stop_agreed", lambda: True)
    with pytest.raises(Stopped, match="stopped by SIGTERM: the same command goes on"):
        distributed.main_first(lambda: pytest.fail("was done"))


@pytest.mark.parametrize("step", [1, 4])  # 4 is the last
def test_sigterm_ends_a_run_in_good_order(tmp_path, tiny, rows, quick, monkeypatch, step):
    def train(workdir):
        return train_adapter("sft", "user", tiny, rows, quick(), workdir=workdir)

    def ask(self):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(self)

    asked, before = loop.StopSignal.asked, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop.StopSignal, "asked", ask)
    for workdir, said in ((tmp_path, "the same command goes on from there"), (None, "without a workdir, all is lost")):
        steps = iter(range(1, 100))
        with pytest.raises(Stopped, match=f"sft: stopped by SIGTERM at step {step}: {said}"):
            train(workdir)
    assert (tmp_path / "sft" / "checkpoints" / str(step)).is_dir()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, train(tmp_path), train(None))


def test_sigterm_that_nobody_asked_for_any_more_is_sent_again():
    def asked():
        with distributed.StopSignal() as stop:
            return stop.asked()

    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append("outside"))
    try:
        with distributed.StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        assert seen == ["outside"]
        with concurrent.futures.ThreadPoolExecutor() as pool:  # where no handler can be set
            assert pool.submit(asked).result() is False
    finally:
        signal.signal(signal.SIGTERM, before)


def test_orbax_does_not_ask_for_the_stop(tmp_path, monkeypatch):
    """JAX's preemption service wants numbers that only rise: Orbax would give it steps, from a thread of its own."""
    asked = []
    monkeypatch.setattr(jax.experimental.multihost_utils, "reached_preemption_sync_point", asked.append)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {"step": jax.numpy.int32(3)}, {})
    checkpoints.close()
    assert asked == []


def test_a_workdir_that_is_not_shared_is_named(tmp_path, tiny, rows, quick, monkeypatch):
    monkeypatch.setattr("br_jax.core.hosts.gather", lambda value: [value, False])
    with pytest.raises(UserError, match=r"run.json: written by process 0 and not seen by process 1: choose a workdir"):
        train_adapter("sft", "user", tiny, rows, quick(), workdir=tmp_path)


def test_a_log_gets_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_SECONDS", 0)
    with progress.progress(4, "align", "step", done=1) as bar:
        bar.set_postfix_str("loss 0.310")
        bar.update(2)
    assert capsys.readouterr().err == "align: 3 of 4 steps, 0 s, loss 0.310\n"


def test_only_the_main_process_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for main in (True, False):
        monkeypatch.setattr(progress, "is_main", lambda main=main: main)
        progress.progress(3, "steps", "step").close()
        assert ("steps" in capsys.readouterr().err) == main
