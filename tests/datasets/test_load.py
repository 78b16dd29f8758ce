"""Data sets from small harmless files and a server on this machine: every layout, prepared once, never half-written."""

import dataclasses
import gzip
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from contents import as_parquet, as_zip, jsonl
from tensorflow_datasets.core import registered

from br_jax.core.errors import UserError
from br_jax.datasets import load as module
from br_jax.datasets.load import DATASETS, Builder, PublicFile, load_dataset


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
CASES_OUT = [attack(p, method="AutoDAN", case=c) for c, prompts in CASES.items() for p in prompts]

FILES = (  # data set, split, file name, content, records without their ids, lines
    ("llm_lat", "train", "x.parquet", as_parquet(*LAT), LAT, [1, 2]),
    ("alpaca", "train", "x.json", json.dumps(ALPACA, indent=4).encode(), ALPACA, [1, 2]),
    ("beavertails", "30k_train", "x.jsonl.gz", gzip.compress(jsonl(*BEAVER)), BEAVER_OUT, [1, 2]),
    ("beavertails", "30k_test", "x.parquet", as_parquet(*BEAVER), BEAVER_OUT, [1, 2]),
    ("gsm8k", "test", "x.jsonl", b"\n" + jsonl(*GSM), GSM, [2]),
    ("sst2", "validation", "x.tsv", b'dull \t0\r\na "gem\t1', SST, [1, 2]),
    ("sst2", "train", "x.tsv", b'sentence\tlabel\ndull \t0\na "gem\t1\n', SST, [2, 3]),
    ("sst2", "train", "x.parquet", as_parquet(*SST_NUMBERS), SST, [1, 2]),
    ("ag_news", "test", "x.csv", b'"1","Peace","Its\\nuclear end"\n"4","Chips","Cheap, too"\n', AG, [1, 2]),
    ("ag_news", "train", "x.parquet", as_parquet(*AG_NUMBERS), AG, [1, 2]),
    ("attacks", "test", "x.csv", b'goal,target\na,b\n"c, d","e"\n', ADVBENCH_OUT, [2, 3]),
    ("attacks", "test", "y.csv", BEHAVIORS, BEHAVIORS_OUT, [2, 4]),
    ("attacks", "test", "z.csv", STRONG, [attack("w", behavior="w", method="StrongREJECT")], [2]),
    ("attacks", "test", "x.jsonl", jsonl(*LINES), LINES_OUT, [1, 2]),
    ("attacks", "test", "x.json", jsonl(LINES[0]), LINES_OUT[:1], [1]),
    ("attacks", "test", "y.json", json.dumps(ARTIFACT).encode(), ARTIFACT_OUT, [1, 2]),
    ("attacks", "test", CASES_FILE, json.dumps(CASES, indent=4).encode(), CASES_OUT, [1, 2, 3]),
)


@pytest.mark.parametrize("case", FILES, ids=[f"{name} {Path(file).name}" for name, _, file, *_ in FILES])
def test_every_layout(load, case):
    name, split, file, content, records, lines = case
    ids = [{"id": f"{name}/{split}/{line}"} for line in lines]
    assert load(name, split, file, content) == [record | id for record, id in zip(records, ids, strict=True)]


def test_every_data_set_is_told_whose_it_is():
    assert {name for name, *_ in FILES} == set(DATASETS)
    for source in DATASETS.values():
        assert source.license and source.homepage and source.citation and source.description
        assert all(file.sha256 is None or len(bytes.fromhex(file.sha256)) == 32 for file in source.files.values())
    # TFDS has a "gsm8k" of its own, registered when it is first asked for any data set; two of a name are an error.
    assert Builder not in registered._DATASET_REGISTRY.values()


