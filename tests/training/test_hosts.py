"""Two processes of four devices train what one of eight does; they stop together, and go down together.

Each process is tests/training/hosts_run.py; collectives between them are gloo's.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load

from br_jax.training.metrics import read_jsonl

SCRIPT = pathlib.Path(__file__).with_name("hosts_run.py")
STEPS = 20  # the script's
MESH = "1,8,1"
ABORTED = -signal.SIGABRT


def start(workdir, *how, processes=2, devices=8, mesh=MESH):
    """Runs the script; returns [(exit status, stdout, stderr), one a process]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, SCRIPT, workdir, f"{i}/{processes}", port, devices // processes, mesh, *how]
        for i in range(processes)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(list(map(str, command)), **pipes) for command in commands]
    ended = [(*process.communicate(timeout=150), process.returncode) for process in started]
    return [(status, GLOO.sub("", out), err) for out, err, status in ended]


# gloo speaks of its connections, several threads at once and piece by piece
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+|\s"
)


def trained(ended):
    assert [status for status, _, _ in ended] == [0] * len(ended), ended[0][2] + ended[-1][2]
    assert [out for _, out, _ in ended] == ["trained"] + [""] * (len(ended) - 1)


def losses(folder):
    return [record["loss"] for record in read_jsonl(folder / "user" / "metrics.jsonl")]


def adapter(folder):
    return (folder / "user" / "adapter" / "adapter_model.safetensors").read_bytes()


def matrices(folder):
    return load(adapter(folder))


def steps(folder):
    return sorted(int(path.name) for path in (folder / "user" / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    trained(start(folder))
    return folder


@pytest.fixture(scope="module")
def stopped_alone(tmp_path_factory):
    """The folder of one process of eight devices after SIGTERM at step 6."""
    folder = tmp_path_factory.mktemp("alone")
    ((status, out, err),) = start(folder, "term:0:6", processes=1)
    assert status == 143 and out == ""
    assert err.splitlines()[-1] == "user: stopped by SIGTERM at step 6: the same command goes on from there"
    assert steps(folder) == [4, 6] and not (folder / "user" / "stage.json").exists()
    return folder


def test_two_processes_train_what_one_does(straight, stopped_alone, tmp_path):
    alone = shutil.copytree(stopped_alone, tmp_path / "alone")
    trained(start(alone, processes=1))
    assert len(losses(straight)) == STEPS and len(set(losses(straight))) == STEPS
    np.testing.assert_allclose(losses(straight), losses(alone), rtol=1e-6, atol=1e-6)
    one, two = matrices(alone), matrices(straight)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-5, err_msg=name)
    files = [sorted(str(path.relative_to(f)) for path in f.rglob("*") if path.is_file()) for f in (alone, straight)]
    assert files[0] == files[1]
    probes = [[r["loss"] for r in read_jsonl(folder / "user" / "probes.jsonl")] for folder in (alone, straight)]
    np.testing.assert_allclose(*probes, rtol=1e-6)
    stages = [json.loads((folder / "user" / "stage.json").read_text()) for folder in (alone, straight)]
    for name in ("tokens", "answer_tokens", "steps", "rows", "inputs", "config_hash"):
        assert stages[0][name] == stages[1][name]


def test_a_run_goes_on_in_more_processes(straight, stopped_alone, tmp_path):
    folder = shutil.copytree(stopped_alone, tmp_path / "moved")
    trained(start(folder, mesh="2,4,1"))
    np.testing.assert_allclose(losses(folder), losses(straight), rtol=1e-5)


def test_stopped_by_one_and_killed_one_by_one_the_adapter_is_bit_equal(straight, tmp_path):
    folder = tmp_path / "stopped"
    ended = start(folder, "term:1:5")
    assert [status for status, _, _ in ended] == [143, 143], ended[0][2] + ended[1][2]
    stop = steps(folder)[-1]
    assert 5 <= stop < STEPS - 2 and len(losses(folder)) == stop
    said = f"user: stopped by SIGTERM at step {stop}: the same command goes on from there"
    assert ended[0][2].splitlines()[-1] == said and said not in ended[1][2]

    moved = shutil.copytree(folder, tmp_path / "one_device")
    for process in (1, 0):
        ended = start(folder, f"kill:{process}:1")  # JAX gives a silent process 10 seconds here
        assert ended[process][0] == -signal.SIGKILL
        status, _, said = ended[1 - process]
        assert status in (ABORTED, os.EX_TEMPFAIL)
        line = said.splitlines()[-1]
        assert line.startswith(f"error: process {1 - process} of 2 did not finish: another process died")
        assert line.endswith("the same command goes on from the last checkpoint")
        assert not (folder / "user" / "stage.json").exists()
    trained(start(folder))
    assert adapter(folder) == adapter(straight)
    assert losses(folder) == losses(straight)

    trained(start(moved, processes=1, devices=1, mesh="1,1,1"))
    np.testing.assert_allclose(losses(moved), losses(straight), rtol=1e-5)


def test_each_process_feeds_the_rows_of_its_devices(tmp_path):
    ended = start(tmp_path, "rows")
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]


def test_two_processes_go_on_answering_where_one_was(tmp_path):
    names = ("answers", "verdicts", "base", "adapted", "scores")
    found, one, two = [], tmp_path / "one", tmp_path / "two"
    for folder, processes in ((one, 1), (two, 2)):
        ended = start(folder, "evaluate", processes=processes, mesh="2,4,1")
        assert [status for status, _, _ in ended] == [0] * processes, ended[0][2] + ended[-1][2]
        found.append({name: next(folder.glob(f"{name}.json*")).read_text() for name in names})
        if folder == one:
            two.mkdir()
            kept = found[0]["answers"].splitlines(keepends=True)[:9]
            (two / "answers.jsonl").write_text("".join(kept) + '{"key": "cut')
    scores = [json.loads(each.pop("scores")) for each in found]
    np.testing.assert_allclose(*([score.pop("perplexity") for score in both] for both in scores), rtol=1e-5)
    assert scores[0] == scores[1] and found[0] == found[1] and len(found[0]["answers"].splitlines()) == 2 * 12


def test_two_processes_run_a_sweep(tmp_path):
    ended = start(tmp_path, "sweep", mesh="2,4,1")
    assert [status for status, _, _ in ended] == [0, 0], ended[0][2] + ended[1][2]
    first, second = (json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/cells/aligned.json")))
    assert first["scores"] == second["scores"] and first["scores"]["over_refusal"]["n"] == 8
    assert (tmp_path / "sweep.md").exists() and len(list(tmp_path.glob("providers/*/buffer/adapter"))) == 1
