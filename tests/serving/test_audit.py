"""The log only grows; what was changed in it is noticed, what a kill left of a line is cut off."""

import json
import os

import pytest

from br_jax.core.errors import UserError
from br_jax.serving.audit import Audit


@pytest.fixture
def log(tmp_path):
    """A log of three entries."""
    audit = Audit(tmp_path / "audit.jsonl")
    for i in range(3):
        audit.write("received", f"job{i}", rows=i)
    audit.close()
    return tmp_path / "audit.jsonl"


def test_it_goes_on_where_it_ended(log):
    audit = Audit(log)
    assert [(entry["number"], entry["job"], entry["rows"]) for entry in audit.entries] == [
        (1, "job0", 0), (2, "job1", 1), (3, "job2", 2),
    ]  # fmt: skip
    audit.write("held", "job0")
    audit.close()
    assert [json.loads(line)["number"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert os.stat(log).st_mode & 0o777 == 0o600


def test_a_line_cut_off_by_a_kill_is_left_out(log):
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    audit = Audit(log)
    assert len(audit.entries) == 2 and audit.entries[-1]["job"] == "job1"
    audit.write("received", "job2", rows=2)
    audit.close()
    assert len(Audit(log).entries) == 3


@pytest.mark.parametrize("how", ["changed", "removed", "swapped", "renumbered", "other", "list"])
def test_what_was_changed_is_noticed(log, how):
    lines = log.read_text().splitlines(keepends=True)
    changed = {
        "changed": [lines[0].replace("job0", "job9"), *lines[1:]],
        "removed": [lines[0], lines[2]],
        "swapped": [lines[1], lines[0], lines[2]],
        "renumbered": [lines[0], lines[2].replace('"number": 3', '"number": 2')],
        "other": [*lines, "{}\n"],
        "list": ["[1]\n", *lines],
    }
    log.write_text("".join(changed[how]))
    with pytest.raises(UserError, match=r"was changed, or one before it is gone|no entry of an audit log"):
        Audit(log)


def test_a_line_that_the_disk_takes_in_parts_is_whole(tmp_path, monkeypatch):
    """As it does when it is nearly full."""
    log, write = Audit(tmp_path / "audit.jsonl"), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:7]))
    log.write("received", "a", rows="1" * 64)
    log.write("trained", "a")
    log.close()
    monkeypatch.undo()
    again = Audit(tmp_path / "audit.jsonl")
    again.close()
    assert [entry["event"] for entry in again.entries] == ["received", "trained"]
