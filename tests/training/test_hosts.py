"""Two processes of four devices do what one of eight does; they stop together, and go down together.

Each process is tests/training/hosts_run.py; collectives between them are gloo's. The one process is this one.
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

import hosts_run
import jax
import numpy as np
import pytest
from safetensors.numpy import load

from br_jax.core.io import read_jsonl
from br_jax.core.mesh import make_mesh
from br_jax.training.folder import MetricWriter

SCRIPT = pathlib.Path(__file__).with_name("hosts_run.py")
STEPS = 20  # the script's
pytestmark = pytest.mark.slow
ABORTED = -signal.SIGABRT


def start(workdir, *acts):
    """Runs the script in two processes of four devices; returns [(exit status, stdout, stderr), one a process]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, SCRIPT, workdir, f"{i}/2", port, 4, *acts] for i in range(2)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(list(map(str, command)), **pipes) for command in commands]
    ended = [(*process.communicate(), process.returncode) for process in started]
    return [(status, GLOO.sub("", out), err) for out, err, status in ended]


# gloo speaks of its connections, several threads at once and piece by piece
GLOO = re.compile(r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+")


def losses(folder):
    return [record["loss"] for record in read_jsonl(folder / "user" / "metrics.jsonl")]


def adapter(folder):
    return (folder / "user" / "adapter" / "adapter_model.safetensors").read_bytes()


def steps(folder):
    return sorted(int(path.name) for path in (folder / "user" / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder of one process of eight devices, this one: "whole", "cut" (stopped at step 6) and "answered"."""
    folder = tmp_path_factory.mktemp("alone")
    hosts_run.train(folder / "whole", make_mesh(1, 8, 1))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = MetricWriter.write

        def stop(self, record):
            write(self, record)
            if record["step"] == 6:
                raise KeyboardInterrupt

        patch.setattr(MetricWriter, "write", stop)
        hosts_run.train(folder / "cut", make_mesh(1, 8, 1))
    hosts_run.score(folder / "answered", make_mesh(2, 4, 1))
    return folder


@pytest.fixture(scope="module")
def two(alone, tmp_path_factory):
    """A folder of two processes that did everything in one life, until one of them got SIGTERM."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(alone / "cut", folder / "moved")
    kept = (alone / "answered" / "answers.jsonl").read_text().splitlines(keepends=True)[:9]
    (folder / "answered").mkdir()
    (folder / "answered" / "answers.jsonl").write_text("".join(kept) + '{"key": "cut')
    works = "rows:rows:1,8,1", "train:whole:1,8,1", "train:moved:2,4,1", "evaluate:answered:2,4,1", "sweep:swept:2,4,1"
    ended = start(folder, *works, "train:stopped:1,8,1:term:1:5")
    assert [status for status, _, _ in ended] == [143, 143], ended[0][2] + ended[1][2]
    assert [out.split() for _, out, _ in ended] == [[work.partition(":")[0] for work in works], []]
    last = ended[0][2].splitlines()[-1]
    at = steps(folder / "stopped")[-1]
    assert last == f"user: stopped by SIGTERM at step {at}: the same command goes on from there"
    assert last not in ended[1][2] and 5 <= at < STEPS - 2 and len(losses(folder / "stopped")) == at
    return folder


def test_two_processes_train_what_one_does(alone, two):
    one, both = alone / "whole", two / "whole"
    assert len(losses(both)) == STEPS and len(set(losses(both))) == STEPS
    np.testing.assert_allclose(losses(both), losses(one), rtol=1e-6, atol=1e-6)
    theirs, ours = load(adapter(one)), load(adapter(both))
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, err_msg=name)
    files = [sorted(str(path.relative_to(f)) for path in f.rglob("*") if path.is_file()) for f in (one, both)]
    assert files[0] == files[1]
    probes = [[r["loss"] for r in read_jsonl(folder / "user" / "probes.jsonl")] for folder in (one, both)]
    np.testing.assert_allclose(*probes, rtol=1e-6)
    stages = [json.loads((folder / "user" / "stage.json").read_text()) for folder in (one, both)]
    for name in ("tokens", "answer_tokens", "steps", "rows", "inputs", "config_hash"):
        assert stages[0][name] == stages[1][name]


def test_a_run_goes_on_in_more_processes_and_on_fewer_devices(alone, two, tmp_path):
    np.testing.assert_allclose(losses(two / "moved"), losses(alone / "whole"), rtol=1e-5)
    one = shutil.copytree(two / "stopped", tmp_path / "one_device")
    hosts_run.train(one, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    np.testing.assert_allclose(losses(one), losses(two / "whole"), rtol=1e-5)


def test_two_processes_go_on_answering_where_one_was(alone, two):
    names = ("answers", "verdicts", "base", "adapted")
    found = [{name: (f / "answered" / f"{name}.jsonl").read_text() for name in names} for f in (alone, two)]
    scores = [json.loads((folder / "answered" / "scores.json").read_text()) for folder in (alone, two)]
    for number in ("perplexity", "margin_benign"):
        np.testing.assert_allclose(*([score.pop(number) for score in both] for both in scores), rtol=1e-5)
    margins = [[score["outcomes"].pop("margin_benign") for score in both] for both in scores]
    np.testing.assert_allclose(*margins, atol=2e-3)  # of three decimals
    assert scores[0] == scores[1] and found[0] == found[1] and len(found[0]["answers"].splitlines()) == 2 * 12


def test_two_processes_run_a_sweep(two):
    swept = two / "swept"
    first, second = (json.loads(path.read_text()) for path in sorted(swept.glob("runs/*/cells/aligned.json")))
    assert first["scores"] == second["scores"] and first["scores"]["over_refusal"]["n"] == 5
    assert (swept / "sweep.md").exists() and len(list(swept.glob("providers/*/buffer/adapter"))) == 1


def test_stopped_by_one_and_killed_one_by_one_the_adapter_is_bit_equal(two):
    for process in (1, 0):
        ended = start(two, f"train:stopped:1,8,1:kill:{process}:1")
        assert ended[process][0] == -signal.SIGKILL
        status, _, said = ended[1 - process]
        assert status in (ABORTED, os.EX_TEMPFAIL)
        told = next(line for line in said.splitlines() if line.startswith(f"process {1 - process} of 2 waits"))
        assert told.endswith("another one died or never came: the same command goes on from the last checkpoint")
        assert not (two / "stopped" / "user" / "stage.json").exists()
    ended = start(two, "train:stopped:1,8,1")
    assert [(status, out.split()) for status, out, _ in ended] == [(0, ["train"]), (0, [])], ended
    assert adapter(two / "stopped") == adapter(two / "whole")
    assert losses(two / "stopped") == losses(two / "whole")