BAD = (  # data set, file name, content, message
    ("gsm8k", "x.jsonl", jsonl({"q": "a", "\n": "b"}), r"1: no 'question' among the keys ['q', '\n']"),
    ("alpaca", "x.parquet", as_parquet({"text": "a"}), "row 1: no 'instruction' among"),
    ("attacks", "x.json", b'{"a": ["p"], "b": "q"}', ": 'b' holds no list of prompts; give"),
    ("attacks", "x.json", b'{"a": [["p", 1]]}', ": case 1: 'prompt' is list, not a str"),
    ("attacks", "x.json", b'{"a":\n["p"]', ":1: not valid JSON"),
    ("alpaca", "x.jsonl", jsonl(ALPACA[0] | {"input": None}), ":1: 'input' is null, not a string"),
    ("sst2", "x.tsv", b"a\t1\nb\t2\n", ":2: 'label' '2' is none of 0, 1"),
    ("sst2", "x.parquet", as_parquet(SST_NUMBERS[0] | {"label": -1}), "'-1' is none of 0, 1"),  # GLUE's hidden ones
    ("beavertails", "x.jsonl", jsonl(BEAVER[0] | {"category": []}), "'category' is no"),
    ("beavertails", "x.jsonl", jsonl(BEAVER[0] | {"is_safe": "no"}), "'is_safe' not true or"),
    ("gsm8k", "x.jsonl", b"", ": no rows: the file is empty; give one that holds question, answer"),
    ("alpaca", "x.parquet", as_parquet({"a": 1}, rows=0), ": no rows: the file is empty"),
)


def test_bad_rows(load, tmp_path):
    for name, file, content, message in BAD:
        with pytest.raises(UserError) as error:
            load(name, next(iter(DATASETS[name].files)), file, content)
        assert file in str(error.value) and message in str(error.value) and "\n" not in str(error.value)
    for name, split, near in (("gsm", "train", "gsm8k"), ("beavertails", "test", "30k_test")):
        with pytest.raises(UserError, match=f"near: {near}"):
            load_dataset(name, split=split, folder=tmp_path)
    assert files(tmp_path / "tfds") == []


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


# Prepared once, and never by half.


def lines(count):
    return jsonl(*({"question": f"q{n}", "answer": "b"} for n in range(count)))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() or path.name.startswith("."))


def test_nothing_is_prepared_twice_and_nothing_stale_is_read(load, tmp_path, monkeypatch):
    load("gsm8k", "train", "x.jsonl", lines(3))
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path / "tfds")}
    monkeypatch.setattr(Builder, "download_and_prepare", lambda *_, **__: pytest.fail("prepared again"))
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: pytest.fail("written"))
    assert len(load("gsm8k", "train", "y.jsonl", lines(3))) == 3  # the same content
    monkeypatch.undo()
    assert len(load("gsm8k", "train", "x.jsonl", lines(4))) == 4  # the same name
    assert load("gsm8k", "test", "x.jsonl", lines(3))[0]["id"] == "gsm8k/test/1"
    table = b"goal,target\na\tb,c\n"
    assert load("attacks", "test", "x.csv", table)[0]["prompt"] == "a\tb"
    with pytest.raises(UserError, match=r"x\.tsv"):  # the same bytes under another ending
        load("attacks", "test", "x.tsv", table)
    for method in ("TAP", "GPTFuzz"):  # HarmBench's folders are in no content
        (record,) = load("attacks", "test", f"results/{method}/m/test_cases/test_cases.json", b'{"a": ["p"]}')
        assert record["method"] == method
    monkeypatch.setattr(Builder, "VERSION", "1.0.1")
    monkeypatch.setitem(module._MADE, "gsm8k", lambda *_: {"question": "new", "answer": "new"})
    assert load("gsm8k", "train", "x.jsonl", lines(3))[0]["question"] == "new"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_preparation_leaves_nothing_and_is_redone(load, tmp_path, monkeypatch):
    def stopped(record, where):
        if record["question"] == "q30":
            raise KeyboardInterrupt
        return record

    monkeypatch.setitem(module._MADE, "gsm8k", stopped)
    with pytest.raises(KeyboardInterrupt):
        load("gsm8k", "train", "x.jsonl", lines(50))
    assert files(tmp_path / "tfds") == []
    monkeypatch.undo()
    assert len(load("gsm8k", "train", "x.jsonl", lines(50))) == 50


