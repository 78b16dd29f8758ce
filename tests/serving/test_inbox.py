"""What comes into an inbox is taken whole, once, and believed in nothing."""

import contextlib
import dataclasses
import json
import os
import socket

import pytest

from br_jax.core.errors import UserError
from br_jax.serving import inbox as module
from br_jax.serving.inbox import Accepted, Inbox, Refused
from br_jax.serving.policy import Policy, Quotas
from br_jax.training.config import TrainConfig
from br_jax.training.jobs import NAME

ROWS = '{"prompt": "a", "response": "b"}\n'


@pytest.fixture
def policy():
    kinds = ("calibrate_harmful", "calibrate_benign", "canaries_harmful", "canaries_benign")
    prompts = {kind: ["x"] for kind in kinds}
    return Policy(TrainConfig(), **prompts, users_may_set={"epochs": (1, 3)}, quotas=Quotas(megabytes=0.001))


@pytest.fixture
def make_inbox(tmp_path, policy):
    """make_inbox(settle=0.0, names=(), **quotas) -> an inbox with files; by default it takes them at once."""

    def make(settle=0.0, names=(), **quotas):
        for folder in ("in", "jobs"):
            (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / f"in/{name}.jsonl").write_text(ROWS)
        own = dataclasses.replace(policy, quotas=Quotas(**quotas)) if quotas else policy
        return Inbox(tmp_path / "in", tmp_path / "jobs", own, settle=settle)

    return make


@pytest.fixture
def inbox(make_inbox):
    return make_inbox()


def settled(inbox, unfinished=(), wait=lambda: None):
    """What two scans find: at the first, files are only seen."""
    list(inbox.scan(unfinished))
    wait()
    return list(inbox.scan(unfinished))


def test_a_job_is_copied_and_the_inbox_is_left_alone(inbox, tmp_path):
    (tmp_path / "in/a.jsonl").write_text(ROWS)
    (tmp_path / "in/b.jsonl").write_text(ROWS * 2)
    (tmp_path / "in/b.json").write_text('{"epochs": 2}')
    before = sorted(os.listdir(tmp_path / "in"))
    a, b = settled(inbox)
    assert (a.name, a.number, a.settings, b.name, b.number, b.settings) == ("a", 1, {}, "b", 2, {"epochs": 2})
    assert b.rows.read_text() == ROWS * 2 and sorted(os.listdir(tmp_path / "in")) == before
    assert b.rows.stat().st_mode & 0o777 == 0o600 and b.rows.parent.stat().st_mode & 0o777 == 0o700
    assert settled(inbox) == []
    again = Inbox(inbox.folder, tmp_path / "jobs", inbox._policy, settle=0.0)
    assert again.accepted() == [a, b] and settled(again) == [] and not again.unsettled


def test_a_file_that_changes_is_waited_for(make_inbox, tmp_path, monkeypatch):
    now = [0.0]
    wait = lambda: now.__setitem__(0, now[0] + 3)  # noqa: E731
    monkeypatch.setattr("br_jax.serving.inbox.time.monotonic", lambda: now[0])
    inbox = make_inbox(settle=2.0)
    file = tmp_path / "in/a.jsonl"
    for size in range(1, 4):  # half copied: a second apart
        file.write_text(ROWS * size)
        assert list(inbox.scan()) == [] and inbox.unsettled
        now[0] += 1
    assert list(inbox.scan()) == []
    now[0] += 1
    (job,) = inbox.scan()
    assert job.rows.read_text() == ROWS * 3 and not inbox.unsettled
    os.utime(file, (0, 0))  # a clock that was set back, or a touch: the same rows
    now[0] += 5
    assert settled(inbox, wait=wait) == []
    file.write_text(ROWS)
    (refused,) = settled(inbox, wait=wait)
    assert refused.name.startswith("a+refused-") and "give it another name" in refused.why
    assert [job.name for job in inbox.accepted()] == ["a"]


