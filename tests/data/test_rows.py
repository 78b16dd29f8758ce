"""Rows: the three layouts, from a file or not, and one case a kind of bad file."""

import json
import pathlib
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.data.rows import Row, as_prompts, as_rows, prefixed, read_rows

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
        '{"instruction": "Sum\u2028up", "input": "A text", "output": "Short", "id": 7}\n'
        '{"instruction": "Sum up", "input": null, "output": "Short", "prompt": "ignored"}\n'
        '   \n{"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "a"},'
        '{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},'
        '{"role": "assistant", "content": "d"}], "tag": "benign"}'
    )
    chat = (("system", "Be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert read_rows(path) == [
        Row((("user", "Hi"), ("assistant", "Hello.")), origin=f"{path}:1"),
        Row((("user", "Sum\u2028up"), ("assistant", "Short")), input="A text", origin=f"{path}:3"),
        Row((("user", "Sum up"), ("assistant", "Short")), origin=f"{path}:4"),
        Row(chat, tag="benign", origin=f"{path}:6"),
    ]
    assert {row.tag for row in read_rows(path, tag="harmful")} == {"harmful"}
    assert len(read_rows(file(f"{GOOD}\n{GOOD}\nnot json"), max_rows=2)) == 2  # it stops before what follows
    lines = json.dumps({"prompt": "x", "response": LONG}), MESSAGES % ", ".join([f"{USER}, {ASSISTANT}"] * 128)
    assert [len(row.turns) for row in read_rows(file("\n".join(lines)))] == [2, 256], "the largest are taken"


MESSAGES = '{"messages": [%s]}'
LONG = "x" * 999_999
USER, ASSISTANT, SYSTEM, TOOL = (
    json.dumps({"role": role, "content": "x"}) for role in ("user", "assistant", "system", "tool")
)
BAD = {
    "empty file": ("", ": no rows: the file is empty"),
    "half a line": (
        f'{GOOD}\n\n{{"prompt": ',
        ":3: not valid JSON (Expecting value: line 1 column 12 (char 11)); write",
    ),
    "one JSON array": (f"[\n{GOOD}\n]", ":1: not valid JSON ("),
    "endless brackets": ("[" * 200_000, ":1: not valid JSON ("),
    "endless number": (f'{{"prompt": {"9" * 9_000}, "response": "b"}}', ":1: not valid JSON ("),
    "a list": (f"{GOOD}\n[1, 2]", ":2: holds a JSON list; write one JSON object a line"),
    "no field": ('{"text": "a", "b\\nc": 1}', ":1: no 'prompt' among the keys ['text', 'b\\nc']; add it"),
    "null answer": ('{"prompt": "a", "response": null}', ":1: 'response' is null, not a string"),
    "blank answer": ('{"instruction": "a", "output": " \\n"}', ":1: 'output' is empty"),
    "half a character": ('{"prompt": "a", "response": "b\\ud83d"}', ":1: 'response' holds half a character (\\ud83d)"),
    "half a one in a tag": ('{"prompt": "a", "response": "b", "tag": "\\ud83d"}', ":1: 'tag' holds half a character"),
    "not UTF-8": (f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', ": not UTF-8 (byte 54): save it"),
    "a message of a wrong type": (MESSAGES % '"hi"', ":1: 'messages' is no list of objects; give"),
    "no content": (MESSAGES % f'{USER}, {{"role": "assistant"}}', ":1: messages[1]: no 'content' among"),
    "parts for content": (MESSAGES % '{"role": "user", "content": []}', ":1: messages[0]: 'content' is list, not a"),
    "a key twice": (
        '{"prompt": "a", "response": "b", "prompt": "c"}',
        ":1: not valid JSON (key 'prompt' twice); write",
    ),
    "a byte of nothing": ('{"prompt": "a\0", "response": "b"}', ":1: not valid JSON (Invalid control character"),
    "two files in one": (f"{GOOD}\n\ufeff{GOOD}", ":2: not valid JSON (Unexpected UTF-8 BOM"),
    "a long input": (f'{{"instruction": "a", "input": "{LONG}", "output": "b"}}', ":1: a row of 1,000,001 characters"),
    "many turns": (
        MESSAGES % ", ".join([f"{USER}, {ASSISTANT}"] * 129),
        ":1: a row of 258 turns, at most 256 are taken; shorten or split it",
    ),
} | {
    name: (MESSAGES % ", ".join(turns), f":1: the roles of 'messages' are {roles!r}; write")
    for name, turns, roles in (
        ("no message", [], []),
        ("unknown role", [TOOL, ASSISTANT], ["tool", "assistant"]),
        ("assistant first", [ASSISTANT, USER], ["assistant", "user"]),
        ("late system", [USER, SYSTEM, ASSISTANT], ["user", "system", "assistant"]),
        ("user last", [USER, ASSISTANT, USER], ["user", "assistant", "user"]),
    )
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_gives_one_line_with_place(file, name):
    content, expected = BAD[name]
    path = file(content)
    with pytest.raises(UserError) as error:
        read_rows(path)
    message = str(error.value)
    assert message.startswith(f"{path}{expected}") and "\n" not in message and len(message) < 400


def test_rows_need_no_file(file):
    records = [
        {"prompt": "Hi", "response": "Hello."},
        {"instruction": "Sum up", "input": "A text", "output": "Short", "tag": "task"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    path = file("\n".join(map(json.dumps, records)))
    rows = as_rows(str(path))
    assert as_rows(path) == rows and [row.origin for row in rows] == [f"{path}:{i}" for i in (1, 2, 3)]
    given = as_rows(record for record in records)
    assert [(row.turns, row.input, row.tag) for row in given] == [(row.turns, row.input, row.tag) for row in rows]
    assert [row.origin for row in given] == ["rows[0]", "rows[1]", "rows[2]"]
    mixed = as_rows((rows[0], records[1]))
    assert mixed[0] is rows[0] and mixed[1] == given[1] and as_rows([]) == []


ROW = Row((("user", "a"), ("assistant", "b")))
NO_ROWS = {
    "nothing": (None, "rows is a NoneType; give a list of rows, or the path of a JSONL file"),
    "one Row": (ROW, "rows is a Row; give"),
    "texts": ([ROW, "a"], "rows[1] is a str; give an object with prompt and response, or a Row"),
    "a field too few": ([ROW, {"prompt": "a"}], "rows[1]: no 'response' among the keys ['prompt']; add it"),
    "a long one": ([Row((("user", "aa"), ("assistant", LONG)))], "rows[0]: a row of 1,000,001 characters"),
    "no turn": ([ROW, Row(())], "rows[1]: its turns are (); give pairs of texts"),
    "one turn alone": ([Row(("user", "a"))], "rows[0]: its turns are ('user', 'a'); give pairs"),
    "a turn of bytes": ([Row((("user", "a"), ("assistant", b"b")))], "rows[0]: its turns are (('user', 'a'), "),
    "an empty answer": ([Row((("user", "a"), ("assistant", " ")))], "rows[0]: a turn of the assistant is empty; fill"),
    "the user last": ([Row((("user", "a"),))], "rows[0]: the roles of 'turns' are ['user']; write"),
    "no path": ("a\0b", "'a\\x00b' is no path: give that of a JSONL file"),
    "no file": ("no/such.jsonl", "no/such.jsonl: no such file: check the path"),
}


def test_what_is_no_rows_gives_one_line_with_index():
    for rows, expected in NO_ROWS.values():
        with pytest.raises(UserError) as error:
            as_rows(rows)
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^0 is no path: give that of a JSONL file$"):
        read_rows(0)
    of_a_data_set = [Row((("user", "a"), ("assistant", "")), origin="alpaca/train/7")]
    assert as_rows(of_a_data_set) == of_a_data_set, "such a row may keep its empty answer"


def test_prompts_are_several():
    for prompts, message in (
        ("one", "benign is a str; give a list of prompts"),
        (ROW, "benign is a Row; give a list of prompts"),
        (["a", {"prompt": "b"}], r"benign\[1\] is a dict; give a text or a Row"),
        (["a", LONG + "xx"], r"benign\[1\]: a row of 1,000,001 characters, at most 1,000,000 are taken; .*"),
        ([Row((("user", LONG),), begun="xx")], r"benign\[0\]: a row of 1,000,001 characters, .*"),
        ([Row(())], r"benign\[0\]: its turns are \(\); give pairs .*"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            as_prompts(prompts, "benign")
    assert as_prompts(iter(["a", ROW])) == ["a", ROW]


def test_what_stands_before_a_row_stands_in_the_user_s_turn():
    turns = (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    assert prefixed(Row(turns), "x ").turns == (turns[0], ("user", "x u"), *turns[2:])


WHOLE = f"""\ufeff{GOOD}
{{"instruction": "Sum up é🙂", "input": "A \\ud83d\\ude42 text", "output": "Short", "id": 7, "tag": "task"}}
{MESSAGES % f"{SYSTEM}, {USER}, {ASSISTANT}"}""".encode()
TOKENS = [b"NaN", b"1e999", b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b"\\ud800", b"\\u0000", b"\0", b"\xff"]
TOKENS += [b"null", b"true", b"{}", b"[]", b'"', b"\n", b"\r", b",", b":", b"\xe2\x80\xa8", b'"messages"', b'"role"']
TOKENS += [b"\xef\xbb\xbf"]
PLACE = st.integers(0, len(WHOLE))


@given(st.lists(st.tuples(PLACE, PLACE, st.one_of(st.sampled_from(TOKENS), st.binary(max_size=3))), max_size=4))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_bytes_give_rows_or_one_line(changes):
    content = WHOLE
    for start, length, instead in changes:
        content = content[:start] + instead + content[start + length % 8 :]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        try:
            rows = read_rows(path)
        except UserError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            texts = [text for row in rows for text in (row.input, row.tag, *(text for _, text in row.turns))]
            assert rows and all(text.encode() or not text for text in texts)
