"""The protocol between the benchmarks and their contenders."""

import os
import pathlib

import pytest
from benchmarks.pairing import Contender, call, race

from br_jax.errors import UserError

FAKES = pathlib.Path(__file__).with_name("fakes.py")


def fake(name, function, /, **arguments):
    return Contender(name, FAKES, function, arguments)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_contenders_take_turns_and_the_order_rotates(tmp_path):
    log = tmp_path / "log"
    race([fake(name, "writes", log=str(log), name=name) for name in "abc"], 3, "test")

    events = [line.split() for line in log.read_text().splitlines()]
    begins, ends = events[::2], events[1::2]
    assert [event[2] for event in begins + ends] == ["begin"] * 12 + ["end"] * 12  # nobody worked beside another
    assert [event[:2] for event in begins] == [event[:2] for event in ends]
    order = " ".join(name + index for name, index, *_ in begins)
    assert order == "a0 b0 c0 a1 b1 c1 b2 c2 a2 c3 a3 b3"
    pids = {name: {pid for other, _, _, pid in events if other == name} for name in "abc"}
    assert all(len(its) == 1 for its in pids.values()) and len(set.union(*pids.values())) == 3
    assert not any(alive(int(pid)) for its in pids.values() for pid in its)


def test_a_record_holds_what_was_done(tmp_path):
    record = race([fake("a", "writes", log=str(tmp_path / "log"), name="a", seconds=0.05)], 2, "test")["a"]

    assert record.outcomes == ["a0", "a1", "a2"]  # functions were called
    assert record.amounts == [2.0, 2.0]
    assert len(record.seconds) == len(record.busy) == 2 and min(record.seconds) >= 0.05
    assert record.first >= 0.05
    assert 0 < record.loaded <= record.peak
    assert record.compiles == record.recompiles == 0


def test_a_contender_does_not_carry_the_package_that_its_file_lies_in():
    assert not {"jax", "br_jax", "numpy"} & set(call(FAKES, "modules"))


@pytest.mark.parametrize("at", [-1, 0, 2])
def test_an_error_is_told_in_one_line_and_ends_the_others(tmp_path, at):
    log = tmp_path / "log"
    contenders = [fake("good", "writes", log=str(log), name="good"), fake("bad", "fails", at=at)]
    with pytest.raises(UserError, match=r"^benchmark bad: no such luck$"):
        race(contenders, 3, "test")

    assert not alive(int(log.read_text().split()[-1]))


@pytest.mark.parametrize("after", [0, 0.1])
def test_a_process_that_dies_at_work_or_between_is_told(tmp_path, after):
    slow = fake("slow", "writes", log=str(tmp_path / "log"), name="slow", seconds=1)
    with pytest.raises(UserError, match=r"^benchmark d: its process ended with status 7$"):
        race([fake("d", "dies", after=after), slow], 1, "test")


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match=r"nobody: .*No such file"):
        race([Contender("nobody", tmp_path / "none.py", "f", {})], 1, "test")