CHILD = """
import os, signal, sys
import br_jax, br_jax.datasets.paper
assert "tensorflow_datasets" not in sys.modules  # it takes seconds to import
from br_jax.datasets import load
if len(sys.argv) > 3:
    load._MADE["gsm8k"] = lambda record, where: (
        os.kill(os.getpid(), signal.SIGKILL) if record["question"] == sys.argv[3] else record
    )
print(len(load.load_dataset("gsm8k", split="train", path=sys.argv[1], folder=sys.argv[2])))
"""


def start(*arguments, **environment):
    command = [sys.executable, "-W", "error", "-c", CHILD, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment})


@pytest.mark.slow
def test_a_killed_preparation_is_redone(tmp_path):
    path, folder = tmp_path / "x.jsonl", tmp_path / "tfds"
    path.write_bytes(lines(300))
    child = start(path, folder, "q200")
    child.communicate()
    assert child.returncode == -signal.SIGKILL and list(folder.glob("gsm8k/*/*incomplete*"))
    assert not list(folder.glob("gsm8k/*/1.0.0"))
    assert len(load_dataset("gsm8k", split="train", path=path, folder=folder)) == 300


@pytest.mark.slow
def test_two_processes_may_prepare_the_same_without_tensorflow_or_a_word(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(20_000))
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('imported')")
    found = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    children = [start(path, tmp_path / "tfds", PYTHONPATH=found) for _ in range(2)]
    for child in children:
        assert child.communicate() == (b"20000\n", b"")
    assert len(list((tmp_path / "tfds").glob("gsm8k/*/*"))) == 1


def test_another_process_was_faster(load, tmp_path, monkeypatch):
    prepare = Builder._split_generators

    def late(self, *arguments):
        monkeypatch.undo()
        load("gsm8k", "train", "x.jsonl", lines(3000))
        return prepare(self, *arguments)

    monkeypatch.setattr(Builder, "_split_generators", late)
    records = load("gsm8k", "train", "x.jsonl", lines(3000))
    assert [record["question"] for record in records] == [f"q{n}" for n in range(3000)]
    assert len(list((tmp_path / "tfds").glob("gsm8k/*/*"))) == 1


def test_a_disk_that_takes_no_more(tmp_path, small_disk):
    """ArrayRecord's own writer meets it; or a file is where the folder should be."""
    path = tmp_path / "large.jsonl"
    path.write_bytes(jsonl(*({"question": os.urandom(99).hex(), "answer": "b"} for _ in range(9_999))))
    with small_disk(1 << 19), pytest.raises(UserError, match=r"tfds: .* \(.*File too large.*\): free some"):
        load_dataset("gsm8k", split="train", path=path, folder=tmp_path / "tfds")
    assert files(tmp_path / "tfds") == []
    with pytest.raises(UserError, match=r"large\.jsonl: the data cannot be prepared there \(File exists\)"):
        load_dataset("gsm8k", split="train", path=path, folder=path)


# Downloads: what comes is verified, what does not is one line; nothing is left over.

TRAIN = b'{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * 3
TEST = b'{"question": "2 + 2?", "answer": "4\\n#### 4"}\n'


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def publish(monkeypatch):
    """publish(name, split=PublicFile(...)) makes these a data set's public files."""

    def place(name, **files):
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], files=files))

    return place


@pytest.fixture
def fetch(serve, publish, tmp_path):
    """fetch({"/path": answer}, split=(path, sha256)) -> the records of GSM8K's first split, from there."""

    def download(answers, **files):
        address = serve(answers)
        publish("gsm8k", **{split: PublicFile(address + path, checksum) for split, (path, checksum) in files.items()})
        return load_dataset("gsm8k", split=next(iter(files)), folder=tmp_path / "tfds")

    return download


