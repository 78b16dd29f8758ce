"""A run that is killed, or whose disk is full, goes on and ends as one that was left alone.

BR_JAX_KILLS=25 pytest --timeout=0 tests/experiment/test_kills.py    # minutes; the disks need root, to mount them
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("BR_JAX_KILLS", "0"))
ROUNDS = 5  # kills of one run, one after another
MIB = 2**20

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KILLS, reason="BR_JAX_KILLS says how often")]


def start(workdir):
    command = [sys.executable, "experiments/pipeline.py", "--config=configs/demo.py:smoke", f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(workdir):
    process = start(workdir)
    said = process.communicate()[1]
    assert "Traceback" not in said and process.returncode in (0, 1), said  # 1: of two steps the attack learns nothing
    return outcome(workdir)


def outcome(workdir):
    scores = {path.name: json.loads(path.read_text())["scores"] for path in (workdir / "cells").glob("*.json")}
    return json.loads((workdir / "results.json").read_text())["hashes"], scores


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run says that was left alone, its seconds and bytes; the first fills the cache of compiled programs."""
    finish(tmp_path_factory.mktemp("first") / "w")
    workdir, began = tmp_path_factory.mktemp("whole") / "w", time.monotonic()
    said = finish(workdir), time.monotonic() - began
    return *said, sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())


@pytest.mark.parametrize("seed", range(KILLS // ROUNDS))
def test_killed_again_and_again(whole, tmp_path, seed):
    expected, seconds, _ = whole
    moments, killed, runs = random.Random(seed), 0, 0
    while killed < ROUNDS:
        workdir = tmp_path / f"w{runs}"
        process = start(workdir)
        try:
            process.wait(moments.uniform(0.1, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        else:  # it was done before: the next one begins anew
            runs += 1
            assert outcome(workdir) == expected
        process.communicate()
    assert finish(workdir) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.parametrize("part", range(1, 15))
def test_a_full_disk(whole, tmp_path, part):
    """Of so many fourteenths of what the run leaves behind; it needs a little more than all."""
    disk, size = tmp_path / "disk", whole[2] * part // 14
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        process = start(disk / "w")
        said = process.communicate()[1]
        assert process.returncode in (0, 1) or (
            process.returncode == 2 and "No space left on device" in said.splitlines()[-1]
        ), said
        assert "Traceback" not in said
        print(f"{size} bytes: exit {process.returncode}: {said.splitlines()[-1] if said else ''}")
        subprocess.run(["mount", "-o", f"remount,size={64 * MIB}", disk], check=True)
        assert finish(disk / "w") == whole[0]
    finally:
        subprocess.run(["umount", disk], check=True)
