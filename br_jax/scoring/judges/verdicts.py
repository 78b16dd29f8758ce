"""Verdicts from outside, a human's or an API's: read from a file, and the file of those that are still to be given."""

import csv
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import MAX_LINES, json_lines, open_file, text_lines, write_text
from br_jax.core.records import file_hash
from br_jax.scoring.judges.judging import Exchange, Judgement, digest

_SAID = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class OutsideVerdicts:
    """The verdicts of a file, CSV with a header if it ends in ".csv", else JSONL.

    A row says of which exchange it is by "prompt" and "answer", or by "sha256" as `write_todo` gives it, and then
    "harmful": true or false, yes or no, 1 or 0; it may say more.

    Raises:
        UserError: naming file and line: it cannot be read, a field is missing or of a wrong kind, or two rows
            contradict each other.
    """

    name = "verdicts"
    batch_size = sys.maxsize  # so that what is missing is counted at once

    def __init__(self, source: str | os.PathLike):
        self._path = pathlib.Path(source)
        self._harmful: dict[str, bool] = {}
        origins: dict[str, str] = {}
        for origin, row in _rows(self._path):
            key, harmful = _read(row, origin)
            if self._harmful.setdefault(key, harmful) != harmful:
                raise UserError(f"{origin}: says another verdict than {origins[key]}: delete one of them")
            origins.setdefault(key, origin)
        self.version = file_hash(source)

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One verdict an exchange; a `UserError` where the file has none on some of them."""
        if missing := self.missing(exchanges):
            raise UserError(
                f"{self._path}: no verdict on {len(missing)} of {len(exchanges)} exchanges, the first is "
                f"{missing[0].prompt[:60]!r}: {__name__}.write_todo makes the file to fill in and append"
            )
        return [Judgement(self._harmful[digest(exchange.prompt, exchange.answer)]) for exchange in exchanges]

    def missing(self, exchanges: Sequence[Exchange]) -> list[Exchange]:
        """The exchanges on which the file has no verdict, each once."""
        found = {digest(exchange.prompt, exchange.answer): exchange for exchange in exchanges}
        return [exchange for key, exchange in found.items() if key not in self._harmful]


def write_todo(path: str | os.PathLike, exchanges: Sequence[Exchange]) -> None:
    """Writes exchanges as JSONL rows in which "harmful" is null: fill it in and `OutsideVerdicts` reads the file.

    Raises:
        UserError: the file exists (somebody may have begun to fill it in), or cannot be written.
    """
    if os.path.lexists(path):
        raise UserError(f"{path}: exists, and may hold verdicts: choose another name")
    rows = [
        {"sha256": digest(exchange.prompt, exchange.answer), "prompt": exchange.prompt, "answer": exchange.answer}
        for exchange in exchanges
    ]
    write_text(path, "".join(json.dumps(row | {"harmful": None}) + "\n" for row in rows))


def _rows(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """("file:line", row) of the lines that are not blank; of a CSV row of several lines the last."""
    with open_file(path, MAX_LINES) as file:
        if path.suffix.lower() != ".csv":
            yield from ((origin, row) for _, origin, row in json_lines(file, str(path)))
            return
        reader = csv.DictReader(text_lines(file, str(path)), strict=True)
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", row
        except csv.Error as error:
            place = f"{path}:{reader.reader.line_num}"
            raise UserError(f"{place}: not valid CSV ({one_line(error)}): correct the row") from error


def _read(row: Mapping[str, Any], origin: str) -> tuple[str, bool]:
    """The digest of the exchange that a row is of, and what it says."""
    texts = row.get("prompt"), row.get("answer")
    key = row.get("sha256") or (digest(*texts) if all(isinstance(text, str) for text in texts) else None)
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
        raise UserError(f"{origin}: give prompt and answer as text, or the sha256 that write_todo gave")
    said = str(row.get("harmful")).strip().lower()
    if said not in _SAID:
        raise UserError(
            f"{origin}: harmful is {one_line(repr(row.get('harmful')), 40)}: write true or false, yes or no, 1 or 0 "
            "(in CSV, quote texts that have commas)"
        )
    return key, _SAID[said]
