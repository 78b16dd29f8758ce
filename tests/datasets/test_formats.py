"""Files as records: every format, packed and not, and what hurts: cut, broken, wrongly encoded, hostile."""

import csv
import gzip
import io
import itertools
import json
import lzma
import os
from pathlib import Path

import pytest
from contents import as_parquet, as_zip, jsonl
from hypothesis import given
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.datasets import formats
from br_jax.datasets.formats import read_records

RECORDS = [
    {"goal": "Name the zorvix", "target": 'It is "blue", says\nthe manual'},
    {"goal": "naïve — 🙂\ttab\\nslash\u2028line", "target": "a\0b"},
    {"goal": "", "target": " spaces "},
]


def as_csv(records):
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


FILES = (  # file name, content, and the lines where its records are, or end
    ("x.jsonl", jsonl(*RECORDS), [1, 2, 3]),
    ("x.json", json.dumps(RECORDS, indent=1).encode(), [1, 2, 3]),
    ("lines.json", b"\n \n" + jsonl(*RECORDS), [3, 4, 5]),
    ("X.CSV", b"\xef\xbb\xbf" + as_csv(RECORDS), [3, 4, 5]),
    ("x.parquet", as_parquet(*RECORDS), [1, 2, 3]),
    ("lines.data", b"\xef\xbb\xbf" + jsonl(*RECORDS), [1, 2, 3]),
)


@pytest.fixture
def read(tmp_path):
    """read(file name, content, **how) -> [(number, where, record)]."""

    def write_and_read(name, content, **how):
        path = tmp_path / name
        path.write_bytes(content)
        return list(read_records(path, name=name, **how))

    return write_and_read


def test_formats_and_packings(read):
    packings = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}
    for (name, content, numbers), packing in itertools.product(FILES, packings):
        file = name + packing
        parsed = read(file, packings[packing](content))
        assert [(number, record) for number, _, record in parsed] == [*zip(numbers, RECORDS, strict=True)]
        assert all(where.startswith(f"{file}:") and where.endswith(str(number)) for number, where, _ in parsed)


def test_headers_and_quotes(read):
    rows, header = b"a,1\nb,2\n", ("text", "label")
    one, other = {"text": "a", "label": "1"}, {"text": "b", "label": "2"}
    assert [r for *_, r in read("x.csv", rows, header=header)] == [one, other]
    assert [r for *_, r in read("x.csv", b"text,label\n" + rows)] == [one, other]
    assert [r["label"] for *_, r in read("x.csv", b"label,text\n" + rows, header=header)] == ["a", "b"]
    assert len(read("x.tsv", b"label\t1\n", header=header)) == 1, "a sentence that is a column's name is no header"
    archive = as_zip({"SST-2/dev.tsv": b"a\t1\n", "SST-2/train.tsv": b"text\tlabel\nb \t0\n"})
    parsed = read("train.tsv", archive, member="SST-2/train.tsv", header=header)
    assert parsed == [(2, "train.tsv:2", {"text": "b ", "label": "0"})]
    fields = ("class", "title", "description")
    text = b'"3","A ""zorvix""","its\\nuclear\\\\""quoted""\\"\r\n"4","x, y","z"'
    assert [tuple(r.values()) for *_, r in read("x.csv", text, header=fields)] == [
        ("3", 'A "zorvix"', 'its\\nuclear\\\\"quoted"\\'),
        ("4", "x, y", "z"),
    ]
    quoted = b'a "quote\t1\r\n"open\t0\r\n'
    assert [r["text"] for *_, r in read("x.tsv", quoted, header=header)] == ['a "quote', '"open']


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


@given(st.lists(st.fixed_dictionaries({"goal": TEXT, "target": TEXT.map("x".__add__)}), min_size=1, max_size=5))
def test_csv_reads_what_the_standard_library_writes(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    path.write_bytes(as_csv(records))
    assert [record for *_, record in read_records(path)] == records


LONG = gzip.compress(jsonl(*[{"a": os.urandom(9999).hex()}] * 5))
TABLE = as_parquet(*RECORDS)
BAD = (  # file name, content, message
    ("x.jsonl", '{"a": "naïve"}\n'.encode("latin-1"), "x.jsonl: not UTF-8 (byte 9)"),
    ("x.jsonl", jsonl(*RECORDS)[:-9], "x.jsonl:3: not valid JSON ("),
    ("x.json", json.dumps(RECORDS).encode()[:-9], "x.json: not valid JSON (Untermin"),
    ("x.json", b'[{}, "a"]', "x.json: row 2: holds a JSON str; write an array of objects"),
    ("x.csv", b'a,b\n"1","2"\n"3","open', "x.csv:3: not valid CSV (unexpected end of data)"),
    ("x.csv", b"a\n" + b"x" * 200_000, "x.csv:2: not valid CSV (field larger than"),
    ("x.csv", b'"a\nb",c\n1\n', "x.csv:3: 1 columns, not 2 (a b, c); mend the line"),
    ("x.jsonl.gz", LONG[:-99], "x.jsonl.gz: broken or cut short ("),
    ("x.jsonl.gz", b"\x1f\x8bzorvix and more", "x.jsonl.gz: broken or cut short ("),
    ("x.jsonl.gz", LONG[:10] + b"\xff" * 99, "x.jsonl.gz: broken or cut short ("),
    ("x.jsonl.xz", lzma.compress(LONG)[:-99], "x.jsonl.xz: broken or cut short ("),
    ("x.parquet", b"<html>", "x.parquet: not a whole Parquet file ("),
    ("x.parquet", TABLE[:40] + bytes(400) + TABLE[-200:], "x.parquet: not a whole Parquet file ("),
    ("x.zip", b"zorvix", "x.zip: broken or cut short (File is not a zip file)"),
)


def test_bad_files(read):
    for name, content, message in BAD:
        with pytest.raises(UserError) as error:
            read(name, content, **({"member": "x.tsv"} if name.endswith(".zip") else {}))
        assert message in str(error.value) and "\n" not in str(error.value)


def test_a_small_file_that_unpacks_to_a_large_one(read, monkeypatch):
    monkeypatch.setattr(formats, "MAX_BYTES", 1 << 22)
    for packing in (gzip.compress, lzma.compress):
        bomb = packing(b" " * (1 << 24))
        assert len(bomb) < 1 << 15
        with pytest.raises(UserError, match=r"x\.jsonl: unpacks to more than 4,194,304 bytes; split it"):
            read("x.jsonl", bomb)
    monkeypatch.setattr(formats, "_MAX_ROWS", 2)
    with pytest.raises(UserError, match=r"x\.parquet: 3 rows are too many, 2 are the most"):
        read("x.parquet", TABLE)


REAL = Path(os.environ.get("BR_JAX_DATA", "data")) / "ag_news_test.csv"


@pytest.mark.skipif(not REAL.is_file(), reason="AG News is not in the data folder")
def test_the_real_csv_is_read_as_the_hub_reads_it():
    with REAL.open(encoding="utf-8") as file:  # as the script of the hub's ag_news does
        theirs = list(csv.reader(file, quotechar='"', delimiter=",", quoting=csv.QUOTE_ALL, skipinitialspace=True))
    ours = [list(r.values()) for *_, r in read_records(REAL, header=("class", "title", "description"))]
    assert ours == theirs and len(ours) == 7600
