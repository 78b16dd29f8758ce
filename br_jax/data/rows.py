"""Training rows, and how they are read from JSONL.

User files are untrusted: every row is checked, and nothing in it is executed or used as a path.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from br_jax.core.bounds import ROWS, require
from br_jax.core.errors import UserError
from br_jax.core.io import MAX_LINES, json_lines, open_file

# Of a row: a tokenizer takes hundreds of bytes a character; a chat template is run from the start for every turn.
_MOST = {"characters": 1_000_000, "turns": 256}


@dataclass(frozen=True)
class Row:
    """One conversation."""

    # (role, text): an optional system turn, then user and assistant in turn; a row to train on ends with the assistant
    turns: tuple[tuple[str, str], ...]
    input: str = ""  # the Alpaca input of a single-turn row
    tag: str = ""  # provenance ("harmful", "benign", "refusal", "task", ...), never seen by training
    origin: str = ""  # "file:line", for messages
    begun: str = ""  # what the last answer already begins with: it is read, and not trained on


# What the API takes for rows: a JSONL file, or rows of which each is a `Row` or an object as in such a file.
Rows = Iterable[Row | Mapping[str, Any]] | str | os.PathLike


def read_rows(path: str | Path, *, max_rows: int | None = None, tag: str = "", max_bytes: int = MAX_LINES) -> list[Row]:
    """Reads and validates a JSONL file in one of the three usual layouts, which may be mixed.

    Args:
        path: a UTF-8 file with one JSON object a line; blank lines are skipped, unknown keys ignored.
        max_rows: stop after so many rows, 1 to 10,000,000; None reads all.
        tag: given to every row; by default each keeps the one that it carries.
        max_bytes: of the file; one with more is refused.

    Raises:
        UserError: naming file, line and key, when the file cannot be read, holds no row, or a row is not
            a JSON object, has a key twice, lacks a field, or has a field of a wrong type or order.
    """
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise UserError(f"{path!r:.80} is no path: give that of a JSONL file")
    if max_rows is not None:
        require("max_rows", max_rows, ROWS._replace(low=1))
    with open_file(path, max_bytes, "split it, or raise max_bytes") as file:
        records = itertools.islice(json_lines(file, str(path)), max_rows)
        rows = [_row(record, tag, origin) for _, origin, record in records]
    if not rows:
        raise UserError(
            f"{path}: no rows: the file is empty; write one JSON object a line with prompt/response, "
            "instruction/input/output or messages"
        )
    return rows


def as_rows(rows: Rows, name: str = "rows") -> list[Row]:
    """The rows that somebody gave, checked; a `UserError` calls them `name` and tells the row's index."""
    if isinstance(rows, str | os.PathLike):
        return read_rows(rows)
    kinds = "a list of rows, or the path of a JSONL file", "an object with prompt and response, or a Row"
    given = []
    for at, row in _each(rows, name, Row | Mapping, *kinds):
        if not isinstance(row, Row):
            given.append(_row(row, "", at))
            continue
        _require_chat(row, at, "turns")
        # Those of a data set say where they are from, and the paper's keep an empty answer as the reference does.
        if not row.origin and (blank := next((role for role, text in row.turns if not text.strip()), None)):
            raise UserError(f"{at}: a turn of the {blank} is empty; fill it or leave the row out")
        given.append(row)
    return given


def as_prompts(prompts: Iterable[str | Row], name: str = "prompts") -> list[str | Row]:
    """The prompts that somebody gave, none too long; raises a `UserError` on a bare string."""
    given = list(_each(prompts, name, str | Row, "a list of prompts", "a text or a Row"))
    for at, prompt in given:
        _require_chat(prompt if isinstance(prompt, Row) else Row((("user", prompt),)), at)
    return [prompt for _, prompt in given]


