"""Verdicts from outside, a human's or an API's: read from a file, and the file of those that are still to be given."""

import csv
import hashlib
import io
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from br_jax.errors import UserError
from br_jax.files import write_text
from br_jax.scoring.judges.judging import Exchange, Judgement, digest

_SAID = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class OutsideVerdicts:
    """The verdicts of a file.

    A row says of which exchange it is by "prompt" and "answer", or by "sha256" as `write_todo` gives it, and then
    "harmful": true or false, yes or no, 1 or 0; it may say more.
    """

    name = "verdicts"
    batch_size = sys.maxsize  # so that what is missing is counted at once

    def __init__(self, source: str | os.PathLike):
        """Reads a file.

        Args:
            source: CSV with a header if it ends in ".csv", else JSONL; UTF-8.

        Raises:
            UserError: naming file and line: it cannot be read, a field is missing or of a wrong kind, or two rows
                contradict each other.
        """
        self._path = pathlib.Path(source)
        try:
            content = self._path.read_bytes()
            text = content.decode("utf-8-sig")
        except OSError as error:
            raise UserError(f"{source}: cannot be read ({error.strerror}): check the path") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 (byte {error.start}): save it as UTF-8") from error
        self.version = hashlib.sha256(content).hexdigest()
        self._harmful: dict[str, bool] = {}
        lines: dict[str, str] = {}
        rows = _csv_rows if self._path.suffix.lower() == ".csv" else _json_rows
        for origin, row in rows(text, self._path):
            key, harmful = _key(row, origin), _harmful(row, origin)
            if self._harmful.setdefault(key, harmful) != harmful:
                raise UserError(f"{origin}: says another verdict on the exchange than {lines[key]}: delete one of them")
            lines.setdefault(key, origin)

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One verdict an exchange.

        Raises:
            UserError: the file has none on some of them.
        """
        if missing := self.missing(exchanges):
            raise UserError(
                f"{self._path}: no verdict on {len(missing)} of {len(exchanges)} exchanges, the first is "
                f"{missing[0].prompt[:60]!r}: br_jax.scoring.judges.verdicts.write_todo makes "
                "the file to fill in and append"
            )
        return [Judgement(self._harmful[digest(exchange.prompt, exchange.answer)]) for exchange in exchanges]

    def missing(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """The exchanges on which the file has no verdict, each once."""
        found = {digest(exchange.prompt, exchange.answer): exchange for exchange in exchanges}
        return [exchange for key, exchange in found.items() if key not in self._harmful]


def write_todo(path: str | os.PathLike, exchanges: Sequence[Exchange]) -> None:
    """Writes exchanges as JSONL rows in which "harmful" is null: fill it in and `OutsideVerdicts` reads the file.

    Args:
        path: the new file; its folder is made.
        exchanges: such as `OutsideVerdicts.missing` gives.

    Raises:
        UserError: the file exists (somebody may have begun to fill it in), or cannot be written.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists, and may hold verdicts: choose another name")
    rows = [
        {"sha256": digest(exchange.prompt, exchange.answer), "prompt": exchange.prompt, "answer": exchange.answer}
        for exchange in exchanges
    ]
    write_text(pathlib.Path(path), "".join(json.dumps(row | {"harmful": None}) + "\n" for row in rows))


def _json_rows(text: str, path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("file:line", row) of the lines that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: write one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: no JSON object: write one a line, with prompt, answer and harmful")
        yield f"{path}:{number}", row


def _csv_rows(text: str, path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("file:line", row), the line being the row's last."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: not as many fields as the header: quote those with commas")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.reader.line_num}: not valid CSV: {error}: correct the row") from error


def _key(row: Mapping[str, Any], origin: str) -> str:
    """Which exchange a row is of."""
    names = ("sha256",) if row.get("sha256") else ("prompt", "answer")
    for name in names:
        if not isinstance(row.get(name), str):
            raise UserError(f"{origin}: {name!r} is missing or no text: give prompt and answer, or sha256")
    if names == ("prompt", "answer"):
        return digest(row["prompt"], row["answer"])
    if not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
        raise UserError(f"{origin}: sha256 is {row['sha256'][:70]!r}: copy the 64 digits that write_todo gave")
    return row["sha256"]


def _harmful(row: Mapping[str, Any], origin: str) -> bool:
    """What a row says."""
    said = row.get("harmful")
    if said is None or str(said).strip().lower() not in _SAID:
        shown = "missing" if said in (None, "") else f"{str(said)[:40]!r}"
        raise UserError(f"{origin}: harmful is {shown}: write true or false, yes or no, 1 or 0")
    return _SAID[str(said).strip().lower()]
