"""Public data files as records: JSON lines, JSON, CSV, TSV and Parquet.

Each may be compressed (.gz, .xz) or a member of a zip archive. What a file says is never executed or used as
a path, and what it unpacks to is held whole but for Parquet.
"""

import csv
import gzip
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import MAX_JSON, decode_utf8, json_lines, limit, parse_json, read_bytes, text_lines

Parsed = tuple[int, str, dict[str, Any]]  # its line, or else its place, from 1; file and number, for messages; record

MAX_BYTES, _MAX_ROWS = 1 << 28, 10_000_000  # of a file, packed or not; of a Parquet file
# What a packed file raises that is cut short or broken; the second line is of zip archives.
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError)
_BROKEN += (zipfile.BadZipFile, ValueError, KeyError, RuntimeError, struct.error)


def read_records(
    path: Path, *, name: str = "", member: str | None = None, header: Sequence[str] = ()
) -> Iterator[Parsed]:
    """Reads a file in the format that its ending names; any other than those of tables and Parquet is JSON.

    `name` (by default the path) is what messages call it, and whose ending counts; `member` the file wanted of a zip
    archive; `header` has the columns of a CSV or TSV file whose first line does not name any. A `UserError` names file
    and line, when it cannot be read, is cut short or broken, or is not UTF-8.
    """
    name = name or str(path)
    packed = read_bytes(path, MAX_BYTES)
    stream, content = io.BytesIO(packed), io.BytesIO()
    try:
        if member:
            stream = zipfile.ZipFile(stream).open(member)  # noqa: SIM115  it is in memory
        elif packed.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=stream)
        elif packed.startswith(b"\xfd7zXZ\x00"):
            stream = lzma.LZMAFile(stream)  # noqa: SIM115
        while piece := stream.read(1 << 20):  # so that a small file cannot fill the memory
            content.write(piece)
            if content.tell() > (most := limit(MAX_BYTES)):
                raise UserError(f"{name}: unpacks to more than {most:,} bytes; split it (scripts: --max_file_mb)")
    except _BROKEN as error:
        raise UserError(f"{name}: broken or cut short ({one_line(error)}); fetch the file anew") from error
    content.seek(0)
    ending = ending_of(name)
    if ending == ".parquet":
        return _parquet(content, name)
    if ending in (".csv", ".tsv"):
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if ending == ".tsv" else {}
        return _table(content, name, header, dialect)
    # An array, one object alone, or lines of them, as which anything long is read.
    if ending == ".json" and content.getbuffer().nbytes <= MAX_JSON:
        text = decode_utf8(content.getvalue(), name)
        try:
            rows = parse_json(text, name, "fetch the file anew")
            return _numbered(rows if isinstance(rows, list) else [rows], name)
        except UserError:
            if text.lstrip().startswith("["):
                raise
    return json_lines(content, name)


def ending_of(name: str) -> str:
    """The ending that names a file's format, ".json" for instance, whatever it is packed in."""
    return Path(name.removesuffix(".gz").removesuffix(".xz")).suffix.lower()


def _parquet(content: io.BytesIO, name: str) -> Iterator[Parsed]:
    """The rows, a few at a time: many that are alike take next to nothing in the file."""
    try:
        file = parquet.ParquetFile(content)
        if (rows := file.metadata.num_rows) > _MAX_ROWS:
            raise UserError(f"{name}: {rows:,} rows are too many, {_MAX_ROWS:,} are the most; split it")
        batches = file.iter_batches(batch_size=64)
        yield from _numbered((row for batch in batches for row in batch.to_pylist()), name)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: not a whole Parquet file ({one_line(error)}); fetch the file anew") from error


def _numbered(rows: Iterable[Any], name: str) -> Iterator[Parsed]:
    for number, row in enumerate(rows, start=1):
        where = f"{name}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds a JSON {type(row).__name__}; write an array of objects")
        yield number, where, row


def _table(content: io.BytesIO, name: str, header: Sequence[str], dialect: dict[str, Any]) -> Iterator[Parsed]:
    """Rows of fields, named by the first row, unless `header` has other names and that row is none of them."""
    reader, columns = csv.reader(text_lines(content, name), strict=True, **dialect), None
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
