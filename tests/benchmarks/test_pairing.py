"""The protocol between the benchmarks and their contenders."""

import os
import pathlib

import pytest
from benchmarks import pairing
from benchmarks.pairing import Contender, call, race

from br_jax.core.errors import UserError

pytestmark = pytest.mark.slow
FAKES = pathlib.Path(__file__).with_name("fakes.py")


def fake(name, function, /, **arguments):
    return Contender(name, FAKES, function, arguments)


def alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    return True


def test_contenders_take_turns_and_the_order_rotates(tmp_path):
    log = tmp_path / "log"
    records = race([fake(name, "writes", log=str(log), name=name) for name in "abc"], 3, "test")
    events = [line.split() for line in log.read_text().splitlines()]
    begins, ends = events[::2], events[1::2]
    assert [event[2] for event in begins + ends] == ["begin"] * 12 + ["end"] * 12  # nobody worked beside another
    assert [event[:2] for event in begins] == [event[:2] for event in ends]
    assert " ".join(name + index for name, index, *_ in begins) == "a0 b0 c0 a1 b1 c1 b2 c2 a2 c3 a3 b3"
    pids = {(name, pid) for name, _, _, pid in events}
    assert len(pids) == 3 and not any(alive(pid) for _, pid in pids)
    record = records["a"]
    assert record.outcomes == ["a0", "a1", "a2", "a3"]  # functions were called
    assert record.amounts == [2.0] * 3 and record.compiles == record.recompiles == 0
    assert len(record.seconds) == len(record.busy) == 3 and min(record.first, *record.seconds) >= 0.04
    assert 0 < record.loaded <= record.peak
    # A contender does not carry the package that its file lies in.
    assert not {"jax", "br_jax", "numpy"} & set(call(FAKES, "modules"))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        *(({"fails": at}, "no such luck") for at in (-1, 0, 2)),
        *(({"dies": at}, "its process ended with status 7") for at in (0, 2)),
    ],
)
def test_the_end_of_one_is_told_in_one_line_and_ends_the_others(tmp_path, end, said):
    log = tmp_path / "log"
    contenders = [fake("good", "writes", log=str(log), name="good"), fake("bad", "ends", **end)]
    with pytest.raises(UserError, match=rf"^benchmark bad: {said}$"):
        race(contenders, 3, "test")
    assert not alive(log.read_text().split()[-1])


def test_one_that_is_gone_before_it_is_asked_is_told_likewise(monkeypatch):
    unit = pairing._Process.unit

    def gone(process, index):
        process._popen.kill()
        process._popen.wait()
        return unit(process, index)

    monkeypatch.setattr(pairing._Process, "unit", gone)
    with pytest.raises(UserError, match=r"^benchmark bad: its process ended with status -9: killed, perhaps"):
        race([fake("bad", "ends")], 1, "test")
