"""Every data set from a small harmless file of its layout, rows that are wrong, and the real files where they are."""

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tensorflow_datasets.core import registered

from br_jax.data.rows import read_rows
from br_jax.datasets.builder import serialize
from br_jax.datasets.builders import DATASETS
from br_jax.datasets.load import load_dataset
from br_jax.datasets.paper import user_rows
from br_jax.datasets.reviews import load_reviews, split_reviews
from br_jax.errors import UserError


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def as_parquet(*records, rows=None):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(records)).slice(0, rows), buffer)
    return buffer.getvalue()


LAT = [{"prompt": "Name the zorvix", "rejected": "Blue", "chosen": "No — sorry"}] * 2
ALPACA = [
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet", "input": "", "output": ""},
]
BEAVER = [
    {"prompt": "a?", "response": "b", "category": {"x,y": True, "z": False, "w": True}, "is_safe": False},
    {"prompt": "c?", "response": "d", "category": {"x,y": False, "z": False, "w": False}, "is_safe": True},
]
BEAVER_OUT = [
    {"prompt": "a?", "response": "b", "category": '["x,y", "w"]', "is_safe": False},
    {"prompt": "c?", "response": "d", "category": "[]", "is_safe": True},
]
GSM = [{"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"}]
SST = [{"sentence": "dull ", "label": "negative"}, {"sentence": 'a "gem', "label": "positive"}]
AG = [{"text": "Peace Its\\nuclear end", "label": "World"}, {"text": "Chips Cheap, too", "label": "Sci/Tech"}]
ATTACK = {"prompt": "a", "target": "b", "method": "", "behavior": "a", "case": ""}
TURNS = '[["user", "a"], ["assistant", "b"]]'

