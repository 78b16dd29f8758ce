"""A store's file after kills, full disks and foreign content."""

import errno
import json
import os
from unittest.mock import Mock

import pytest

from br_jax.core import hosts
from br_jax.core import store as module
from br_jax.core.errors import UserError
from br_jax.core.records import key_of
from br_jax.core.store import Store

RECORDS = {"a": {"answer": "one\ntwo"}, "b": {"answer": "\ud800 half a pair"}, "c": {"answer": ""}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "answers.jsonl"


def test_what_was_added_is_there_again(path):
    store = Store(path)
    assert "a" not in store
    store.add({"a": RECORDS["a"]})
    store.add(RECORDS)
    store.add({"a": {"answer": "another"}})
    in_memory = Store()
    in_memory.add(RECORDS)
    assert all(each[key] == RECORDS[key] for each in (store, Store(path), in_memory) for key in RECORDS)
    assert len(path.read_bytes().splitlines()) == 3, "a record was written twice"


@pytest.mark.parametrize("kept", [1, 29])
def test_a_torn_line_is_dropped_and_cut_off(path, kept):
    Store(path).add(RECORDS)
    complete = path.read_bytes()
    last = complete.splitlines(keepends=True)[-1]
    path.write_bytes(complete[: -len(last)] + last[: min(kept, len(last) - 1)])
    store = Store(path)
    assert "b" in store and "c" not in store
    store.add({"c": RECORDS["c"]})
    assert path.read_bytes() == complete


def test_a_full_disk_leaves_complete_lines(path, monkeypatch):
    store = Store(path)
    store.add({"a": RECORDS["a"]})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"No space left on device: '.*answers\.jsonl'"):
        store.add({"b": RECORDS["b"]})
    assert "b" not in store
    monkeypatch.undo()
    store.add({"c": RECORDS["c"]})
    assert path.read_bytes().startswith(before) and "c" in Store(path)


def test_foreign_and_damaged_lines_are_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    for line in ("{", "[]", '{"answer": "no key"}', "\x00"):
        path.write_text(json.dumps({"key": "a"}) + f"\n{line}\n")
        with pytest.raises(UserError, match=r"answers\.jsonl:2: no record of an evaluation: remove this line"):
            Store(path)
    path.write_text(json.dumps({"key": "a", "answer": "b", "check": "0" * 16}) + "\n")
    with pytest.raises(UserError, match=r"answers\.jsonl:1: changed or damaged since it was written: remove this line"):
        Store(path)


def test_what_process_0_holds_counts_and_must_be_seen_by_all(path, monkeypatch):
    """As in process 1 of two: what it alone holds is made again, what it lacks is no silent gap."""
    store = Store(path)
    store.add({"a": RECORDS["a"]})
    assert store.holds(["a", "b", "a"]) == [True, False, True] and store.holds([]) == []
    monkeypatch.setattr(hosts, "gather", lambda value: [True, value])
    monkeypatch.setattr(module, "agree", lambda values: [False, False])
    assert store.holds(["a", "b"]) == [False, False]
    monkeypatch.setattr(module, "agree", lambda values: [True, True])
    with pytest.raises(UserError, match=r"answers\.jsonl: written by process 0 and not seen by process 1: choose"):
        store.holds(["a", "b"])
    monkeypatch.setattr(module, "is_main", lambda: False)
    store.add({"b": RECORDS["b"]})
    assert "b" in store and len(path.read_bytes().splitlines()) == 1, "process 1 wrote"


def test_keys_differ_where_what_they_are_of_does():
    parts = [("a", "b"), ("ab", ""), ("a", ["b"]), ("a", 1), ("a", "1"), ("a",), ("a", "b", None)]
    assert len({key_of(*each) for each in parts}) == len(parts)
    assert key_of("a", (1, 2)) == key_of("a", [1, 2])
