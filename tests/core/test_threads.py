"""Iterators side by side: what is the same whichever is the faster, an error of one, and a caller who stops."""

import threading

import pytest

from br_jax.core.threads import side_by_side


def test_the_order_is_that_of_turns_whichever_is_the_faster():
    gate = threading.Event()

    def slow():
        gate.wait()
        yield from "ab"

    def fast():
        yield from "12345"
        gate.set()  # all is drawn before the slow one has begun

    assert list(side_by_side([slow(), fast()])) == list("a1b2345")
    assert list(side_by_side([iter("x")])) == ["x"] and list(side_by_side([iter(""), iter("")])) == []


def test_they_run_at_the_same_time():
    meet = threading.Barrier(2, timeout=60)

    def one(name):
        meet.wait()
        yield name

    assert list(side_by_side([one("a"), one("b")])) == ["a", "b"]


def test_an_error_comes_in_its_turn_and_ends_the_others():
    drawn, gate = [], threading.Event()

    def endless():
        for number in range(10**9):
            drawn.append(number)
            yield number
            if number:
                gate.wait()

    def broken():
        yield "last"
        raise KeyError("mine")

    found = side_by_side([endless(), broken()])
    assert [next(found) for _ in range(3)] == [0, "last", 1]
    gate.set()
    with pytest.raises(KeyError, match="mine"):
        next(found)
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]


def test_a_caller_who_stops_ends_them():
    found = side_by_side([iter(range(10**9)), iter(range(10**9))])
    assert next(found) == 0
    found.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