def prefixed(row: Row, before: str) -> Row:
    """The row with text in front of the user's first turn."""
    at = next((i for i, (role, _) in enumerate(row.turns) if role == "user"), 0)
    role, text = row.turns[at]
    return replace(row, turns=(*row.turns[:at], (role, before + text), *row.turns[at + 1 :]))


def text_of(record: Mapping[str, Any], key: str, origin: str, *, filled: bool = False) -> str:
    """The string under a key; a `UserError` for anything else there, or nothing, and if `filled` for a blank."""
    if key not in record:
        raise UserError(f"{origin}: no {key!r} among the keys {list(record)!r:.160}; add it, as a string")
    value = record[key]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{origin}: {key!r} is {kind}, not a string; put text in quotes")
    require_whole(value, f"{origin}: {key!r}")
    if filled and not value.strip():
        raise UserError(f"{origin}: {key!r} is empty; fill it or delete the row")
    return value


def require_whole(text: str, at: str) -> None:
    """Raises a `UserError` for half a surrogate pair, which JSON may escape and no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{at} holds half a character (\\u{ord(text[error.start]):04x}); write the character whole"
        ) from error


def _each(given: Any, name: str, kinds: type, several: str, one: str) -> Iterator[tuple[str, Any]]:
    """(place, value) of several values of these kinds."""
    if isinstance(given, str | Row | Mapping) or not isinstance(given, Iterable):
        raise UserError(f"{name} is a {type(given).__name__}; give {several}")
    for index, value in enumerate(given):
        if not isinstance(value, kinds):
            raise UserError(f"{name}[{index}] is a {type(value).__name__}; give {one}")
        yield f"{name}[{index}]", value


def _row(record: Mapping[str, Any], tag: str, origin: str) -> Row:
    """Validates one object and makes a row of it; the first layout with all its fields is taken."""
    context = ""
    if not tag and isinstance(record.get("tag"), str):
        tag = text_of(record, "tag", origin)
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            give = '[{"role": ..., "content": ...}, ...]'
            raise UserError(f"{origin}: 'messages' is no list of objects; give {give}")
        places = ((f"{origin}: messages[{index}]", message) for index, message in enumerate(messages))
        turns = tuple((text_of(m, "role", at), text_of(m, "content", at, filled=True)) for at, m in places)
    else:
        is_alpaca = "instruction" in record and ("output" in record or "prompt" not in record)
        keys = ("instruction", "output") if is_alpaca else ("prompt", "response")
        turns = tuple(zip(("user", "assistant"), (text_of(record, k, origin, filled=True) for k in keys), strict=True))
        if is_alpaca and record.get("input") is not None:
            context = text_of(record, "input", origin)
    row = Row(turns, context, tag, origin)
    _require_chat(row, origin, "messages" if "messages" in record else "")
    return row


def _require_chat(row: Row, at: str, roles_of: str = "") -> None:
    """Raises a `UserError` unless a row is a chat of texts, no larger than it may be; if need be one to train on."""
    turns = row.turns
    is_chat = isinstance(turns, tuple | list) and all(isinstance(t, tuple | list) and len(t) == 2 for t in turns)
    texts = [row.input, row.begun, *itertools.chain(*turns)] if is_chat else []
    if not is_chat or not all(isinstance(text, str) for text in texts) or not (turns or roles_of == "messages"):
        raise UserError(f"{at}: its turns are {turns!r:.80}; give pairs of texts: (role, what is said), one at least")
    characters = len(row.input + row.begun) + sum(len(text) for _, text in turns)
    for what, size in {"characters": characters, "turns": len(turns)}.items():
        if size > _MOST[what]:
            raise UserError(f"{at}: a row of {size:,} {what}, at most {_MOST[what]:,} are taken; shorten or split it")
    roles = [role for role, _ in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if roles_of and (not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2)):
        raise UserError(
            f"{at}: the roles of {roles_of!r} are {roles!r:.160}; write an optional system turn, "
            "then user and assistant in turn, the assistant last"
        )