def test_a_file_that_changes_while_it_is_copied_is_no_job(inbox, tmp_path, monkeypatch):
    file = tmp_path / "in/a.jsonl"
    file.write_text(ROWS)
    read = module._read

    def slow(path, most=None):
        for part in read(path, most):
            with file.open("a") as more:
                more.write(ROWS)
            yield part

    list(inbox.scan())
    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", slow)
        (refused,) = inbox.scan()
    assert "changed while it was read" in refused.why and not (tmp_path / "jobs/a").exists()
    (job,) = settled(inbox)
    assert isinstance(job, Accepted) and job.rows.read_text() == ROWS * 2


def test_a_scan_costs_what_is_new(inbox, tmp_path, monkeypatch):
    """Those done with are looked at a few at a time: a change is seen, one that is gone is forgotten."""
    looked, scandir = [], os.scandir

    class Entry:
        def __init__(self, entry):
            self.name, self.path, self._entry = entry.name, entry.path, entry

        def stat(self, **how):
            looked.append(self.name)
            return self._entry.stat(**how)

    for i in range(250):
        (tmp_path / f"in/{i}.txt").write_text("no job")
    assert len(settled(inbox)) == 250
    monkeypatch.setattr(os, "scandir", lambda folder: map(Entry, scandir(folder)))
    for _ in range(3):
        looked.clear()
        assert not list(inbox.scan()) and 0 < len(looked) <= 100
    (tmp_path / "in/249.txt").write_text("another")
    (tmp_path / "in/248.txt").unlink()
    found = [refused.file for _ in range(5) for refused in inbox.scan()]
    assert found == ["'249.txt'"]
    (tmp_path / "in/248.txt").write_text("no job")
    assert [refused.file for refused in settled(inbox)] == ["'248.txt'"]


@pytest.mark.parametrize(
    ("quotas", "names", "unfinished", "first", "then"),
    [
        ({"waiting": 3}, ["a", "b", "c"], "anna.0", ["a", "b"], ["c"]),
        # who always has more, under names that sort first, keeps nobody out
        ({"waiting": 3}, ["aaa.1", "aaa.2", "aaa.3", "zoe"], "aaa.0", ["zoe", "aaa.1"], ["aaa.2", "aaa.3"]),
        (
            {"jobs": 2},
            ["anna", "anna.1", "anna.2", "anna2", "ben.1"],
            "anna.0",
            ["anna2", "ben.1", "anna.1"],
            ["anna.2", "anna"],
        ),
    ],
)
def test_no_more_are_taken_than_there_is_room_for(make_inbox, quotas, names, unfinished, first, then):
    inbox = make_inbox(names=names, **quotas)
    assert [job.name for job in settled(inbox, [unfinished])] == first and inbox.unsettled
    assert [job.name for job in inbox.scan([])] == then and not inbox.unsettled


def test_settings_that_are_corrected_alone_are_seen(make_inbox, tmp_path):
    inbox = make_inbox(names="a")
    (tmp_path / "in/a.json").write_text("{")
    assert not list(inbox.scan())
    (refused,) = inbox.scan()
    assert isinstance(refused, Refused) and not list(inbox.scan())
    (tmp_path / "in/a.json").write_text("{}")
    (job,) = settled(inbox)
    assert isinstance(job, Accepted) and not job.settings


def test_a_disk_that_is_full_is_not_the_files_fault(make_inbox, monkeypatch):
    inbox = make_inbox(names="a")
    list(inbox.scan())
    with monkeypatch.context() as patch, pytest.raises((UserError, OSError), match="No space left"):
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        list(inbox.scan())
    (job,) = inbox.scan()
    assert isinstance(job, Accepted)


def test_a_file_that_grows_when_it_is_opened_is_refused(make_inbox, tmp_path, monkeypatch):
    """What is looked at and what is opened may be two files."""
    inbox = make_inbox(names="a")
    list(inbox.scan())
    settings = inbox._settings
    monkeypatch.setattr(
        inbox, "_settings", lambda path: os.truncate(tmp_path / "in/a.jsonl", 1 << 30) or settings(path)
    )
    (refused,) = inbox.scan()
    assert "1,000 are the most" in refused.why and not [*(tmp_path / "jobs").iterdir()]


