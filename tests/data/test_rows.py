"""Rows: the three layouts, and one test a kind of bad file."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from br_jax.data.rows import Row, read_rows, write_rows
from br_jax.errors import UserError

GOOD = '{"prompt": "Hi", "response": "Hello."}'


@pytest.fixture
def file(tmp_path):
    """file(content) writes a JSONL file of text or bytes and returns its path."""

    def write(content):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_three_layouts_in_one_file(file):
    path = file(
        "\ufeff" + GOOD + "\r\n\n"
        '{"instruction": "Sum up", "input": "A text", "output": "Short", "id": 7}\n'
        '{"instruction": "Sum up", "input": null, "output": "Short", "prompt": "ignored"}\n'
        '   \n{"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "a"},'
        '{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},'
        '{"role": "assistant", "content": "d"}], "tag": "benign"}'
    )
    assert read_rows(path) == [
        Row((("user", "Hi"), ("assistant", "Hello.")), origin=f"{path}:1"),
        Row((("user", "Sum up"), ("assistant", "Short")), input="A text", origin=f"{path}:3"),
        Row((("user", "Sum up"), ("assistant", "Short")), origin=f"{path}:4"),
        Row(
            (("system", "Be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            tag="benign",
            origin=f"{path}:6",
        ),
    ]


def test_max_rows_stops_before_what_follows(file):
    assert len(read_rows(file(f"{GOOD}\n{GOOD}\nnot json"), max_rows=2)) == 2


def test_a_given_tag_wins_over_the_files(file):
    path = file('{"prompt": "a", "response": "b", "tag": "benign"}')
    assert read_rows(path)[0].tag == "benign"
    assert read_rows(path, tag="harmful")[0].tag == "harmful"


def test_content_is_only_text(file, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    texts = [str(secret), "{{ 1 + 1 }}", "$(touch pwned)", "__import__('os')", "../../etc/passwd"]
    rows = read_rows(file("\n".join(json.dumps({"prompt": t, "response": t}) for t in texts)))
    assert [row.turns[0][1] for row in rows] == texts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "secret"]


MESSAGES = '{"messages": [%s]}'
USER, ASSISTANT, SYSTEM = (json.dumps({"role": role, "content": "x"}) for role in ("user", "assistant", "system"))
BAD = {
    "empty file": ("", ": no rows: the file is empty"),
    "blank lines only": ("\n  \n", ": no rows: the file is empty"),
    "bad JSON at line 3": (
        f'{GOOD}\n\n{{"prompt": }}\n',
        ":3: not valid JSON at column 12: Expecting value; write",
    ),
    "half a line": (f'{GOOD}\n{{"prompt": "a", "respo', ":2: not valid JSON at column"),
    "one JSON array": (
        f"[\n{GOOD}\n]",
        ":1: not valid JSON at column 2: Expecting value; the file looks like",
    ),
    "endless brackets": ("[" * 200_000, ":1: not valid JSON"),
    "endless number": (f'{{"prompt": {"9" * 9_000}, "response": "b"}}', ":1: not valid JSON"),
    "a list": (f"{GOOD}\n[1, 2]", ":2: holds a JSON list, not an object"),
    "a string": ('"prompt"', ":1: holds a JSON str, not an object"),
    "no field": ('{"text": "a"}', ":1: missing fields: the keys are 'text'; give prompt/response"),
    "no key": ("{}", ":1: missing fields: the keys are ''; give prompt/response"),
    "no response": (f'{GOOD}\n{{"prompt": "a"}}', ":2: missing field 'response'"),
    "no prompt": ('{"response": "a"}', ":1: missing field 'prompt'"),
    "no output": ('{"instruction": "a", "input": ""}', ":1: missing field 'output'"),
    "null answer": ('{"prompt": "a", "response": null}', ":1: 'response' is null, not a string"),
    "number for a prompt": ('{"prompt": 1, "response": "b"}', ":1: 'prompt' is int, not a string"),
    "list for an input": (
        '{"instruction": "a", "input": [], "output": "b"}',
        ":1: 'input' is list, not a string",
    ),
    "empty answer": (f'{GOOD}\n{{"prompt": "a", "response": ""}}', ":2: 'response' is empty"),
    "blank answer": ('{"instruction": "a", "output": " \\n"}', ":1: 'output' is empty"),
    "empty prompt": ('{"prompt": "", "response": "b"}', ":1: 'prompt' is empty"),
    "half a character": ('{"prompt": "a", "response": "b\\ud83d"}', ":1: 'response' holds half a character"),
    "not UTF-8": (f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', ":2: not UTF-8 (byte 0xe9 at column 16)"),
    "UTF-16": (GOOD.encode("utf-16"), ":1: not UTF-8"),
    "messages of a wrong type": ('{"messages": "hi"}', ":1: 'messages' is a str; give a list"),
    "a message of a wrong type": (MESSAGES % '"hi"', ":1: messages[0] is a str"),
    "no message": (MESSAGES % "", ":1: 'messages' has no assistant turn"),
    "no assistant": (MESSAGES % USER, ":1: 'messages' has no assistant turn"),
    "no content": (
        MESSAGES % f'{USER}, {{"role": "assistant"}}',
        ":1: missing field 'messages[1].content'",
    ),
    "parts for content": (
        MESSAGES % '{"role": "user", "content": [{"type": "text"}]}',
        ":1: 'messages[0].content' is list, not a string",
    ),
    "empty turn": (
        MESSAGES % f'{USER}, {{"role": "assistant", "content": ""}}',
        ":1: 'messages[1].content' is empty",
    ),
    "unknown role": (MESSAGES % '{"role": "tool", "content": "x"}', ":1: messages[0].role is 'tool'"),
    "assistant first": (MESSAGES % f"{ASSISTANT}, {USER}", ":1: messages[0] is a turn of 'assistant'"),
    "two users": (MESSAGES % f"{USER}, {USER}, {ASSISTANT}", ":1: messages[1] is a turn of 'user'"),
    "late system": (MESSAGES % f"{USER}, {SYSTEM}, {ASSISTANT}", ":1: messages[1] is a turn of 'system'"),
    "user last": (MESSAGES % f"{USER}, {ASSISTANT}, {USER}", ":1: 'messages' ends with 'user'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_gives_one_line_with_place(file, name):
    content, expected = BAD[name]
    path = file(content)
    with pytest.raises(UserError) as error:
        read_rows(path)
    message = str(error.value)
    assert message.startswith(f"{path}{expected}")
    assert "\n" not in message and ";" in message and len(message) < 400


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file; check the path"):
        read_rows(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_rows(tmp_path)


TEXT = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)
ALPACA = st.builds(
    lambda question, answer, context, tag: Row((("user", question), ("assistant", answer)), context, tag),
    TEXT, TEXT, st.just("") | TEXT, st.sampled_from(["", "harmful"]),
)  # fmt: skip
CHATS = st.builds(
    lambda system, pairs: Row(
        tuple(("system", text) for text in system)
        + tuple(turn for a, b in pairs for turn in (("user", a), ("assistant", b)))
    ),
    st.lists(TEXT, max_size=1),
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
)


@given(rows=st.lists(ALPACA | CHATS, min_size=1, max_size=5))
def test_written_rows_read_back_equal(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    assert [Row(row.turns, row.input, row.tag) for row in read_rows(path)] == rows


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    row = Row((("user", "a"), ("assistant", "b")))
    write_rows(path, [row])
    before = path.read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"rows\.jsonl: cannot write the rows \(No space left on device\)"):
        write_rows(path, [row] * 3)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_no_folder(tmp_path):
    row = Row((("user", "a"), ("assistant", "b")))
    with pytest.raises(UserError, match="cannot write the rows"):
        write_rows(tmp_path / "missing" / "rows.jsonl", [row])
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match="cannot write the rows"):
        write_rows(tmp_path / "plain" / "rows.jsonl", [row])
