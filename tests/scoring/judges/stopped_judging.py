"""A judging that dies: python stopped_judging.py FILE LOG [DEATH N].

Every exchange that is judged is written to LOG. DEATH is "judged" (SIGKILL when the N-th batch is judged and not yet
saved), "saved" (behind its write) or "torn" (in the middle of its write); without it the run goes to its end.
"""

import io
import os
import pathlib
import signal
import sys

from br_jax.scoring.judges.judging import Exchange, Judgement, judge_all
from br_jax.store import Store

COUNT, BATCH = 100, 7


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Slow:
    """Judges by length, and counts."""

    name, version, batch_size = "slow", "1", BATCH

    def __init__(self, log: pathlib.Path, death: str, number: int):
        self.log, self.death, self.number, self.batches = log, death, number, 0

    def __call__(self, exchanges):
        self.batches += 1
        with self.log.open("a") as log:
            log.writelines(exchange.answer + "\n" for exchange in exchanges)
        if self.death == "judged" and self.batches == self.number:
            die()
        return [Judgement(len(e.answer) % 3 == 0, len(e.answer) / 7, e.answer[:4]) for e in exchanges]


def arm(judge: Slow) -> None:
    """Makes the N-th write, or what comes after it, deadly."""
    write, opened = io.FileIO.write, pathlib.Path.open

    class Deadly(io.FileIO):
        def write(self, lines):
            if judge.batches < judge.number:
                return write(self, lines)
            write(self, lines if judge.death == "saved" else lines[: len(lines) * 3 // 5])
            die()

    pathlib.Path.open = lambda self, mode, **kw: Deadly(self, "a") if mode == "ab" else opened(self, mode, **kw)


def exchanges() -> list[Exchange]:
    """A hundred, of which ten are there twice."""
    return [Exchange(f"question {i % 9}", f"answer {i} {'!' * (i % 13)}") for i in (*range(COUNT - 10), *range(10))]


def main(file: str, log: str, death: str = "", number: str = "0") -> None:
    judge = Slow(pathlib.Path(log), death, int(number))
    if death in ("saved", "torn"):
        arm(judge)
    judge_all(judge, exchanges(), Store(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
