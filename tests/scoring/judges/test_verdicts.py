"""Verdicts from a file: every form that is read, and every mistake with its line."""

import csv
import hashlib
import json

import pytest
from contents import jsonl

from br_jax.core.errors import UserError
from br_jax.scoring.judges.base import Exchange, judge_all
from br_jax.scoring.judges.texts import OutsideVerdicts, write_todo

EXCHANGES = [
    Exchange("oil a zorvix", 'turn it, "then" oil it'),
    Exchange("oil a zorvix", "I cannot.\nReally."),
    Exchange("", ""),
    Exchange("Zörvix?", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") + " ja"),
]
EXPECTED = [True, False, False, True]


def rows(harmful=EXPECTED):
    return [{"prompt": e.prompt, "answer": e.answer, "harmful": h} for e, h in zip(EXCHANGES, harmful, strict=True)]


def write_jsonl(path, records):
    path.write_bytes(jsonl(*records))
    return path


def write_csv(path, records, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    return path


SAID = ((True, False, False, True), (1, 0, 0, 1), ("True", "FALSE", " no ", "1"), ("Yes", "0", "No", "true"))


@pytest.mark.parametrize("form", ["jsonl", "csv", "excel", "hashes"])
def test_every_way_to_say_it(tmp_path, form):
    hashes = [hashlib.sha256(json.dumps([e.prompt, e.answer]).encode()).hexdigest() for e in EXCHANGES]
    for said in SAID:
        records = [{**row, "who": "a human"} for row in rows(said)]
        if form == "hashes":
            records = [{"sha256": key, "harmful": row["harmful"]} for key, row in zip(hashes, records, strict=True)]
        if form == "jsonl":
            path = write_jsonl(tmp_path / "verdicts.jsonl", records)
        else:
            path = write_csv(tmp_path / "verdicts.CSV", records, "utf-8-sig" if form == "excel" else "utf-8")
        judge = OutsideVerdicts(path)
        assert [judgement.harmful for judgement in judge(EXCHANGES)] == EXPECTED, said
        assert [judgement.harmful for judgement in judge(EXCHANGES[::-1])] == EXPECTED[::-1]


def test_what_is_missing_is_counted_named_and_can_be_filled_in(tmp_path):
    path = write_jsonl(tmp_path / "verdicts.jsonl", rows()[:1])
    judge = OutsideVerdicts(path)
    asked = [*EXCHANGES, EXCHANGES[1]]
    with pytest.raises(UserError, match=r"no verdict on 3 of 4 exchanges, the first is ''.*write_todo") as caught:
        judge_all(judge, asked)  # which gives it all of them at once
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert judge.missing(asked) == EXCHANGES[1:]
    todo = tmp_path / "new" / "todo.jsonl"
    write_todo(todo, judge.missing(asked))
    with pytest.raises(UserError, match=r"todo\.jsonl:1: harmful is None: write true or false"):
        OutsideVerdicts(todo)
    with pytest.raises(UserError, match="exists, and may hold verdicts"):
        write_todo(todo, EXCHANGES)
    asked_for = map(json.loads, todo.read_text().splitlines())
    filled = [row | {"harmful": harmful} for row, harmful in zip(asked_for, EXPECTED[1:], strict=True)]
    path.write_bytes(path.read_bytes() + jsonl(*filled))
    assert [judgement.harmful for judgement in judge_all(OutsideVerdicts(path), asked)] == [*EXPECTED, EXPECTED[1]]


GOOD = '{"prompt": "a", "answer": "b", "harmful": true}\n'
BAD_LINES = {
    "json": (GOOD + "{harmful\n", ":2: not valid JSON"),
    "array": (f"[{GOOD.strip()}]\n", ":1: holds a JSON list"),
    "deep": (GOOD + "[" * 100_000, ":2: not valid JSON"),
    "null": ('\n{"prompt": "a", "answer": "b", "harmful": null}', ":2: harmful is None"),
    "maybe": ('{"prompt": "a", "answer": "b", "harmful": "maybe"}', ":1: harmful is 'maybe'"),
    "list": ('{"prompt": "a", "answer": "b", "harmful": [true]}', r":1: harmful is \[True\]"),
    "number": ('{"prompt": "a", "answer": 4, "harmful": true}', ":1: give prompt and answer"),
    "hash": ('{"sha256": "abc", "harmful": true}', ":1: .* or the sha256 that write_todo gave"),
    "hash of another kind": ('{"sha256": 7, "harmful": true}', ":1: give prompt and answer"),
    "contradiction": (GOOD + "\n" + GOOD.replace("true", "false"), r":3: says another verdict than .*\.jsonl:1"),
}
HEADER = "prompt,answer,harmful\n"
BAD_CSV = {
    "short": (HEADER + "a,b,yes\na,b\n", ":3: harmful is None"),
    "long": (HEADER + "a,b, and c,yes\n", ":2: harmful is ' and c': .* quote texts that have commas"),
    "quote": (HEADER + 'a,"b" c,yes\n', ":2: not valid CSV"),
    "columns": ("prompt,reply,harmful\na,b,yes\n", ":2: give prompt and answer"),
    "contradiction": (HEADER + 'a,"b\nc",yes\na,"b\nc",no\n', r":5: says another verdict than .*\.csv:3"),
    "latin": (HEADER + "\xff,b,yes\n", "not UTF-8"),
}


@pytest.mark.parametrize(("suffix", "case"), [*(("jsonl", c) for c in BAD_LINES), *(("csv", c) for c in BAD_CSV)])
def test_a_mistake_is_one_line_with_its_place(tmp_path, suffix, case):
    content, message = (BAD_LINES if suffix == "jsonl" else BAD_CSV)[case]
    path = tmp_path / f"verdicts.{suffix}"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message) as caught:
        OutsideVerdicts(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_same_verdict_twice_is_none_too_many(tmp_path):
    path = write_jsonl(tmp_path / "verdicts.jsonl", rows() + rows())
    judge = OutsideVerdicts(path)
    assert [judgement.harmful for judgement in judge(EXCHANGES)] == EXPECTED
    assert OutsideVerdicts(write_jsonl(path, rows())).version != judge.version
