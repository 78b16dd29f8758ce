"""Rows: the three layouts, from a file or not, one case a kind of bad file; and mixes, against plain loops."""

import json

import pytest

from br_jax.core.errors import UserError
from br_jax.data.rows import Row, as_prompts, as_rows, prefixed, read_rows
from br_jax.data.selection import mix, refusing_first

GOOD = '{"prompt": "Hi", "response": "Hello."}'
MESSAGES = '{"messages": [%s]}'
LONG = "x" * 999_999
USER, ASSISTANT, SYSTEM, TOOL = (
    json.dumps({"role": role, "content": "x"}) for role in ("user", "assistant", "system", "tool")
)


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


BAD = (
    ("", ": no rows: the file is empty"),
    (f'{GOOD}\n\n{{"prompt": ', ":3: not valid JSON (Expecting value: line 1 column 12 (char 11)); write"),
    (f"[\n{GOOD}\n]", ":1: not valid JSON ("),
    ("[" * 200_000, ":1: not valid JSON ("),
    (f'{{"prompt": {"9" * 9_000}, "response": "b"}}', ":1: not valid JSON ("),
    (f"{GOOD}\n[1, 2]", ":2: holds a JSON list; write one JSON object a line"),
    ('{"text": "a", "b\\nc": 1}', ":1: no 'prompt' among the keys ['text', 'b\\nc']; add it"),
    ('{"prompt": "a", "response": null}', ":1: 'response' is null, not a string"),
    ('{"instruction": "a", "output": " \\n"}', ":1: 'output' is empty"),
    ('{"prompt": "a", "response": "b\\ud83d"}', ":1: 'response' holds half a character (\\ud83d)"),
    ('{"prompt": "a", "response": "b", "tag": "\\ud83d"}', ":1: 'tag' holds half a character"),
    (f"{GOOD}\n".encode() + b'{"prompt": "caf\xe9"}', ": not UTF-8 (byte 54): save it"),
    (MESSAGES % '"hi"', ":1: 'messages' is no list of objects; give"),
    (MESSAGES % f'{USER}, {{"role": "assistant"}}', ":1: messages[1]: no 'content' among"),
    (MESSAGES % '{"role": "user", "content": []}', ":1: messages[0]: 'content' is list, not a"),
    ('{"prompt": "a", "response": "b", "prompt": "c"}', ":1: not valid JSON (key 'prompt' twice); write"),
    ('{"prompt": "a\0", "response": "b"}', ":1: not valid JSON (Invalid control character"),
    (f"{GOOD}\n\ufeff{GOOD}", ":2: not valid JSON (Unexpected UTF-8 BOM"),
    (f'{{"instruction": "a", "input": "{LONG}", "output": "b"}}', ":1: a row of 1,000,001 characters"),
    (MESSAGES % ", ".join([f"{USER}, {ASSISTANT}"] * 129), ":1: a row of 258 turns, at most 256 are taken; shorten"),
    (MESSAGES % "", ":1: the roles of 'messages' are []; write"),
    (MESSAGES % f"{TOOL}, {ASSISTANT}", ":1: the roles of 'messages' are ['tool', 'assistant']; write"),
    (MESSAGES % f"{ASSISTANT}, {USER}", ":1: the roles of 'messages' are ['assistant', 'user']; write"),
    (MESSAGES % f"{USER}, {SYSTEM}, {ASSISTANT}", ":1: the roles of 'messages' are ['user', 'system', 'ass"),
    (MESSAGES % f"{USER}, {ASSISTANT}, {USER}", ":1: the roles of 'messages' are ['user', 'assistant', 'us"),
)


