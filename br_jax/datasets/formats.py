"""Public data files as a stream of records, one at a time: JSON lines, JSON arrays, CSV, TSV and Parquet.

Each may be compressed (.gz, .xz) or a member of a zip archive. What a file says is never executed or used as
a path.
"""

import contextlib
import csv
import gzip
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow
from pyarrow import parquet

from br_jax.data.rows import decoded_lines, parse_object
from br_jax.errors import UserError

BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile)
PARQUET_ROWS = 1024  # decoded at a time


class Parsed(NamedTuple):
    """One record of a file.

    Attributes:
        number: its line, or its place among the rows where rows are no lines; from 1.
        where: file and number, for messages.
        record: column -> value.
    """

    number: int
    where: str
    record: dict[str, Any]


def read_records(
    path: Path, *, name: str = "", member: str | None = None, header: Sequence[str] = ()
) -> Iterator[Parsed]:
    """Reads a file in the format that its ending names, or else its content shows.

    Only a JSON array is read as a whole; of anything else one record (Parquet: 1,024) is in memory.

    Args:
        path: the file.
        name: what messages call it, and whose ending counts; by default the path.
        member: the file wanted, where `path` is a zip archive.
        header: the columns of a CSV or TSV file whose first line does not name any.

    Yields:
        Its records, in its order.

    Raises:
        UserError: naming file and line, when the file cannot be read, is cut short or broken, or is not UTF-8.
    """
    name = name or str(path)
    try:
        with _open(path, member) as file:
            kind = _kind(name, file.peek(1 << 12))
            yield from (_TABLES[kind](file, name, header) if kind in _TABLES else _OBJECTS[kind](file, name))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except BROKEN as error:
        raise UserError(f"{name}: broken or cut short ({one_line(error)}); fetch the file anew") from error
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror or one_line(error)}); give a readable file") from error


def read_document(path: Path) -> Any:
    """The one JSON value that a file holds; None where it holds something else, JSON lines for instance."""
    try:
        with _open(path, None) as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError, *BROKEN):
        return None  # `read_records` says what is wrong


def one_line(text: object) -> str:
    """What an error or a file says, short and in one line, for a message."""
    return " ".join(str(text).split())[:160]


@contextlib.contextmanager
def _open(path: Path, member: str | None) -> Iterator[BinaryIO]:
    """The plain bytes of a file, whatever it is packed in."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        head = file.peek(6)
        if member:
            file = stack.enter_context(stack.enter_context(zipfile.ZipFile(file)).open(member))
        elif head.startswith(b"\x1f\x8b"):
            file = stack.enter_context(gzip.open(file))
        elif head.startswith(b"\xfd7zXZ\x00"):
            file = stack.enter_context(lzma.open(file))
        yield file


def ending_of(name: str) -> str:
    """The ending that names a file's format, ".json" for instance, whatever it is packed in."""
    return Path(name.removesuffix(".gz").removesuffix(".xz")).suffix.lower()


def _kind(name: str, head: bytes) -> str:
    """The format of a file by its name and first bytes."""
    ending = ending_of(name)
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if ending == ".parquet" or head.startswith(b"PAR1"):
        return "parquet"
    if ending in (".csv", ".tsv"):
        return ending[1:]
    if ending in (".json", ".jsonl") or first in (b"{", b"["):
        return "array" if first == b"[" else "lines"
    return "tsv" if b"\t" in head.partition(b"\n")[0] else "csv"


def _read_lines(file: BinaryIO, name: str) -> Iterator[Parsed]:
    for number, line in decoded_lines(file, name):
        if line.strip():
            where = f"{name}:{number}"
            yield Parsed(number, where, parse_object(line, where))


def _read_array(file: BinaryIO, name: str) -> Iterator[Parsed]:
    try:
        rows = json.load(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({one_line(error)}); fetch the file anew") from error
    for number, row in enumerate(rows, start=1):
        where = f"{name}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds a JSON {type(row).__name__}, not an object; write an array of objects")
        yield Parsed(number, where, row)


def _read_parquet(file: BinaryIO, name: str) -> Iterator[Parsed]:
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Parsed(number, f"{name}: row {number}", row)
    except pyarrow.ArrowException as error:
        raise UserError(f"{name}: not a whole Parquet file ({one_line(error)}); fetch the file anew") from error


def _read_csv(file: BinaryIO, name: str, header: Sequence[str]) -> Iterator[Parsed]:
    """Fields in double quotes, a quote within doubled; a backslash is a backslash."""

    def rows() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((line for _, line in decoded_lines(file, name)), strict=True)
        while True:
            number = reader.line_num + 1  # where a row begins that may go on over several lines
            try:
                yield number, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise UserError(f"{name}:{number}: not valid CSV ({one_line(error)}); mend the row") from error

    return _table(rows(), name, header)


def _read_tsv(file: BinaryIO, name: str, header: Sequence[str]) -> Iterator[Parsed]:
    """Fields between tabs; a quote is a quote."""
    lines = decoded_lines(file, name)
    return _table(((number, line.rstrip("\r\n").split("\t")) for number, line in lines), name, header)


def _table(rows: Iterator[tuple[int, list[str]]], name: str, header: Sequence[str]) -> Iterator[Parsed]:
    """Gives the fields their names: the first row's, unless `header` has others and that row is none of them."""
    columns = None
    for number, fields in rows:
        if not any(fields):
            continue
        if columns is None:
            is_header = not header or set(fields) <= set(header)
            columns = fields if is_header else header
            if is_header:
                continue
        if len(fields) != len(columns):
            told = one_line(", ".join(columns))
            raise UserError(f"{name}:{number}: {len(fields)} columns, not {len(columns)} ({told}); mend the line")
        yield Parsed(number, f"{name}:{number}", dict(zip(columns, fields, strict=True)))


_OBJECTS = {"lines": _read_lines, "array": _read_array, "parquet": _read_parquet}
_TABLES = {"csv": _read_csv, "tsv": _read_tsv}
