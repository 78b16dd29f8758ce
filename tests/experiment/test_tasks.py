"""The task registry: which rows each task hands out, and what it refuses."""

import sys
import types

import pytest
from contents import jsonl

from br_jax.core.errors import UserError
from br_jax.datasets import paper
from br_jax.experiment.tasks import TASKS, get_task
from br_jax.scoring.rules import ExactRule, LabelRule, NumberRule


def test_names_and_rules():
    assert all(name == task.name for name, task in TASKS.items())
    assert TASKS["ag_news"].rule == LabelRule(paper.AG_NEWS) and get_task("gsm8k").rule == NumberRule()
    assert get_task("reviews", "exact").rule == ExactRule() and TASKS["reviews"].rule != ExactRule()
    assert get_task("moods", "label").rule == get_task("moods").rule == LabelRule(("happy", "sad"))

    for name, message in (("review", "unknown task 'review'; near: reviews"), ("rows", "task 'rows' needs a rule")):
        with pytest.raises(UserError, match=message):
            get_task(name)


# The paper's tasks, whose rows another module builds

SIZES = {
    "gsm8k": {"train": 7473, "test": 1319},
    "sst2": {"train": 67349, "validation": 872, "test": 1821},
    "ag_news": {"train": 9000, "test": 7600},
}
RECORD = {"question": "1 + 1?", "answer": "It is\n#### 1,018", "sentence": "dull", "text": "Chips"}


@pytest.fixture
def asked(monkeypatch):
    """What the builders were asked for; they answer with records whose ids say which they are."""
    calls = []

    def load_dataset(name, *, split, path=None, folder="built"):
        calls.append((name, split, path, folder))
        record = RECORD | {"label": "negative" if name == "sst2" else "Sci/Tech"}
        return [record | {"id": f"{split} {i}"} for i in range(SIZES[name][split])]

    load = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "br_jax.datasets.load", load)  # the real one imports tensorflow_datasets
    return calls


def numbers(rows):
    """("train", 0, 99) of rows that are the first hundred of the training rows, in order."""
    found = [row.origin.split() for row in rows]
    (name, first), (_, last) = found[0], found[-1]
    assert found == [[name, str(i)] for i in range(int(first), int(last) + 1)]
    return name, int(first), int(last)


@pytest.mark.parametrize(
    ("name", "settings", "expected", "files"),
    [
        ("gsm8k", {}, [("train", 0, 6972), ("train", 6973, 7472), ("test", 0, 999)], {"train": None, "test": None}),
        (
            "sst2",
            {"path": "train.tsv", "test_path": "dev.tsv", "folder": "kept"},
            [("train", 0, 66476), ("train", 66477, 67348), ("validation", 0, 871)],
            {"train": "train.tsv", "validation": "dev.tsv"},
        ),
        (
            "ag_news",
            {"path": "test.csv", "only_split": "test"},
            [("test", 1000, 6599), ("test", 6600, 7599), ("test", 0, 999)],
            {"test": "test.csv"},
        ),
    ],
)
def test_splits_and_files_of_the_paper_s_tasks(asked, name, settings, expected, files):
    assert [numbers(part) for part in TASKS[name].load(settings, 0)] == expected
    folder = settings.get("folder", "built")
    assert sorted(asked) == sorted((name, split, path, folder) for split, path in files.items())


def test_one_file_does_not_serve_twice(asked):
    with pytest.raises(UserError, match="task 'gsm8k': no training rows"):
        TASKS["gsm8k"].load({"only_split": "test"}, 0)  # 319 follow, and 500 are held out
    for settings in ({"path": "a", "test_path": "a"}, {"path": "b", "test_path": "a", "only_split": "test"}):
        with pytest.raises(UserError, match="a: no test_path"):
            TASKS["ag_news"].load(settings, 0)


# A user's own rows


@pytest.fixture
def own(tmp_path):
    """own(name, texts, answer="yes") writes rows with these questions to a file."""

    def write(name, texts, answer="yes"):
        (tmp_path / name).write_bytes(jsonl(*({"prompt": text, "response": answer} for text in texts)))
        return str(tmp_path / name)

    return write


THOUSAND = [f"Question {i}" for i in range(1000)]


def load(seed=0, rule="label:yes,no", **settings):
    return get_task("rows", rule).load(settings, seed)


def prompts(rows):
    return [row.turns[0][1] for row in rows]


