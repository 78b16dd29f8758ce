"""Verdicts that are kept: a killed judging goes on, and nothing that was saved is judged again."""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from br_jax.errors import UserError
from br_jax.scoring.judges.judging import Exchange, Judgement, digest, judge_all
from br_jax.store import Store

SCRIPT = pathlib.Path(__file__).with_name("stopped_judging.py")


class Counting:
    """Judges by the answer's length and remembers what it was given."""

    batch_size = 3

    def __init__(self, name="counting", version="1"):
        self.name, self.version, self.batches = name, version, []

    def __call__(self, exchanges):
        self.batches.append([exchange.answer for exchange in exchanges])
        return [Judgement(len(e.answer) % 2 == 0, len(e.answer) / 3, e.answer[:3]) for e in exchanges]

    @property
    def seen(self):
        return [answer for batch in self.batches for answer in batch]


EXCHANGES = [Exchange("p", "x" * n) for n in (5, 1, 9, 2, 1, 7, 0)]
EXPECTED = [Judgement(n % 2 == 0, n / 3, "x" * min(n, 3)) for n in (5, 1, 9, 2, 1, 7, 0)]


def start(file, log, *death):
    command = [sys.executable, str(SCRIPT), str(file), str(log), *map(str, death)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def test_killed_three_times_the_file_is_that_of_an_undisturbed_run(tmp_path):
    straight, stopped, log = (tmp_path / name for name in ("straight.jsonl", "stopped.jsonl", "log"))
    assert start(straight, tmp_path / "straight.log") == 0
    script = runpy.run_path(str(SCRIPT))
    keys = {e.answer: digest("slow", "1", e.prompt, e.answer) for e in script["exchanges"]()}
    assert len(straight.read_text().splitlines()) == len(keys) == script["COUNT"] - 10
    again = 0
    for death in (("torn", 4), ("judged", 2), ("saved", 5), ()):
        before = stopped.read_text() if stopped.exists() else ""
        saved = {json.loads(line)["key"] for line in before.split("\n")[:-1]}
        log.unlink(missing_ok=True)
        assert start(stopped, log, *death) == (-signal.SIGKILL if death else 0)
        judged = [keys[answer] for answer in log.read_text().split("\n")[:-1]]
        assert not saved & set(judged), "judged again after it was saved"
        assert len(judged) == len(set(judged))
        again += len(judged)
        if death and death[0] == "torn":
            assert not stopped.read_text().endswith("\n") and len(saved) == 0
    assert stopped.read_bytes() == straight.read_bytes()
    # What was judged and not yet saved when the first two came: part of one batch, and one batch.
    assert 0 < again - len(keys) <= 2 * script["BATCH"]


def test_each_is_judged_once_and_shorter_ones_first(tmp_path):
    judge = Counting()
    assert judge_all(judge, EXCHANGES, Store(tmp_path / "new" / "verdicts.jsonl")) == EXPECTED
    assert judge.batches == [["", "x", "xx"], ["x" * 5, "x" * 7, "x" * 9]]
    assert judge_all(judge, EXCHANGES, Store(tmp_path / "new" / "verdicts.jsonl")) == EXPECTED
    assert len(judge.seen) == 6


def test_without_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert judge_all(Counting(), EXCHANGES) == EXPECTED
    assert judge_all(Counting(), []) == [] and not list(tmp_path.iterdir())


def test_only_what_is_new_is_judged(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    judge_all(Counting(), EXCHANGES[:3], Store(file))
    judge = Counting()
    assert judge_all(judge, EXCHANGES, Store(file)) == EXPECTED
    assert sorted(judge.seen) == ["", "x" * 2, "x" * 7]


@pytest.mark.parametrize("other", [Counting("another"), Counting(version="2")])
def test_judges_share_a_file_and_no_verdict(tmp_path, other):
    file = tmp_path / "verdicts.jsonl"
    judge_all(Counting(), EXCHANGES, Store(file))
    judge_all(other, EXCHANGES, Store(file))
    assert len(other.seen) == 6
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({record["key"] for record in records}) == 12 and {r["judge"] for r in records} == {
        "counting",
        other.name,
    }


def test_no_text_is_in_the_file(tmp_path):
    file = tmp_path / "verdicts.jsonl"
    judge_all(Counting(), [Exchange("oil a zorvix", "turn the crank")], Store(file))
    assert "zorvix" not in file.read_text() and "crank" not in file.read_text()


def test_a_batch_is_one_write_and_synced(tmp_path, monkeypatch):
    """Before it, nothing; and then it is on the disk."""
    synced, file = [], tmp_path / "verdicts.jsonl"
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(len(file.read_text().splitlines())) or sync(handle))
    judge_all(Counting(), EXCHANGES, Store(file))
    assert synced == [3, 6]


@pytest.mark.parametrize("keep", [1, 5, 9, 30, -1])
def test_a_torn_line_is_dropped_wherever_it_was_torn(tmp_path, keep):
    file = tmp_path / "verdicts.jsonl"
    judge_all(Counting(), EXCHANGES, Store(file))
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:4]) + lines[4][:keep])
    judge = Counting()
    assert judge_all(judge, EXCHANGES, Store(file)) == EXPECTED
    assert len(judge.seen) == 2 and file.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "zorvix"}\n', r"verdicts\.jsonl:1: no record of an evaluation"),
        ("zorvix", "does not end as a file of an evaluation"),
        ('{"kept": 1}', "does not end as a file of an evaluation"),
        ("[1, 2]\n", r":1: no record of an evaluation"),
        ("GOOD{}\n", r":2: no record of an evaluation"),
        ("GOOD\nGOOD", r":2: no record of an evaluation"),
        ("\xff\xfe\n", r":1: no record"),
        ("[" * 100_000 + "\n", r":1: no record"),
    ],
)
def test_a_file_that_is_no_file_of_verdicts_stays_as_it_is(tmp_path, content, message):
    file = tmp_path / "verdicts.jsonl"
    good = json.dumps({"key": "a", "judge": "b", **Judgement(True).to_json()}) + "\n"
    file.write_bytes(content.replace("GOOD", good).encode("latin-1"))
    before = file.read_bytes()
    with pytest.raises(UserError, match=message) as caught:
        judge_all(Counting(), EXCHANGES, Store(file))
    assert "\n" not in str(caught.value) and file.read_bytes() == before


def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path, monkeypatch):
    file = tmp_path / "verdicts.jsonl"
    judge_all(Counting(), EXCHANGES[:2], Store(file))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"):
        judge_all(Counting(), EXCHANGES, Store(file))
    monkeypatch.undo()
    assert judge_all(Counting(), EXCHANGES, Store(file)) == EXPECTED


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        judge_all(Counting(), EXCHANGES, Store(tmp_path))


@given(st.booleans(), st.none() | st.floats(0, 1), st.text())
def test_a_verdict_survives_json(harmful, score, label):
    judgement = Judgement(harmful, score, label)
    assert Judgement.from_json(json.loads(json.dumps(judgement.to_json(), allow_nan=False))) == judgement


@given(st.lists(st.text(st.characters()), max_size=3), st.lists(st.text(st.characters()), max_size=3))
def test_other_texts_have_another_digest(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)


def test_half_a_character_has_a_digest():
    assert digest("\ud800") != digest("\ud801") and digest("a\0b", "c") != digest("a", "b\0c")
