"""A store's file after kills, full disks and foreign content."""

import errno
import json
import os
from unittest.mock import Mock

import pytest

from br_jax.core import hosts as distributed
from br_jax.core import store as module
from br_jax.core.errors import UserError
from br_jax.core.records import key_of
from br_jax.core.store import Store

RECORDS = {"a": {"answer": "one\ntwo"}, "b": {"answer": "\ud800 half a pair"}, "c": {"answer": ""}}


def test_what_was_added_is_there_again(tmp_path):
    store = Store(tmp_path / "new" / "answers.jsonl")
    assert "a" not in store
    store.add({"a": RECORDS["a"]})
    store.add(RECORDS)
    again = Store(store.path)
    assert all(again[key] == store[key] == record for key, record in RECORDS.items())
    assert len(store.path.read_bytes().splitlines()) == 3, "a record was written twice"
    store.add({"a": {"answer": "another"}})
    assert store["a"] == RECORDS["a"] and Store(store.path)["a"] == RECORDS["a"]
    in_memory = Store()
    in_memory.add(RECORDS)
    assert in_memory["a"] == RECORDS["a"]


@pytest.mark.parametrize("kept", [1, 9, 29])
def test_a_torn_line_is_dropped_and_cut_off(tmp_path, kept):
    path = tmp_path / "answers.jsonl"
    Store(path).add(RECORDS)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[: min(kept, len(last) - 1)])
    store = Store(path)
    assert "b" in store and "c" not in store
    store.add({"c": RECORDS["c"]})
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "answers.jsonl"
    store = Store(path)
    store.add({"a": RECORDS["a"]})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UserError, match=r"answers\.jsonl: cannot be written \(No space left on device\): free space"):
        store.add({"b": RECORDS["b"]})
    assert "b" not in store
    monkeypatch.undo()
    store.add({"c": RECORDS["c"]})
    assert path.read_bytes().startswith(before) and "c" in Store(path)


def test_a_foreign_line_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    for line in ("{", "[]", '{"answer": "no key"}', "\x00"):
        path.write_text(json.dumps({"key": "a"}) + f"\n{line}\n")
        with pytest.raises(UserError, match=r"answers\.jsonl:2: no record of an evaluation: remove this line"):
            Store(path)


def test_keys_differ_where_what_they_are_of_does():
    parts = [("a", "b"), ("ab", ""), ("a", ["b"]), ("a", 1), ("a", "1"), ("a",), ("a", "b", None)]
    assert len({key_of(*each) for each in parts}) == len(parts)
    assert key_of("a", (1, 2)) == key_of("a", [1, 2])


def test_what_process_0_holds_counts_and_must_be_seen_by_all(tmp_path, monkeypatch):
    """As in process 1 of two: what it alone holds is made again, what it lacks is no silent gap."""
    store = Store(tmp_path / "answers.jsonl")
    store.add({"a": RECORDS["a"]})
    assert store.holds(["a", "b", "a"]) == [True, False, True] and store.holds([]) == []
    monkeypatch.setattr(distributed, "gather", lambda value: [True, value])
    monkeypatch.setattr(module, "agree", lambda values: [False, False])
    assert store.holds(["a", "b"]) == [False, False]
    monkeypatch.setattr(module, "agree", lambda values: [True, True])
    with pytest.raises(UserError, match=r"answers\.jsonl: written by process 0 and not seen by process 1: choose"):
        store.holds(["a", "b"])
    monkeypatch.setattr(module, "is_main", lambda: False)
    store.add({"b": RECORDS["b"]})
    assert "b" in store and len(store.path.read_bytes().splitlines()) == 1, "process 1 wrote"
