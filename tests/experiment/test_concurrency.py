"""Several processes on one workdir: one works, the others say who does or wait, and nothing is lost or doubled.

BR_JAX_ROUNDS=20 pytest --timeout=0 tests/experiment/test_concurrency.py    # minutes a round: not run without it
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from br_jax.core.store import Store

ROOT = pathlib.Path(__file__).parents[2]
ROUNDS = int(os.environ.get("BR_JAX_ROUNDS", "0"))
CONFIG = "--config=configs/demo.py:smoke"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ROUNDS, reason="BR_JAX_ROUNDS says how often")]


def start(script, workdir, *flags):
    command = [sys.executable, f"experiments/{script}.py", CONFIG, f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def whole(workdir):
    """Every line is a record, no key is there twice, and every step was logged once."""
    stores = [*workdir.rglob("answers.jsonl"), *workdir.rglob("forced.jsonl"), *workdir.rglob("verdicts.jsonl")]
    for file in stores:
        Store(file)
        keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
        assert keys and len(keys) == len(set(keys)) and b"\x00" not in file.read_bytes(), file
    for file in workdir.rglob("metrics.jsonl"):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2], file
    return stores


@pytest.mark.parametrize(
    "scripts", [["pipeline"] * 2, ["pipeline"] * 3, ["sweep"] * 2, ["pipeline", "evaluate"]], ids=" ".join
)
@pytest.mark.parametrize("round_", range(ROUNDS))
def test_one_works_and_the_others_say_who(tmp_path, scripts, round_):
    processes = [start(script, tmp_path / "w") for script in scripts]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    for said, status in ended:
        assert "Traceback" not in said and status in (0, 1, 2), said  # 1: of two steps the attack learns nothing
        if status == 2:
            assert "works there: wait until it has ended" in said.splitlines()[-1], said
    working = [status for _, status in ended if status != 2]
    assert len(working) == (len(scripts) if "sweep" in scripts else 1), ended
    last = start(scripts[0], tmp_path / "w")
    assert last.communicate() and last.returncode != 2
    assert whole(tmp_path / "w")


def test_two_users_share_a_provider_s_folder(tmp_path):
    """Both make it at once: each stage is made by one of them, and the other takes it."""
    processes = [start("pipeline", tmp_path / name, f"--config.provider={tmp_path / 'provider'}") for name in "ab"]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    assert all(status != 2 and "Traceback" not in said for said, status in ended), ended
    assert whole(tmp_path)
    records = [json.loads((tmp_path / name / "results.json").read_text())["hashes"] for name in "ab"]
    for made in ("aligned", "buffer", "reinforce"):
        assert records[0][made] == records[1][made]
