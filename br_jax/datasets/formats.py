"""Public data files as records: JSON lines, JSON, CSV, TSV and Parquet.

Each may be compressed (.gz, .xz) or a member of a zip archive. What a file says is never executed or used as
a path.
"""

import csv
import gzip
import io
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from br_jax.errors import UserError, one_line
from br_jax.files import json_lines, reading

Parsed = tuple[int, str, dict[str, Any]]  # its line, or else its place, from 1; file and number, for messages; record


def read_records(
    path: Path, *, name: str = "", member: str | None = None, header: Sequence[str] = ()
) -> Iterator[Parsed]:
    """Reads a file in the format that its ending names; any other than those of tables and Parquet is JSON.

    Args:
        name: what messages call it, and whose ending counts; by default the path.
        member: the file wanted, where `path` is a zip archive.
        header: the columns of a CSV or TSV file whose first line does not name any.

    Raises:
        UserError: naming file and line, when the file cannot be read, is cut short or broken, or is not UTF-8.
    """
    name = name or str(path)
    with reading(path):
        packed = path.read_bytes()
    try:
        content = _unpack(packed, member)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise UserError(f"{name}: broken or cut short ({one_line(error)}); fetch the file anew") from error
    ending = ending_of(name)
    if ending == ".parquet":
        return _parquet(content, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start}); save the file as UTF-8") from error
    if ending == ".csv":
        return _table(text, name, header)
    if ending == ".tsv":
        return _table(text, name, header, delimiter="\t", quoting=csv.QUOTE_NONE)
    return _json(text, name) if ending == ".json" else json_lines(text, name)


def ending_of(name: str) -> str:
    """The ending that names a file's format, ".json" for instance, whatever it is packed in."""
    return Path(name.removesuffix(".gz").removesuffix(".xz")).suffix.lower()


def _unpack(content: bytes, member: str | None) -> bytes:
    if member:
        return zipfile.ZipFile(io.BytesIO(content)).read(member)
    if content.startswith(b"\x1f\x8b"):
        return gzip.decompress(content)
    return lzma.decompress(content) if content.startswith(b"\xfd7zXZ\x00") else content


def _json(text: str, name: str) -> Iterator[Parsed]:
    """The objects of an array, one object alone, or lines of them."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.lstrip().startswith("["):
            return json_lines(text, name)
        raise UserError(f"{name}: not valid JSON ({one_line(error)}); fetch the file anew") from error
    return _numbered(content if isinstance(content, list) else [content], name)


def _parquet(content: bytes, name: str) -> Iterator[Parsed]:
    try:
        return _numbered(parquet.read_table(io.BytesIO(content)).to_pylist(), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{name}: not a whole Parquet file ({one_line(error)}); fetch the file anew") from error


def _numbered(rows: Iterable[Any], name: str) -> Iterator[Parsed]:
    for number, row in enumerate(rows, start=1):
        where = f"{name}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds a JSON {type(row).__name__}; write an array of objects")
        yield number, where, row


def _table(text: str, name: str, header: Sequence[str], **dialect) -> Iterator[Parsed]:
    """Rows of fields, named by the first row, unless `header` has other names and that row is none of them."""
    reader = csv.reader((f"{line}\n" for line in text.split("\n")), strict=True, **dialect)
    columns = None
    try:
        for fields in filter(any, reader):
            if columns is None:
                columns = fields if not header or set(fields) <= set(header) else header
                if columns is fields:
                    continue
            where = f"{name}:{reader.line_num}"
            if len(fields) != len(columns):
                told = one_line(", ".join(columns))
                raise UserError(f"{where}: {len(fields)} columns, not {len(columns)} ({told}); mend the line")
            yield reader.line_num, where, dict(zip(columns, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{name}:{reader.line_num}: not valid CSV ({one_line(error)}); mend the row") from error
