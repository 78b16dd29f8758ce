"""What a service says while it runs: a table that is drawn anew on a terminal, a line now and then in a log."""

import time
from collections.abc import Mapping
from typing import Any, TextIO

from tabulate import tabulate

_EVERY = {True: 0.5, False: 30.0}  # seconds between two looks: on a terminal, in a log
_MOST = 20  # users that are shown


class Table:
    """Shows `Service.status`."""

    def __init__(self, out: TextIO):
        self._out, self._alive, self._last, self._lines = out, out.isatty(), 0.0, 0

    def show(self, status: Mapping[str, Any]) -> None:
        """Draws the table where it is time to."""
        now = time.monotonic()
        if self._last and now - self._last < _EVERY[self._alive]:
            return
        self._last = now
        self._out.write(self._over() + (self._drawn(status) if self._alive else _line(status)))
        self._out.flush()

    def _over(self) -> str:
        return f"\x1b[{self._lines}F\x1b[J" if self._lines else ""

    def _drawn(self, status: Mapping[str, Any]) -> str:
        users = list(status["training"].items())
        rows = [
            [name, f"{user['step']} of {user['of']}", "" if (loss := user["loss"]) is None else f"{loss:.3f}"]
            for name, user in users[:_MOST]
        ]
        text = f"{_line(status)}{tabulate(rows, ['training', 'step', 'loss'])}\n"
        text += f"and {len(users) - _MOST} more\n" if len(users) > _MOST else ""
        self._lines = text.count("\n")
        return text


def _line(status: Mapping[str, Any]) -> str:
    counts = {
        "training": len(status["training"]),
        "waiting": len(status["waiting"]),
        "to be looked at": len(status["to_be_looked_at"]),
        "released": status["released"],
        "held": status["held"],
    }
    told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    return f"turn {status['turn']:,}: {told}; {status['tokens_per_second']:,.0f} tokens/s\n"
