"""What a run says of its progress: a bar on a terminal, plain lines in a log."""

import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

from br_jax.core.hosts import is_main

_SECONDS = 30  # between two lines of a log


def announce(text: str) -> None:
    """Says in a log what begins or has ended, where a terminal shows a bar."""
    if is_main() and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def progress(total: int | None, name: str, unit: str, done: int = 0, keep: bool = True) -> "tqdm | LogLines":
    """A bar with rate and time left, or a line every half minute in a log; process 0 alone shows it.

    Args:
        total: of units to do; None when that is not known.
        done: units finished in an earlier life of the run.
        keep: whether the finished bar stays on the screen.
    """
    if not sys.stderr.isatty():
        return LogLines(total, name, unit, done)
    options = {"dynamic_ncols": True, "leave": keep, "mininterval": 0.5, "disable": not is_main()}
    return tqdm(total=total, initial=done, desc=name, unit=unit, **options)


class LogLines(AbstractContextManager):
    """The part of `tqdm` that runs use, for a log: "align: 40 of 200 steps, 35 s, loss 0.31" every half minute."""

    def __init__(self, total: int | None, name: str, unit: str, done: int):
        self._name, self._done, self._note = name, done, ""
        self._of = f"{unit}s" if total is None else f"of {total:,} {unit}s"
        self._start = self._last = time.monotonic()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What the next line ends with."""
        self._note = f", {text}"

    def update(self, count: int = 1) -> None:
        """Adds finished units; writes a line if the last one is half a minute old."""
        self._done += count
        if (now := time.monotonic()) - self._last >= _SECONDS:
            self._last = now
            announce(f"{self._name}: {self._done:,} {self._of}, {now - self._start:.0f} s{self._note}")

    def close(self) -> None:
        """Writes nothing: whoever knows what has ended says so."""

    def __exit__(self, *error: object) -> None:
        self.close()
