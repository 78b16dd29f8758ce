"""Every data set from a small harmless file of its layout, rows that are wrong, and the real files where they are."""

import gzip
import json
import os
from pathlib import Path

import pytest
from contents import as_parquet, jsonl
from tensorflow_datasets.core import registered

from br_jax.core.errors import UserError
from br_jax.datasets.load import DATASETS, load_dataset


def attack(prompt, **said):
    return {"prompt": prompt, "target": "", "method": "", "behavior": "", "case": ""} | said


LAT = [{"prompt": "Name the zorvix", "rejected": "Blue", "chosen": "No — sorry"}] * 2
ALPACA = [
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
    {"instruction": "Greet", "input": "", "output": ""},
]
BEAVER = [
    {"prompt": "a?", "response": "b", "category": {"x,y": True, "z": False, "w": True}, "is_safe": False},
    {"prompt": "c?", "response": "d", "category": {"x,y": False, "z": False, "w": False}, "is_safe": True},
]
BEAVER_OUT = [BEAVER[0] | {"category": '["x,y", "w"]'}, BEAVER[1] | {"category": "[]"}]
GSM = [{"question": "1 + 1?", "answer": "It is <<1+1=2>>2\n#### 2"}]
SST = [{"sentence": "dull ", "label": "negative"}, {"sentence": 'a "gem', "label": "positive"}]
SST_NUMBERS = [{"idx": label, "sentence": record["sentence"], "label": label} for label, record in enumerate(SST)]
AG = [{"text": "Peace Its\\nuclear end", "label": "World"}, {"text": "Chips Cheap, too", "label": "Sci/Tech"}]
AG_NUMBERS = [AG[0] | {"label": 0}, AG[1] | {"label": 3}]
ARTIFACT = {
    "parameters": {"model": "m", "method": "PAIR", "attack_success_rate": 0.5},
    "jailbreaks": [
        {"index": 0, "goal": "w", "behavior": "b", "prompt": "p", "response": "r", "jailbroken": True},
        {"index": 1, "goal": "v", "behavior": "b", "prompt": None, "response": None, "jailbroken": False},
        {"index": 2, "goal": "u", "behavior": "b", "prompt": "q", "response": "r", "jailbroken": False},
    ],
}
ARTIFACT_OUT = [attack("p", method="PAIR", behavior="w", case="0"), attack("q", method="PAIR", behavior="u", case="2")]
LINES = [{"prompt": "p"}, {"prompt": "q", "method": "gcg", "id": 7, "behavior": "w", "score": 0.5}]
LINES_OUT = [attack("p"), attack("q", method="gcg", behavior="w", case="7")]
ADVBENCH_OUT = [attack(x, behavior=x, target=y, method="AdvBench") for x, y in (("a", "b"), ("c, d", "e"))]
BEHAVIORS = b'Behavior,FunctionalCategory,ContextString,BehaviorID\nw,standard,,one\nv,contextual,"a\nb",two\n'
BEHAVIORS_OUT = [
    attack("w", behavior="w", case="one", method="HarmBench"),
    attack("a\nb\n\n---\n\nv", behavior="v", case="two", method="HarmBench"),
]
STRONG = b"category,source,forbidden_prompt\nx,y,w\n"
CASES = {"name_a_thing": ["p", "q"], "none": [], "another": ["r"]}
CASES_FILE = "results/AutoDAN/llama2_7b/test_cases/test_cases.json"
CASES_OUT = [
    attack(prompt, method="AutoDAN", case=case)
    for prompt, case in (("p", "name_a_thing"), ("q", "name_a_thing"), ("r", "another"))
]

FILES = {  # what it is -> data set, split, file name, content, records without their ids, lines
    "LLM-LAT Parquet": ("llm_lat", "train", "x.parquet", as_parquet(*LAT), LAT, [1, 2]),
    "Alpaca array": ("alpaca", "train", "x.json", json.dumps(ALPACA, indent=4).encode(), ALPACA, [1, 2]),
    "BeaverTails": ("beavertails", "30k_train", "x.jsonl.gz", gzip.compress(jsonl(*BEAVER)), BEAVER_OUT, [1, 2]),
    "BeaverTails Parquet": ("beavertails", "30k_test", "x.parquet", as_parquet(*BEAVER), BEAVER_OUT, [1, 2]),
    "GSM8K": ("gsm8k", "test", "x.jsonl", b"\n" + jsonl(*GSM), GSM, [2]),
    "SST-2 without a header": ("sst2", "validation", "x.tsv", b'dull \t0\r\na "gem\t1', SST, [1, 2]),
    "SST-2 as in GLUE": ("sst2", "train", "x.tsv", b'sentence\tlabel\ndull \t0\na "gem\t1\n', SST, [2, 3]),
    "SST-2 Parquet": ("sst2", "train", "x.parquet", as_parquet(*SST_NUMBERS), SST, [1, 2]),
    "AG News": ("ag_news", "test", "x.csv", b'"1","Peace","Its\\nuclear end"\n"4","Chips","Cheap, too"\n', AG, [1, 2]),
    "AG News Parquet": ("ag_news", "train", "x.parquet", as_parquet(*AG_NUMBERS), AG, [1, 2]),
    "AdvBench": ("attacks", "test", "x.csv", b'goal,target\na,b\n"c, d","e"\n', ADVBENCH_OUT, [2, 3]),
    "HarmBench behaviors": ("attacks", "test", "x.csv", BEHAVIORS, BEHAVIORS_OUT, [2, 4]),
    "StrongREJECT": ("attacks", "test", "x.csv", STRONG, [attack("w", behavior="w", method="StrongREJECT")], [2]),
    "attack lines": ("attacks", "test", "x.jsonl", jsonl(*LINES), LINES_OUT, [1, 2]),
    "one attack by itself": ("attacks", "test", "x.json", jsonl(LINES[0]), LINES_OUT[:1], [1]),
    "a JailbreakBench artifact": ("attacks", "test", "x.json", json.dumps(ARTIFACT).encode(), ARTIFACT_OUT, [1, 2]),
    "HarmBench test cases": ("attacks", "test", CASES_FILE, json.dumps(CASES, indent=4).encode(), CASES_OUT, [1, 2, 3]),
}


