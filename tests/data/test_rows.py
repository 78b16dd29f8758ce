"""Rows: the three layouts, and one case a kind of bad file."""

import json

import pytest

from br_jax.data.rows import Row, read_rows
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
        '{"instruction": "Sum\u2028up", "input": "A text", "output": "Short", "id": 7}\n'
        '{"instruction": "Sum up", "input": null, "output": "Short", "prompt": "ignored"}\n'
        '   \n{"messages": [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "a"},'
        '{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},'
        '{"role": "assistant", "content": "d"}], "tag": "benign"}'
    )
    assert read_rows(path) == [
        Row((("user", "Hi"), ("assistant", "Hello.")), origin=f"{path}:1"),
        Row((("user", "Sum\u2028up"), ("assistant", "Short")), input="A text", origin=f"{path}:3"),
        Row((("user", "Sum up"), ("assistant", "Short")), origin=f"{path}:4"),
        Row(
            (("system", "Be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
            tag="benign",
            origin=f"{path}:6",
        ),
    ]
    assert {row.tag for row in read_rows(path, tag="harmful")} == {"harmful"}


def test_max_rows_stops_before_what_follows(file):
    assert len(read_rows(file(f"{GOOD}\n{GOOD}\nnot json"), max_rows=2)) == 2


MESSAGES = '{"messages": [%s]}'
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
    "no response": (f'{GOOD}\n{{"prompt": "a"}}', ":2: no 'response' among"),
    "null answer": ('{"prompt": "a", "response": null}', ":1: 'response' is null, not a string"),
    "empty answer": (f'{GOOD}\n{{"prompt": "a", "response": ""}}', ":2: 'response' is empty"),
    "blank answer": ('{"instruction": "a", "output": " \\n"}', ":1: 'output' is empty"),
    "half a character": ('{"prompt": "a", "response": "b\\ud83d"}', ":1: 'response' holds half a character (\\ud83d)"),
    "not UTF-8": (f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', ": not UTF-8 (byte 54): save it"),
    "a message of a wrong type": (MESSAGES % '"hi"', ":1: 'messages' is no list of objects; give"),
    "no content": (MESSAGES % f'{USER}, {{"role": "assistant"}}', ":1: messages[1]: no 'content' among"),
    "parts for content": (MESSAGES % '{"role": "user", "content": []}', ":1: messages[0]: 'content' is list, not a"),
    "empty turn": (MESSAGES % f'{USER}, {{"role": "assistant", "content": ""}}', ":1: messages[1]: 'content' is empty"),
} | {
    name: (MESSAGES % ", ".join(turns), f":1: the roles of 'messages' are {roles!r}; write")
    for name, turns, roles in (
        ("no message", [], []),
        ("system alone", [SYSTEM], ["system"]),
        ("unknown role", [TOOL, ASSISTANT], ["tool", "assistant"]),
        ("assistant first", [ASSISTANT, USER], ["assistant", "user"]),
        ("two users", [USER, USER, ASSISTANT], ["user", "user", "assistant"]),
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
