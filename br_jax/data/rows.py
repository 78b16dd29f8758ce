"""Training rows: what they are, and how they are read from and written to JSONL.

User files are untrusted: every row is validated and nothing in it is executed or used as a path.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from br_jax.errors import UserError

LAYOUTS = "prompt/response, instruction/input/output or messages"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One conversation.

    Attributes:
        turns: (role, text) pairs: an optional system turn, then user and assistant in turn; a row to
            train on ends with the assistant.
        input: the Alpaca input of a single-turn row; "" for none.
        tag: provenance ("harmful", "benign", "refusal", "task", ...), never seen by training.
        origin: "file:line", for messages.
    """

    turns: tuple[tuple[str, str], ...]
    input: str = ""
    tag: str = ""
    origin: str = ""


def read_rows(path: str | Path, *, max_rows: int | None = None, tag: str = "") -> list[Row]:
    """Reads and validates a JSONL file in one of the three usual layouts, which may be mixed.

    Args:
        path: a UTF-8 file with one JSON object a line; blank lines are skipped, unknown keys ignored.
        max_rows: stop after so many rows; None reads all.
        tag: given to every row; by default each keeps the one that it carries.

    Returns:
        The rows, in the file's order.

    Raises:
        UserError: naming file, line and key, when the file cannot be read, holds no row, or a row is not
            valid UTF-8, not a JSON object, lacks a field, or has a field of a wrong type or order.
    """
    rows: list[Row] = []
    for number, line in _lines(Path(path)):
        if max_rows is not None and len(rows) >= max_rows:
            break
        origin = f"{path}:{number}"
        rows.append(row_of(parse_object(line, origin), tag, origin))
    if not rows:
        raise UserError(f"{path}: no rows: the file is empty; write one JSON object a line with {LAYOUTS}")
    return rows


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSONL that `read_rows` reads back equal (but for `origin`); all of it or nothing.

    Args:
        path: the file; its folder must exist. It is replaced only once everything is on disk.
        rows: rows to train on.

    Raises:
        UserError: when the file cannot be written (no folder, no permission, disk full).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(_record(row), ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the rows ({_reason(error)}); check the folder, its permissions and the free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (line number, text) of the lines that are not blank."""
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in decoded_lines(file, str(path)) if line.strip())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read ({_reason(error)}); give a readable JSONL file") from error


def decoded_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, text with its newline) of a UTF-8 file, whose name is for messages."""
    for number, raw in enumerate(file, start=1):
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at column "
                f"{error.start + 1}); save the file as UTF-8"
            ) from error


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def parse_object(line: str, origin: str) -> Mapping[str, Any]:
    """Parses one line; what is not a JSON object is an error."""
    try:
        record = json.loads(line.rstrip())
    # ValueError: also a number of thousands of digits; RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        hint = "; the file looks like one JSON array" if line.strip() == "[" else ""
        raise UserError(f"{origin}: not valid JSON{where}{hint}; write one JSON object a line") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{origin}: holds a JSON {type(record).__name__}, not an object; write one object a line with {LAYOUTS}"
        )
    return record


def row_of(record: Mapping[str, Any], tag: str, origin: str) -> Row:
    """Validates one object and makes a row of it; the first layout with all its fields is taken."""
    if not tag and isinstance(record.get("tag"), str):
        tag = record["tag"]
    if "messages" in record:
        return Row(_turns(record["messages"], origin), tag=tag, origin=origin)
    if "instruction" in record and ("output" in record or "prompt" not in record):
        question, answer = "instruction", "output"
    else:
        question, answer = "prompt", "response"
    if question not in record and answer not in record:
        keys = ", ".join(sorted(record))[:80]
        raise UserError(f"{origin}: missing fields: the keys are {keys!r}; give {LAYOUTS}")
    turns = (("user", _filled(record, question, origin)), ("assistant", _filled(record, answer, origin)))
    has_input = question == "instruction" and record.get("input") is not None
    return Row(turns, input=text_of(record, "input", origin) if has_input else "", tag=tag, origin=origin)


def _turns(messages: Any, origin: str) -> tuple[tuple[str, str], ...]:
    """Validates chat messages: an optional system turn, then user and assistant in turn, assistant last."""
    if not isinstance(messages, list):
        raise UserError(
            f'{origin}: \'messages\' is a {type(messages).__name__}; give a list of {{"role": ..., "content": ...}}'
        )
    turns = []
    for index, message in enumerate(messages):
        at = f"messages[{index}]"
        if not isinstance(message, dict):
            raise UserError(f'{origin}: {at} is a {type(message).__name__}; give {{"role": ..., "content": ...}}')
        role = text_of(message, "role", origin, at)
        if role not in ROLES:
            raise UserError(f"{origin}: {at}.role is {role[:40]!r}; use one of {', '.join(ROLES)}")
        turns.append((role, _filled(message, "content", origin, at)))
    roles = [role for role, _ in turns]
    if "assistant" not in roles:
        raise UserError(f"{origin}: 'messages' has no assistant turn; add the answer to learn")
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:]):
        if role != ("user", "assistant")[index % 2]:
            raise UserError(
                f"{origin}: messages[{start + index}] is a turn of {role!r} out of order; write "
                "an optional system turn, then user and assistant in turn"
            )
    if roles[-1] != "assistant":
        raise UserError(f"{origin}: 'messages' ends with {roles[-1]!r}; end with the assistant's answer")
    return tuple(turns)


def text_of(record: Mapping[str, Any], key: str, origin: str, at: str = "") -> str:
    """The string under a key; anything else there, or nothing, is an error."""
    name = f"{at}.{key}" if at else key
    if key not in record:
        raise UserError(f"{origin}: missing field {name!r}; add it, as a string")
    value = record[key]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise UserError(f"{origin}: {name!r} is {kind}, not a string; put text in quotes")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON may escape half a surrogate pair, which no tokenizer accepts.
        raise UserError(
            f"{origin}: {name!r} holds half a character (\\u{ord(value[error.start]):04x}); write the character whole"
        ) from error
    return value


def _filled(record: Mapping[str, Any], key: str, origin: str, at: str = "") -> str:
    """As `text_of`, and not blank."""
    value = text_of(record, key, origin, at)
    if not value.strip():
        raise UserError(f"{origin}: {(f'{at}.{key}' if at else key)!r} is empty; fill it or delete the row")
    return value


def _record(row: Row) -> dict[str, Any]:
    """The JSON object of a row: Alpaca's layout where it is enough, else chat messages."""
    tag = {"tag": row.tag} if row.tag else {}
    if [role for role, _ in row.turns] == ["user", "assistant"]:
        (_, instruction), (_, output) = row.turns
        return {"instruction": instruction, "input": row.input, "output": output} | tag
    return {"messages": [{"role": role, "content": text} for role, text in row.turns]} | tag
