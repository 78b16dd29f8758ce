"""Joining, and what the functions of several processes do in one; tests/training/test_hosts.py has two."""

import os
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from br_jax import distributed
from br_jax.errors import Stopped, UserError
from br_jax.sharding import local_rows, make_mesh, place
from br_jax.training import loop
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.run import train_adapter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "host:1"}, "--num_processes and --process_id missing: several processes need all three"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator missing"),
        ({"multihost": True, "process_id": 0}, "--multihost finds the processes by itself: leave out"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 1}, "--coordinator=host: write host:port"),
        ({"coordinator": ":1", "num_processes": 2, "process_id": 1}, "--coordinator=:1: write host:port"),
        (
            {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: with --num_processes=2 it is 0 to",
        ),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": -1}, "--process_id=-1"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        distributed.join(**arguments)
    assert "\n" not in str(caught.value) and not jax.distributed.is_initialized()


def test_a_coordinator_that_does_not_answer_is_one_line():
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--coordinator={address}: no answer in 1 s .*start process 0 there"):
            distributed.join(address, 2, 1, wait=1)


def test_no_cluster_for_multihost_is_one_line():
    script = "from br_jax import command_line as c; c.run_main(int, lambda: c.distributed.join(multihost=True))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the processes could not be joined (") and done.stderr.count("\n") == 1


def test_processes_that_never_come_are_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"from br_jax import distributed; distributed.join('127.0.0.1:{port}', 2, 0, wait=1)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGABRT  # JAX's
    assert done.stderr.splitlines()[-1].startswith(
        "error: process 0 of 2 did not finish: another process died or never"
    )


def test_one_process_is_the_case_in_which_nothing_happens():
    assert distributed.join() is None and not jax.distributed.is_initialized()
    assert distributed.is_main() and distributed.agree(True) and not distributed.agree(False)
    assert distributed.gather(True) == [True]
    assert distributed.main_first(lambda: 7) == 7
    tree = {"a": jax.numpy.ones(3)}
    assert distributed.fetch(tree)["a"] is tree["a"]


def test_a_stop_comes_between_two_pieces_of_work_too(monkeypatch):
    monkeypatch.setattr(distributed, "_stop_agreed", lambda: True)
    with pytest.raises(Stopped, match="stopped by SIGTERM: the same command goes on"):
        distributed.main_first(lambda: pytest.fail("was done"))


def test_a_process_of_one_has_every_row():
    np.testing.assert_array_equal(local_rows(make_mesh(2, 2, 2), 8), np.arange(8))
    with pytest.raises(UserError, match=r"axis batch of size 6 cannot be split in 4"):
        local_rows(make_mesh(2, 2, 2), 6)


def test_parts_of_an_array_that_lies_on_several_processes_are_sent_from_the_host(monkeypatch):
    kernel = {"layers": {"attn": {"q": {"kernel": np.arange(2 * 8 * 4, dtype=np.float32).reshape(2, 8, 4)}}}}
    mesh = make_mesh(2, 2, 2)
    put = place(kernel, mesh)
    monkeypatch.setattr(jax.sharding.NamedSharding, "is_fully_addressable", False)
    sent = place(kernel, mesh)
    one, other = (jax.tree.leaves(tree)[0] for tree in (put, sent))
    assert one.sharding == other.sharding
    for a, b in zip(one.addressable_shards, other.addressable_shards, strict=True):
        assert a.device == b.device and a.index == b.index
        np.testing.assert_array_equal(a.data, b.data)


@pytest.fixture
def sigterm(monkeypatch):
    """sigterm(step): this process sends itself SIGTERM after that step."""

    def arm(step):
        asked, steps = loop.StopSignal.asked, iter(range(1, 100))

        def ask(self):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return asked(self)

        monkeypatch.setattr(loop.StopSignal, "asked", ask)

    return arm


def train(folder, tiny, rows, config):
    return train_adapter("sft", "user", tiny, rows, config, workdir=folder)


@pytest.mark.parametrize("step", [1, 4])  # 4 is the last
def test_sigterm_ends_a_run_in_good_order(tmp_path, tiny, rows, quick, sigterm, monkeypatch, step):
    before = signal.getsignal(signal.SIGTERM)
    sigterm(step)
    with pytest.raises(Stopped, match=f"sft: stopped by SIGTERM at step {step}: the same command goes on from there"):
        train(tmp_path / "stopped", tiny, rows, quick())
    assert (tmp_path / "stopped" / "sft" / "checkpoints" / str(step)).is_dir()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    resumed = train(tmp_path / "stopped", tiny, rows, quick())
    jax.tree.map(np.testing.assert_array_equal, resumed, train(tmp_path / "straight", tiny, rows, quick()))
    losses = [
        (tmp_path / f / "sft" / "stage.json").read_text().split('"loss": ')[1][:8] for f in ("stopped", "straight")
    ]
    assert losses[0] == losses[1]


def test_sigterm_without_a_workdir_says_what_is_lost(tiny, rows, quick, sigterm):
    sigterm(2)
    with pytest.raises(Stopped, match="at step 2: without a workdir, all is lost"):
        train_adapter("sft", "user", tiny, rows, quick())


def test_sigterm_that_nobody_asked_for_any_more_is_sent_again():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append("outside"))
    try:
        with distributed.StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        assert seen == ["outside"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_than_the_main_one_trains_without_the_signal():
    answers = []

    def ask():
        with distributed.StopSignal() as stop:
            answers.append(stop.asked())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]


def test_orbax_does_not_ask_for_the_stop(tmp_path, monkeypatch):
    """JAX's preemption service wants numbers that only rise: Orbax would give it steps, from a thread of its own."""
    asked = []
    ask = jax.experimental.multihost_utils.reached_preemption_sync_point
    monkeypatch.setattr(
        jax.experimental.multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step) or ask(step)
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {"step": jax.numpy.int32(3)}, {})
    checkpoints.close()
    assert asked == []


def test_a_workdir_that_is_not_shared_is_named(tmp_path, tiny, rows, quick, monkeypatch):
    monkeypatch.setattr("br_jax.distributed.gather", lambda value: [value, False])
    with pytest.raises(UserError, match=r"run.json: written by process 0 and not seen by process 1: choose a workdir"):
        train(tmp_path, tiny, rows, quick())


def test_only_the_main_process_shows_a_bar(monkeypatch, capsys):
    from br_jax import progress

    for main, shown in ((True, True), (False, False)):
        monkeypatch.setattr(progress, "is_main", lambda main=main: main)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with progress.progress(3, "steps", "step") as bar:
            bar.update(3)
        assert ("steps" in capsys.readouterr().err) == shown
