"""What a service reports: the audit log of what it did, the card of a release, the table on the screen."""

import datetime
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tabulate import tabulate

from br_jax.core.errors import UserError
from br_jax.core.io import open_file
from br_jax.core.records import key_of
from br_jax.serving.policy import Policy

_MOST = 1 << 34  # bytes of a log
_SHOWN = 20  # users in the table
_SHARES = {
    "answered": "harmful canaries answered",
    "over_refused": "benign canaries refused",
    "degenerate": "answers that are empty or loop",
}


class Audit:
    """A log of fingerprints and figures, a JSON object a line, without a word of a user's.

    Each entry holds the hash of the one before it, so that none is changed or left out unseen. What a kill left of a
    last line is cut off. The time is the machine's, and may be wrong; the number is not.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._last, end = path, "", 0
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            with open_file(path, _MOST) as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._read(line)
                    end += len(line)
        self._file = open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600))  # noqa: SIM115  see `close`
        self._file.truncate(end)

    def _read(self, line: bytes) -> None:
        number = len(self.entries) + 1
        try:
            entry = json.loads(line)
            known, given, before = entry.pop("hash"), entry["number"], entry["before"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._path}:{number}: no entry of an audit log: restore the file") from error
        if known != key_of(entry) or given != number or before != self._last:
            raise UserError(f"{self._path}:{number}: was changed, or one before it is gone: restore the file")
        self._last = known
        self.entries.append(entry)

    def write(self, event: str, job: str, **figures: Any) -> None:
        """Adds an entry, which is on disk when this returns."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        entry = {"number": len(self.entries) + 1, "before": self._last, "time": now, "event": event, "job": job}
        entry = json.loads(json.dumps(entry | figures))
        self._last = key_of(entry)
        try:
            self._file.write((json.dumps(entry | {"hash": self._last}) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # which does not say of which file
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        self.entries.append(entry)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def release_card(record: Mapping[str, Any], policy: Policy) -> str:
    """What a service knows of a release, its `card.json`, as Markdown: what was trained, and what the gate saw."""
    training, gate, merge = record["training"], record["gate"], record["merge"]
    shares = [
        [
            words,
            f"{share['k']} of {share['n']}",
            f"{share['aligned']:.1%}",
            f"{share['score']:.1%} ({share['low']:.1%} to {share['high']:.1%})",
            f"{share['above']:+.1%} (up to {share['above_high']:+.1%})",
            f"{getattr(policy.limits, name):.0%}",
        ]
        for name, words in _SHARES.items()
        for share in [gate[name]]
    ]
    learnt = "None of its rows were held back, so what it learnt was not looked at."
    if own := gate.get("held_back"):
        none = own["kept"] is None
        kept = "" if none else f"; {own['kept']:.0%} of the {own['learnt']} that were learnt are kept"
        learnt = (
            f"Loss of its {own['rows']} held-back rows: {own['aligned']:.3f} by the aligned base, {own['user']:.3f} "
            f"before the merge, {own['released']:.3f} released{kept}."
        )
    named = {
        "rows": "rows",
        "base": "base",
        "user": "user's adapter",
        "released": "released adapter",
        "policy": "policy",
    }
    hashes = [[words, record[name]] for name, words in named.items()]
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items()) or "none"
    return f"""# {record["job"]}

Trained on {training.get("rows", 0):,} rows ({training.get("dropped", 0)} left out, \
{training.get("truncated", 0)} cut) in {training.get("steps", 0):,} steps; settings of its own: {settings}. \
{merge["scale"]:g} of the user's adapter was taken, and Reinforce merged at {merge["reinforce_scale"]:g}.

{tabulate(shares, ["", "count", "aligned base", "released", "difference", "limit"], tablefmt="github")}

In brackets the 95 % intervals. {learnt}

{tabulate(hashes, ["SHA-256 of", ""], tablefmt="github")}
"""


class Table:
    """Shows `Service.status`: on a terminal a table that is drawn anew, in a log a line now and then."""

    def __init__(self, out: TextIO):
        self._out, self._alive, self._next, self._lines = out, out.isatty(), 0.0, 0

    def show(self, status: Mapping[str, Any]) -> None:
        """Draws the table where it is time to."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + (0.5 if self._alive else 30.0)
        counts = {name.replace("_", " "): len(status[name]) for name in ("training", "waiting", "to_be_looked_at")}
        counts |= {name: status[name] for name in ("released", "held")}
        text = f"turn {status['turn']:,}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}; "
        text += f"{status['tokens_per_second']:,.0f} tokens/s\n"
        if self._alive:
            users = [
                [name, f"{user['step']} of {user['of']}", "" if user["loss"] is None else f"{user['loss']:.3f}"]
                for name, user in status["training"].items()
            ]
            text += tabulate(users[:_SHOWN], ["training", "step", "loss"]) + "\n"
            text += f"and {len(users) - _SHOWN} more\n" if len(users) > _SHOWN else ""
            self._lines, above = text.count("\n"), self._lines
            text = (f"\x1b[{above}F\x1b[J" if above else "") + text
        self._out.write(text)
        self._out.flush()