BAD_NAMES = {
    **dict.fromkeys(("rows.csv", "rows", "rows.jsonl.gz", "rows.JSONL"), "does not end in .jsonl"),
    **dict.fromkeys(("a b.jsonl", "ü.jsonl", "-\n.jsonl", "x" * 150 + ".jsonl", "$(rm -rf x).jsonl"), "name it by"),
    **dict.fromkeys(("\x1b[2J.jsonl", "a;b.jsonl", "~.jsonl"), "name it by"),
}
BAD_SETTINGS = {
    "unknown": ('{"dropout": 1}', "not a user's to set"), "above": ('{"epochs": 9}', "from 1 to 3"),
    "text": ('{"epochs": "1"}', "from 1 to 3"), "list": ("[1]", "no JSON object"), "cut": ('{"epo', "not valid"),
    "deep": ("[" * 9000, ""), "long": ('{"epochs": 1' + " " * 70_000 + "}", "are the most"),
    "nan": ('{"epochs": NaN}', ""), "null": ("null", "no JSON object"), "binary": ("\x00\x01", ""),
    "infinite": ('{"epochs": 1e999}', "from 1 to 3"), "below": ('{"epochs": -1}', "from 1 to 3"),
    "path": ('{"workdir": "/"}', "not a user's to set"), "nested": ('{"epochs": {"epochs": 1}}', "from 1 to 3"),
}  # fmt: skip


def hostile(folder):
    """Files that are no jobs: {name: what is said of it}."""
    for name in (*BAD_NAMES, *(f"{name}.jsonl" for name in (*BAD_SETTINGS, "linked", "piped"))):
        (folder / name).write_text(ROWS)
    for name, (text, _) in BAD_SETTINGS.items():
        (folder / f"{name}.json").write_text(text)
    (folder / "large.jsonl").write_text(ROWS * 100)
    (folder / "huge.jsonl").touch()
    os.truncate(folder / "huge.jsonl", 1 << 30)  # a line of a gigabyte
    (folder.parent / "secret").write_text("root:x:0:0\n")
    for name, where in (("link.jsonl", "../secret"), ("dangling.jsonl", "nowhere"), ("linked.json", "../secret")):
        os.symlink(where, folder / name)
    for name in ("pipe.jsonl", "piped.json"):
        os.mkfifo(folder / name)
    (folder / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(folder):
        end.bind("socket.jsonl")
    said = {f"{name}.jsonl": said for name, (_, said) in BAD_SETTINGS.items()} | {"linked.jsonl": "cannot be read"}
    said |= dict.fromkeys(("large.jsonl", "huge.jsonl"), "1,000 are the most")
    irregular = ("link", "dangling", "pipe", "folder", "socket", "piped")
    return BAD_NAMES | said | dict.fromkeys((f"{name}.jsonl" for name in irregular), "no regular file")


def test_hostile_files_are_a_line_each(inbox, tmp_path):
    files = hostile(tmp_path / "in")
    for name in ("good.jsonl", ".a.jsonl", "a.jsonl.part", "a.tmp", "a.json"):  # all but the first are unfinished
        (tmp_path / "in" / name).write_text(ROWS)
    found = settled(inbox)
    assert [job.name for job in found if isinstance(job, Accepted)] == ["good"]
    said = {refused.file: refused for refused in found if isinstance(refused, Refused)}
    assert said.keys() == {ascii(name) for name in files}
    for name, words in files.items():
        refused = said[ascii(name)]
        assert words in refused.why and "\n" not in refused.why and refused.why.isprintable(), refused
        assert "/" not in refused.name and not refused.name.startswith(".") and len(refused.name) < 120
        assert "root:x" not in refused.why and NAME.fullmatch(refused.name) is None, "a job may have that name"
    assert len({refused.name for refused in said.values()}) == len(files)
    assert settled(inbox) == []
    assert json.loads((tmp_path / "jobs/good/job.json").read_text())["number"] == 1