def test_right_files(fetch, tmp_path, caplog, capfd):
    answers = {"/a/train.jsonl": (200, TRAIN), "/a/test.jsonl": (200, TEST)}
    records = fetch(answers, train=("/a/train.jsonl", sha256(TRAIN)), test=("/a/test.jsonl", sha256(TEST)))
    assert [record["id"] for record in records] == [f"gsm8k/train/{n}" for n in (1, 2, 3)]
    told = [message for message in caplog.messages if "downloading" in message]
    assert len(told) == 2 and all("MIT" in message and DATASETS["gsm8k"].homepage in message for message in told)
    assert not [path for path in files(tmp_path) if path.name.startswith(".")] and capfd.readouterr().out == ""
    answers.clear()  # both splits are there: the server is not asked again
    assert load_dataset("gsm8k", split="test", folder=tmp_path / "tfds")[0]["answer"] == "4\n#### 4"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, TEST), f"sha256 mismatch: expected {sha256(TRAIN)}, got {sha256(TEST)}: nothing was kept"),
        ((401, b"no"), "cannot be downloaded (HTTPError 401): check the network and the terms of access at https://g"),
        ((200, TRAIN, 999), "cannot be downloaded (ChunkedEncodingError): check"),  # it breaks off
    ],
)
def test_what_does_not_come(fetch, tmp_path, answer, message):
    with pytest.raises(UserError) as error:
        fetch({"/c/train.jsonl": answer}, train=("/c/train.jsonl", sha256(TRAIN)))
    assert f"/c/train.jsonl: {message}" in str(error.value) and "\n" not in str(error.value)
    assert files(tmp_path) == []


def test_no_network_and_no_room(fetch, publish, tmp_path, small_disk, monkeypatch):
    with small_disk(1 << 20), pytest.raises(UserError, match=r"tfds: .* \(File too large\): free some"):
        fetch({"/f/train.jsonl": (200, TRAIN * 100_000)}, train=("/f/train.jsonl", None))
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/train.jsonl"
    publish("gsm8k", train=PublicFile(url, sha256(TRAIN)))
    with pytest.raises(UserError, match=rf"^{url}: cannot be downloaded \(ConnectionError\): check the network and"):
        load_dataset("gsm8k", split="train", folder=tmp_path)
    assert files(tmp_path) == []


def test_another_pin_is_another_preparation_and_an_unknown_one_is_told(fetch, caplog):
    first = fetch({"/h/train.jsonl": (200, TEST)}, train=("/h/train.jsonl", sha256(TEST)))
    second = fetch({"/h/train.jsonl": (200, TRAIN)}, train=("/h/train.jsonl", None))
    assert (len(first), len(second)) == (1, 3) and sha256(TRAIN) in caplog.messages[-1]
    with pytest.raises(UserError, match=r"^train\.jsonl:2: not valid JSON"):
        fetch({"/g/train.jsonl": (200, TEST + b"half")}, train=("/g/train.jsonl", None))


def test_two_splits_in_one_archive(serve, publish, tmp_path):
    members = {"train": "SST-2/train.tsv", "validation": "SST-2/dev.tsv"}
    lines = ("fine \t1\n", "dull\t0\n")
    archive = as_zip({m: f"sentence\tlabel\n{line}" for m, line in zip(members.values(), lines, strict=True)})
    url = serve({"/SST-2.zip": (200, archive)}) + "/SST-2.zip"
    publish("sst2", **{s: PublicFile(url, sha256(archive), None, member) for s, member in members.items()})
    train, validation = (load_dataset("sst2", split=split, folder=tmp_path) for split in members)
    assert train == [{"id": "sst2/train/2", "sentence": "fine ", "label": "positive"}]
    assert validation == [{"id": "sst2/validation/2", "sentence": "dull", "label": "negative"}]
