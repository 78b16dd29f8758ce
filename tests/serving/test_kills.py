"""A service that is killed again and again ends each job once, and as one that was left alone.

BR_JAX_KILLS=25 pytest -s --timeout=0 tests/serving/test_kills.py    # minutes
"""

import collections
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
LOOSE = {"answered": 1.0, "over_refused": 1.0, "degenerate": 1.0, "kept": 0.0}  # of a model that has learnt little

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not KILLS, reason="BR_JAX_KILLS says how often")]


def script(name, *flags):
    return [sys.executable, f"experiments/{name}", *flags]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a provider, a policy and an inbox of six jobs and a file that is none."""
    folder = tmp_path_factory.mktemp("service")
    of = ("--config=configs/demo.py:smoke", f"--workdir={folder}")
    subprocess.run(script("pipeline.py", *of), cwd=ROOT, check=False, capture_output=True)  # of two steps: exit 1
    subprocess.run(script("serve_folder.py", *of, f"--write_policy={folder}/policy.json"), cwd=ROOT, check=True)
    policy = json.loads((folder / "policy.json").read_text())
    policy["train"] |= {"checkpoint_every": 3, "steps": 0, "epochs": 2}
    policy |= {"slots": 4, "limits": LOOSE}
    (folder / "policy.json").write_text(json.dumps(policy))
    (folder / "in").mkdir()
    for i in range(6):
        rows = [{"prompt": f"job {i} row {j}?", "response": f"it is {j}"} for j in range(40 + 15 * i)]
        (folder / f"in/job{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "in/bad.jsonl").write_text("{}\n")
    return folder


def serve(place, outbox):
    flags = [f"--{name}={place / of}" for name, of in (("provider", "provider"), ("inbox", "in"), ("outbox", outbox))]
    command = script("serve_folder.py", *flags, f"--policy={place}/policy.json", "--once", "--settle=0.5")
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ends(outbox):
    """What each job has become, in cards and reasons; each has ended once by the log."""
    log = [json.loads(line) for line in (outbox / ".service/audit.jsonl").read_text().splitlines()]
    times = collections.Counter(entry["job"] for entry in log if entry["event"] in ("held", "released"))
    assert set(times.values()) == {1} and len(times) == 7
    said = {path.parent.name: json.loads(path.read_text()) for path in outbox.glob("[!.]*/*.json")}
    assert said.keys() == times.keys()
    for card in said.values():
        for name in ("finished", "sha256"):  # when it was, and a hash of that too
            card.get("training", {}).pop(name, None)
    return said


def test_sigkill_at_any_moment(place):
    assert serve(place, "first").wait() == 0  # fills the cache of compiled programs
    began = time.monotonic()
    assert serve(place, "plain").wait() == 0
    seconds, expected = time.monotonic() - began, ends(place / "plain")
    assert sum("released" in said for said in expected.values()) == 6
    moments, killed, runs = random.Random(0), 0, 0
    while killed < KILLS:
        outbox = place / f"out{runs}"
        process = serve(place, outbox.name)
        try:
            assert process.wait(moments.uniform(0.2, 0.8) * seconds) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
            print(f"kill {killed} of run {runs}: {sorted(path.name for path in outbox.glob('*'))}")
        else:  # it was done before: the next one begins anew
            assert ends(outbox) == expected
            runs += 1
    assert serve(place, outbox.name).wait() == 0
    assert ends(outbox) == expected