def test_one_file_is_split_by_its_prompts_and_the_shares(own):
    path = own("all.jsonl", THOUSAND)
    splits = [prompts(part) for part in load(path=path)]
    assert sorted(text for part in splits for text in part) == sorted(THOUSAND)
    assert [len(part) for part in splits] == pytest.approx([700, 100, 200], abs=50)  # 4 standard deviations or more
    assert splits[0] != sorted(splits[0], key=THOUSAND.index), "the file's order"
    other = [prompts(part) for part in load(path=path, seed=1)]
    assert 0 < len(set(other[2]) & set(splits[2])) < 100, "another seed, the same test rows"
    more = own("more.jsonl", [f"Question {i}" for i in range(1500)][::-1])
    for before, after in zip(splits, load(path=more), strict=True):
        assert [text for text in prompts(after) if text in set(before)] == before, "new rows moved old ones"
    sizes = [len(part) for part in load(path=path, validation_share=0.4, test_share=0.05)]
    assert sizes == pytest.approx([550, 400, 50], abs=65)
    for settings, message in (
        ({"validation_share": 0.5, "test_share": 0.5}, "validation_share 0.5 and test_share 0.5: give shares that"),
        ({"test_share": 0.0}, "task 'rows': no test rows; give more rows, or another share"),
        ({"path": ""}, "task 'rows' needs a file: set path"),
    ):
        with pytest.raises(UserError, match=message):
            load(**{"path": path, **settings})


def test_copies_are_told_of_and_in_one_split(own, caplog):
    texts = [f"What is {i}?" for i in range(200)]
    path = own("all.jsonl", texts + [f"  WHAT IS {i}" for i in range(200)])
    loaded = load(path=path)
    splits = [{text.strip(" ?").lower() for text in prompts(part)} for part in loaded]
    assert sum(map(len, splits)) == 200 and len(set.union(*splits)) == 200 and sum(map(len, loaded)) == 400
    (message,) = caplog.messages
    assert message.startswith(f"{path}: 200 of 400 rows ask what an earlier one asks (line 201 what line 1 asks)")


def test_files_of_their_own(own):
    texts = {name: [f"{name} {i}" for i in range(count)] for name, count in (("a", 300), ("b", 300), ("c", 50))}
    train, held_out, test = (own(f"{name}.jsonl", some) for name, some in texts.items())
    splits = [prompts(part) for part in load(path=train, validation_path=held_out, test_path=test)]
    assert [sorted(part) for part in splits] == [sorted(some) for some in texts.values()]
    assert splits[2] != texts["c"], "the first rows of a sorted file are no sample"
    sizes = [len(part) for part in load(path=train, test_path=test)]
    assert sizes[0] + sizes[1] == 300 and sizes[2] == 50 and sizes[1] < 70


def test_answers_that_no_model_could_get_right(own, caplog):
    train = own("train.jsonl", [f"Question {i}" for i in range(50)])
    test = own("test.jsonl", ["Another"], answer="Yes, it is.\nSurely")
    with pytest.raises(UserError, match=r"test\.jsonl:1: by LabelRule[^\n]* no answer is right"):
        load(path=train, test_path=test)
    assert len(load(path=train, test_path=test, rule="rouge_l")[2]) == 1 and not caplog.messages
    # Of rows to train on it is said, and they are kept.
    train = own("train.jsonl", [f"Question {i}" for i in range(50)], answer="perhaps")
    held_out = {f"{part}_path": own(f"{part}.jsonl", [part]) for part in ("validation", "test")}
    assert len(load(path=train, **held_out)[0]) == 50
    (message,) = caplog.messages
    assert message.startswith(train) and "'perhaps', and so for 50 of 50 rows to train on" in message


def test_chats_and_free_text(tmp_path):
    chat = (("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "And?"), ("assistant", "Bye."))
    chats = [chat] + [(*chat[:3], ("user", f"Then {i}?"), chat[4]) for i in range(60)]
    records = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in chats]
    records += [{"instruction": "Sum up", "input": f"Long text {i}", "output": "Short."} for i in range(60)]
    (tmp_path / "chats.jsonl").write_bytes(jsonl(*records))
    splits = load(path=str(tmp_path / "chats.jsonl"), rule="rouge_l")
    assert sum(map(len, splits)) == 121 and chat in [row.turns for part in splits for row in part]
    for part in splits:  # prompts that differ in their input, or their last turn, alone
        assert len({row.input for row in part}) > 1 and len({row.turns[-2] for row in part if len(row.turns) == 5}) > 1
