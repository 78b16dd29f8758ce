"""What a run says of its progress: bars that are alive on a terminal; lines, every half minute at least, in a log."""

import sys

from tqdm import tqdm

from br_jax.core.hosts import is_main


def announce(text: str) -> None:
    """Says in a log what begins, where a terminal shows its bar."""
    if is_main() and not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


def progress(total: int | None, name: str, unit: str, done: int = 0, keep: bool = True) -> tqdm:
    """A bar with rate and time left; process 0 alone shows it.

    Args:
        total: of units to do; None when that is not known.
        done: units finished in an earlier life of the run.
        keep: whether the finished bar stays on the screen.
    """
    alive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        disable=not is_main(),
        unit=unit,
        dynamic_ncols=alive,
        leave=keep or not alive,
        mininterval=0.5 if alive else 30,
        delay=0 if alive else 5,
    )
