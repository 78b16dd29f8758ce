"""The log only grows, and what was changed in it is noticed; the table."""

import io
import json
import os

import pytest

from br_jax.core.errors import UserError
from br_jax.serving.reports import Audit, Table


def entries(path, *more):
    """What a log holds after more jobs were received."""
    audit = Audit(path)
    for job in more:
        audit.write("received", job, rows=job)
    audit.close()
    return [(entry["number"], entry["job"]) for entry in audit.entries]


@pytest.fixture
def log(tmp_path):
    """A log of three entries."""
    entries(tmp_path / "audit.jsonl", "job0", "job1", "job2")
    return tmp_path / "audit.jsonl"


def test_it_goes_on_where_it_ended_and_a_line_cut_off_by_a_kill_is_left_out(log):
    assert entries(log, "job3") == [(1, "job0"), (2, "job1"), (3, "job2"), (4, "job3")]
    log.write_bytes(log.read_bytes()[:-7])
    assert entries(log, "job4") == [(1, "job0"), (2, "job1"), (3, "job2"), (4, "job4")]
    assert [json.loads(line)["number"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert os.stat(log).st_mode & 0o777 == 0o600


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


def test_the_table():
    class Screen(io.StringIO):
        def isatty(self):
            return True

    status = {
        "turn": 3, "training": {f"job{i}": {"step": i, "of": 9, "loss": 0.5} for i in range(22)}, "waiting": ["x"],
        "to_be_looked_at": [], "released": 4, "held": 1, "tokens_per_second": 1234.5,
    }  # fmt: skip
    screen, log = Screen(), io.StringIO()
    for out in (screen, log):
        table = Table(out)
        for _ in range(2):
            table.show(status)
            table._next = 0.0
    first = "turn 3: 22 training, 1 waiting, 0 to be looked at, 4 released, 1 held; 1,234 tokens/s\n"
    assert log.getvalue() == first * 2
    assert first in screen.getvalue() and "job19" in screen.getvalue() and "and 2 more" in screen.getvalue()
    assert "\x1b[24F\x1b[J" in screen.getvalue()