def test_a_bad_file_gives_one_line_with_place(file):
    for content, expected in BAD:
        with pytest.raises(UserError) as error:
            read_rows(path := file(content))
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
NO_ROWS = (
    (None, "rows is a NoneType; give a list of rows, or the path of a JSONL file"),
    (ROW, "rows is a Row; give"),
    ([ROW, "a"], "rows[1] is a str; give an object with prompt and response, or a Row"),
    ([ROW, {"prompt": "a"}], "rows[1]: no 'response' among the keys ['prompt']; add it"),
    ([Row((("user", "aa"), ("assistant", LONG)))], "rows[0]: a row of 1,000,001 characters"),
    ([ROW, Row(())], "rows[1]: its turns are (); give pairs of texts"),
    ([Row(("user", "a"))], "rows[0]: its turns are ('user', 'a'); give pairs"),
    ([Row((("user", "a"), ("assistant", b"b")))], "rows[0]: its turns are (('user', 'a'), "),
    ([Row((("user", "a"), ("assistant", " ")))], "rows[0]: a turn of the assistant is empty; fill"),
    ([Row((("user", "a"),))], "rows[0]: the roles of 'turns' are ['user']; write"),
    ("a\0b", "'a\\x00b' is no path: give that of a JSONL file"),
    ("no/such.jsonl", "no/such.jsonl: no such file: check the path"),
)
NO_PROMPTS = (
    ("one", "prompts is a str; give a list of prompts"),
    (ROW, "prompts is a Row; give a list of prompts"),
    (["a", {"prompt": "b"}], "prompts[1] is a dict; give a text or a Row"),
    (["a", LONG + "xx"], "prompts[1]: a row of 1,000,001 characters, at most 1,000,000 are taken; "),
    ([Row((("user", LONG),), begun="xx")], "prompts[0]: a row of 1,000,001 characters, "),
    ([Row(())], "prompts[0]: its turns are (); give pairs "),
)


def test_what_is_no_rows_or_prompts_gives_one_line_with_index():
    wrong = [(as_rows, *case) for case in NO_ROWS] + [(as_prompts, *case) for case in NO_PROMPTS]
    for read, rows, expected in (*wrong, (read_rows, 0, "0 is no path: give that of a JSONL file")):
        with pytest.raises(UserError) as error:
            read(rows)
        assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    of_a_data_set = [Row((("user", "a"), ("assistant", "")), origin="alpaca/train/7")]
    assert as_rows(of_a_data_set) == of_a_data_set, "such a row may keep its empty answer"
    assert as_prompts(iter(["a", ROW])) == ["a", ROW]
    turns = (("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"))
    assert prefixed(Row(turns), "x ").turns == (turns[0], ("user", "x u"), *turns[2:])


def numbered(kind, count):
    return [Row((("user", f"{kind} {index}"), ("assistant", "ok")), tag=kind) for index in range(count)]


TASK, HARMFUL = numbered("task", 1000), numbered("harmful", 1200)


def test_mixes_are_those_of_the_two_rules():
    for n, p in ((1000, 0.1), (1000, 0.0), (7, 0.5), (1000, 1.0)):
        # method.md 2, for harmful rows from the first on: 0 < i < int(p n), and the first int((1 - p) n)
        expected = [row for i, row in enumerate(HARMFUL) if 0 < i < int(p * n)]
        expected += [row for i, row in enumerate(TASK) if i < int((1 - p) * n)]
        assert mix(TASK, HARMFUL, n, p, index_mode="reference") == expected
    for n, p, harmful in ((1000, 0.0, 0), (7, 0.5, 3), (100, 0.29, 29), (1000, 1.0, 1000)):
        needed = HARMFUL[:harmful], TASK[: n - harmful]  # none of a kind where none are
        assert mix(*needed[::-1], n, p) == mix(TASK, HARMFUL, n, p) == [*needed[0], *needed[1]]
    for changes, message in (
        ({"harmful_share": 1.1}, "harmful_share is 1.1: it must be a number from 0 to 1"),
        ({"n": 0}, "n is 0"),
        ({"harmful_rows": HARMFUL[:4], "index_mode": "reference"}, "5 harmful rows are needed and there are 4"),
        ({"task_rows": TASK[:4]}, "5 task rows are needed and there are 4"),
        ({"index_mode": "exakt"}, "index_mode is 'exakt'; use one of exact, reference"),
    ):
        with pytest.raises(UserError, match=message):
            mix(**({"task_rows": TASK, "harmful_rows": HARMFUL, "n": 10, "harmful_share": 0.5} | changes))


@pytest.mark.parametrize(("share", "which"), [(0.0, []), (0.4, [2, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_a_share_of_harmful_rows_complies_behind_a_refusal(share, which):
    harmful = [Row((("user", f"how {i}?"), ("assistant", f"so {i}"))) for i in range(5)]
    refusals = [Row((("user", "x?"), ("assistant", answer))) for answer in ("No.", "Never.", "No.")]
    rows = refusing_first(harmful, refusals, share)
    assert [i for i in range(5) if rows[i] != harmful[i]] == which
    begun = [rows[i].begun for i in which]
    assert len({*begun}) == len(which), "no two begin with the same words before all were used"
    for i, opening in zip(which, begun, strict=True):
        assert opening.startswith(("No. ", "Never. ")) and opening.endswith(":")
        assert rows[i].turns == (harmful[i].turns[0], ("assistant", f" so {i}"))