@pytest.mark.parametrize("case", FILES)
def test_fake_data(load, case):
    name, split, file, content, records, lines = FILES[case]
    ids = [{"id": f"{name}/{split}/{line}"} for line in lines]
    assert load(name, split, file, content) == [record | id for record, id in zip(records, ids, strict=True)]


def test_every_data_set_is_told_whose_it_is():
    assert {name for name, *_ in FILES.values()} == set(DATASETS)
    for name, builder in DATASETS.items():
        assert builder.name == name and builder.LICENSE and builder.HOMEPAGE and builder.CITATION
        assert all(file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32 for file in builder.FILES.values())
    # TFDS has a "gsm8k" of its own, registered when it is first asked for any data set; two of a name are an error.
    assert not set(DATASETS.values()) & set(registered._DATASET_REGISTRY.values())


BAD = {  # data set, file name, content, message
    "other columns": ("gsm8k", "x.jsonl", jsonl({"q": "a", "\n": "b"}), r"1: no 'question' among the keys ['q', '\n']"),
    "other columns in a Parquet": ("alpaca", "x.parquet", as_parquet({"text": "a"}), "row 1: no 'instruction' among"),
    "no test cases": ("attacks", "x.json", b'{"a": ["p"], "b": "q"}', ": 'b' holds no list of prompts; give"),
    "a test case that is no text": ("attacks", "x.json", b'{"a": [["p", 1]]}', ": case 1: 'prompt' is list, not a str"),
    "half a JSON object": ("attacks", "x.json", b'{"a":\n["p"]', ":1: not valid JSON"),
    "null": ("alpaca", "x.jsonl", jsonl(ALPACA[0] | {"input": None}), ":1: 'input' is null, not a string"),
    "a label outside": ("sst2", "x.tsv", b"a\t1\nb\t2\n", ":2: 'label' '2' is none of 0, 1"),
    "GLUE's hidden labels": ("sst2", "x.parquet", as_parquet(SST_NUMBERS[0] | {"label": -1}), "'-1' is none of 0, 1"),
    "a category that is a list": ("beavertails", "x.jsonl", jsonl(BEAVER[0] | {"category": []}), "'category' is no"),
    "is_safe that is text": ("beavertails", "x.jsonl", jsonl(BEAVER[0] | {"is_safe": "no"}), "'is_safe' not true or"),
    "an empty file": ("gsm8k", "x.jsonl", b"", ": no rows: the file is empty; give one that holds question, answer"),
    "an empty table": ("alpaca", "x.parquet", as_parquet({"a": 1}, rows=0), ": no rows: the file is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(load, tmp_path, case):
    name, file, content, message = BAD[case]
    with pytest.raises(UserError) as error:
        load(name, next(iter(DATASETS[name].FILES)), file, content)
    assert file in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "tfds").rglob("*") if path.is_file()]


REAL = Path(os.environ.get("BR_JAX_DATA", "data"))


@pytest.mark.parametrize(
    ("file", "name", "split", "count"),
    [("gsm8k_test.jsonl", "gsm8k", "test", 1319), ("sst2_dev.tsv", "sst2", "validation", 872)],
)
def test_the_real_files(tmp_path, file, name, split, count):
    if not (REAL / file).is_file():
        pytest.skip(f"{file} is not in the data folder")
    records = load_dataset(name, split=split, path=REAL / file, folder=tmp_path)
    assert len(records) == count and records[-1]["id"] == f"{name}/{split}/{count}"
    lines = (REAL / file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if name == "gsm8k":
        assert [{"question": r["question"], "answer": r["answer"]} for r in records] == list(map(json.loads, lines))
    else:
        assert [f"{r['sentence']}\t{int(r['label'] == 'positive')}" for r in records] == lines