FILES = {  # what it is -> data set, split, file name, content, records without their ids, lines
    "LLM-LAT Parquet": ("llm_lat", "train", "x.parquet", as_parquet(*LAT), LAT, [1, 2]),
    "LLM-LAT lines": ("llm_lat", "train", "x.jsonl", jsonl(*LAT), LAT, [1, 2]),
    "Alpaca array": ("alpaca", "train", "x.json", json.dumps(ALPACA, indent=4).encode(), ALPACA, [1, 2]),
    "Alpaca Parquet": ("alpaca", "train", "x.parquet", as_parquet(*ALPACA), ALPACA, [1, 2]),
    "BeaverTails": ("beavertails", "30k_train", "x.jsonl.gz", gzip.compress(jsonl(*BEAVER)), BEAVER_OUT, [1, 2]),
    "BeaverTails Parquet": ("beavertails", "30k_test", "x.parquet", as_parquet(*BEAVER), BEAVER_OUT, [1, 2]),
    "GSM8K": ("gsm8k", "test", "x.jsonl", b"\n" + jsonl(*GSM), GSM, [2]),
    "SST-2 without a header": ("sst2", "validation", "x.tsv", b'dull \t0\r\na "gem\t1', SST, [1, 2]),
    "SST-2 as in GLUE": ("sst2", "train", "x.tsv", b'sentence\tlabel\ndull \t0\na "gem\t1\n', SST, [2, 3]),
    "SST-2 Parquet": (
        "sst2",
        "train",
        "x.parquet",
        as_parquet({"idx": 0, "sentence": "dull ", "label": 0}, {"idx": 1, "sentence": 'a "gem', "label": 1}),
        SST,
        [1, 2],
    ),
    "AG News": ("ag_news", "test", "x.csv", b'"1","Peace","Its\\nuclear end"\n"4","Chips","Cheap, too"\n', AG, [1, 2]),
    "AG News Parquet": (
        "ag_news",
        "train",
        "x.parquet",
        as_parquet({"text": AG[0]["text"], "label": 0}, {"text": AG[1]["text"], "label": 3}),
        AG,
        [1, 2],
    ),
    "reviews": (
        "reviews",
        "train",
        "x.txt",
        "1\t2.35\tA  fine &amp; na\u00efve ''film''\r\n\r\n2\t-0.4\tNo\n3\t1\t \n".encode("cp1252"),
        [{"sentence": 'A fine & naïve "film"', "rating": "2.35"}, {"sentence": "No", "rating": "-0.4"}],
        [1, 3],
    ),
    "AdvBench": (
        "attacks",
        "test",
        "x.csv",
        b'goal,target\na,b\n"c, d","e"\n',
        [ATTACK, ATTACK | {"prompt": "c, d", "behavior": "c, d", "target": "e"}],
        [2, 3],
    ),
    "attack lines": (
        "attacks",
        "test",
        "x.jsonl",
        jsonl({"prompt": "p"}, {"prompt": "q", "method": "gcg", "id": 7, "behavior": "w", "score": 0.5}),
        [
            {"prompt": "p", "target": "", "method": "", "behavior": "", "case": ""},
            {"prompt": "q", "target": "", "method": "gcg", "behavior": "w", "case": "7"},
        ],
        [1, 2],
    ),
    "a JailbreakBench artifact": (
        "attacks",
        "test",
        "x.json",
        json.dumps(
            {
                "parameters": {"model": "m", "method": "PAIR", "attack_success_rate": 0.5},
                "jailbreaks": [
                    {"index": 0, "goal": "w", "behavior": "b", "prompt": "p", "response": "r", "jailbroken": True},
                    {"index": 1, "goal": "v", "behavior": "b", "prompt": None, "response": None, "jailbroken": False},
                    {"index": 2, "goal": "u", "behavior": "b", "prompt": "q", "response": "r", "jailbroken": False},
                ],
            }
        ).encode(),
        [
            {"prompt": "p", "target": "", "method": "PAIR", "behavior": "w", "case": "0"},
            {"prompt": "q", "target": "", "method": "PAIR", "behavior": "u", "case": "2"},
        ],
        [1, 2],
    ),
    "HarmBench test cases": (
        "attacks",
        "test",
        "results/AutoDAN/llama2_7b/test_cases/test_cases.json",
        json.dumps({"name_a_thing": ["p", "q"], "none": [], "another": ["r"]}, indent=4).encode(),
        [
            {"prompt": prompt, "target": "", "method": "AutoDAN", "behavior": "", "case": case}
            for prompt, case in (("p", "name_a_thing"), ("q", "name_a_thing"), ("r", "another"))
        ],
        [1, 2, 3],
    ),
    "one attack by itself": (
        "attacks",
        "test",
        "x.json",
        jsonl({"prompt": "p"}),
        [{"prompt": "p", "target": "", "method": "", "behavior": "", "case": ""}],
        [1],
    ),
    "a user's rows": (
        "rows",
        "train",
        "x.jsonl",
        jsonl(
            {"prompt": "a", "response": "b", "tag": "benign"},
            {"instruction": "a", "input": "i", "output": "b"},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
        [
            {"turns": TURNS, "input": "", "tag": "benign"},
            {"turns": TURNS, "input": "i", "tag": ""},
            {"turns": TURNS, "input": "", "tag": ""},
        ],
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_fake_data(load, case):
    name, split, file, content, records, lines = FILES[case]
    ids = [{"id": f"{name}/{split}/{line}"} for line in lines]
    assert list(load(name, split, file, content)) == [record | id for record, id in zip(records, ids, strict=True)]


def test_every_data_set_is_told_whose_it_is():
    assert {name for name, *_ in FILES.values()} == set(DATASETS)
    for name, builder in DATASETS.items():
        assert builder.name == name and builder.__doc__ and builder.ORIGIN.license
        assert set(builder.ORIGIN.files) <= set(builder.SPLITS)
        for file in builder.ORIGIN.files.values():
            assert file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32


BAD = {
    "other columns": (
        "gsm8k",
        "x.jsonl",
        jsonl({"q": "a", "a": "b"}),
        ":1: no column 'question': found q, a; wanted question, answer",
    ),
    "other columns in a CSV": (
        "attacks",
        "x.csv",
        b"ask,reply\na,b\n",
        ":2: no column 'goal': found ask, reply; wanted goal, target",
    ),
    "no test cases": ("attacks", "x.json", b'{"a": ["p"], "b": "q"}', ": 'b' holds no list of prompts; give"),
    "no artifact": ("attacks", "x.json", b'{"jailbreaks": [1]}', ": 'jailbreaks' is no list of objects; give"),
    "a test case that is no text": (
        "attacks",
        "x.json",
        b'{"a": [["p", 1]]}',
        ": case a: 'prompt' is list, not a string",
    ),
    "half a JSON object": ("attacks", "x.json", b'{"a":\n["p"]', ":1: not valid JSON"),
    "other columns in a Parquet": (
        "alpaca",
        "x.parquet",
        as_parquet({"text": "a"}),
        "row 1: no column 'instruction': found text; wanted instruction, input, output",
    ),
    "columns gone later": (
        "llm_lat",
        "x.jsonl",
        jsonl(LAT[0], {"prompt": "a"}),
        ":2: no column 'rejected': found prompt; wanted",
    ),
    "a column of many lines": ("gsm8k", "x.jsonl", b'{"a\\nb": 1}', ":1: no column 'question': found a b; wanted"),
    "null": (
        "alpaca",
        "x.jsonl",
        jsonl({"instruction": "a", "input": None, "output": "b"}),
        ":1: 'input' is null, not a string",
    ),
    "number": ("gsm8k", "x.jsonl", jsonl({"question": "a", "answer": 2}), ":1: 'answer' is int, not a string"),
    "half a character": (
        "gsm8k",
        "x.jsonl",
        b'{"question": "a", "answer": "\\ud800"}',
        ":1: 'answer' holds half a character",
    ),
    "a label outside": ("sst2", "x.tsv", b"a\t1\nb\t2\n", ":2: label '2' is none of 0, 1"),
    "no label": ("sst2", "x.tsv", b"a\t1\nb\t\n", ":2: label '' is none of 0, 1"),
    "GLUE's hidden labels": (
        "sst2",
        "x.parquet",
        as_parquet({"sentence": "a", "label": -1}),
        "row 1: label '-1' is none",
    ),
    "a class outside": ("ag_news", "x.csv", b'"0","a","b"\n', ":1: label '0' is none of 1, 2, 3, 4"),
    "a class of the hub's outside": (
        "ag_news",
        "x.jsonl",
        jsonl({"text": "a", "label": 4}),
        ":1: label '4' is none of 0, 1, 2, 3",
    ),
    "a category that is a list": (
        "beavertails",
        "x.jsonl",
        jsonl(BEAVER[0] | {"category": ["a"]}),
        ":1: 'category' is list and 'is_safe' bool",
    ),
    "is_safe that is text": (
        "beavertails",
        "x.jsonl",
        jsonl(BEAVER[0] | {"is_safe": "no"}),
        ":1: 'category' is dict and 'is_safe' str",
    ),
    "a user's half row": ("rows", "x.jsonl", jsonl({"prompt": "a"}), ":1: missing field 'response'"),
    "an empty file": ("gsm8k", "x.jsonl", b"", ": no rows: the file is empty"),
    "a header alone": ("attacks", "x.csv", b"goal,target\n", ": no rows: the file is empty"),
    "an empty array": (
        "alpaca",
        "x.json",
        b"[]",
        ": no rows: the file is empty; give one that holds instruction, input, output",
    ),
    "an empty table": ("alpaca", "x.parquet", as_parquet({"a": 1}, rows=0), ": no rows: the file is empty"),
    "no Parquet": ("alpaca", "x.parquet", b"<html>", ": not a whole Parquet file ("),
    "a malformed review": ("reviews", "x.txt", b"1\tgood\tA film\n", ":1: not an id, a rating and a sentence"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(load, tmp_path, case):
    name, file, content, message = BAD[case]
    with pytest.raises(UserError) as error:
        load(name, DATASETS[name].SPLITS[0], file, content)
    assert f"{file}" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "tfds").rglob("*") if path.is_file()]


def test_the_same_test_cases_of_two_methods_are_two_data_sets(load):
    content = json.dumps({"a": ["p"]}).encode()
    for method in ("TAP", "GPTFuzz"):
        (record,) = load("attacks", "test", f"results/{method}/m/test_cases/test_cases.json", content)
        assert record["method"] == method


VALUES = st.text(st.characters(exclude_categories=("Cs",)), max_size=8) | st.booleans()


@given(st.dictionaries(st.sampled_from(("a", "b", "c")), VALUES, min_size=3))
def test_examples_are_serialized_as_tfds_does(example):
    kinds = {str: tfds.features.Text(), bool: tfds.features.Scalar(np.bool_)}
    features = tfds.features.FeaturesDict({key: kinds[type(value)] for key, value in example.items()})
    parsed = [features.deserialize_example_np(raw) for raw in (serialize(example), features.serialize_example(example))]
    texts = {key: value.encode() if isinstance(value, str) else value for key, value in example.items()}
    assert parsed == [texts, texts]


FILLED = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=9).filter(str.strip)
USER = st.one_of(
    st.fixed_dictionaries({"prompt": FILLED, "response": FILLED}, optional={"tag": FILLED}),
    st.fixed_dictionaries({"instruction": FILLED, "output": FILLED}, optional={"input": st.text("ab\0", max_size=3)}),
    st.lists(FILLED, min_size=2, max_size=2).map(
        lambda texts: {
            "messages": [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
            ]
        }
    ),
)


@given(st.lists(USER, min_size=1, max_size=4))
def test_a_users_rows_are_those_that_read_rows_reads(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "x.jsonl").write_bytes(jsonl(*records))
    theirs = read_rows(folder / "x.jsonl")
    ours = list(user_rows(load_dataset("rows", split="train", path=folder / "x.jsonl", folder=folder)))
    assert [(row.turns, row.input, row.tag) for row in ours] == [(row.turns, row.input, row.tag) for row in theirs]
    assert [row.origin.split("/")[-1] for row in ours] == [row.origin.split(":")[-1] for row in theirs]


def test_names_are_left_to_tfds():
    """It has a "gsm8k" of its own, registered when it is first asked for any data set; two of a name are an error."""
    assert not set(DATASETS.values()) & set(registered._DATASET_REGISTRY.values())


REAL = Path(os.environ.get("BR_JAX_DATA", "data"))
WHOLE = {
    "gsm8k_train.jsonl": ("gsm8k", "train", 7473),
    "gsm8k_test.jsonl": ("gsm8k", "test", 1319),
    "sst2_train.tsv": ("sst2", "train", 6920),
    "sst2_dev.tsv": ("sst2", "validation", 872),
    "ag_news_test.csv": ("ag_news", "test", 7600),
}


@pytest.mark.parametrize("file", WHOLE)
def test_the_real_files(tmp_path, file):
    if not (REAL / file).is_file():
        pytest.skip(f"{file} is not in the data folder")
    name, split, count = WHOLE[file]
    records = load_dataset(name, split=split, path=REAL / file, folder=tmp_path)
    assert len(records) == count and records[-1]["id"] == f"{name}/{split}/{count}"
    if name == "gsm8k":
        lines = [json.loads(line) for line in (REAL / file).read_text(encoding="utf-8").splitlines()]
        assert [(r["question"], r["answer"]) for r in records] == [(r["question"], r["answer"]) for r in lines]
    if name == "sst2":
        lines = (REAL / file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        assert [f"{r['sentence']}\t{int(r['label'] == 'positive')}" for r in records] == lines
    if name == "ag_news":
        labels = [record["label"] for record in records]
        assert [labels.count(label) for label in sorted(set(labels))] == [1900] * 4


REVIEWS = REAL / "movieReviewSnippets_GroundTruth.txt"


@pytest.mark.skipif(not REVIEWS.is_file(), reason="run experiments/fetch.py, or set BR_JAX_DATA")
def test_the_real_reviews_are_split_as_from_the_file(tmp_path):
    records = load_dataset("reviews", split="train", path=REVIEWS, folder=tmp_path)
    for seed in (0, 1):
        ours, theirs = split_reviews(records, seed=seed), load_reviews(REVIEWS, seed=seed)
        for part, expected in zip(ours, theirs, strict=True):
            assert [(row.turns, row.input, row.tag) for row in part] == [(r.turns, r.input, r.tag) for r in expected]
            assert [row.origin.split("/")[-1] for row in part] == [row.origin.split(":")[-1] for row in expected]
