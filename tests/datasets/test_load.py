"""Prepared data: in order, never stale, never half-written."""

import os
import signal
import subprocess
import sys

import pytest
from contents import jsonl

from br_jax.core.errors import UserError
from br_jax.datasets.builder import Builder
from br_jax.datasets.load import Gsm8k, load_dataset


def lines(count):
    return jsonl(*({"question": f"q{n}", "answer": "b"} for n in range(count)))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
    monkeypatch.setattr(Gsm8k, "VERSION", "1.0.1")
    monkeypatch.setattr(Gsm8k, "example", lambda *_: {"question": "new", "answer": "new"})
    assert load("gsm8k", "train", "x.jsonl", lines(3))[0]["question"] == "new"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_preparation_leaves_nothing_and_is_redone(load, tmp_path, monkeypatch):
    def stopped(self, record, where):
        if record["question"] == "q30":
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(Gsm8k, "example", stopped)
    with pytest.raises(KeyboardInterrupt):
        load("gsm8k", "train", "x.jsonl", lines(50))
    assert files(tmp_path / "tfds") == [] and not list((tmp_path / "tfds").glob(".*"))
    monkeypatch.undo()
    assert len(load("gsm8k", "train", "x.jsonl", lines(50))) == 50


CHILD = """
import os, signal, sys
import br_jax, br_jax.datasets.paper
assert "tensorflow_datasets" not in sys.modules  # it takes seconds to import
from br_jax.datasets.load import Gsm8k
from br_jax.datasets.load import load_dataset
if len(sys.argv) > 3:
    Gsm8k.example = lambda self, record, where: (
        os.kill(os.getpid(), signal.SIGKILL) if record["question"] == sys.argv[3] else record
    )
print(len(load_dataset("gsm8k", split="train", path=sys.argv[1], folder=sys.argv[2])))
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
    assert records[-1]["id"] == "gsm8k/train/3000"
    assert len(list((tmp_path / "tfds").glob("gsm8k/*/*"))) == 1
    for name, split, near in (("gsm", "train", "gsm8k"), ("beavertails", "test", "30k_test")):
        with pytest.raises(UserError, match=f"near: {near}"):
            load_dataset(name, split=split, folder=tmp_path)


def test_a_disk_that_takes_no_more(tmp_path, small_disk):
    """ArrayRecord's own writer meets it."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl(*({"question": os.urandom(99).hex(), "answer": "b"} for _ in range(9_999))))
    with small_disk(1 << 19), pytest.raises(UserError, match=r"tfds: .* \(.*File too large.*\): free some"):
        load_dataset("gsm8k", split="train", path=path, folder=tmp_path / "tfds")
    assert files(tmp_path / "tfds") == []


def test_a_file_where_the_folder_should_be(load, tmp_path):
    (tmp_path / "tfds").write_text("mine")
    with pytest.raises(UserError, match=r"tfds: the data cannot be prepared there \(File exists\)"):
        load("gsm8k", "train", "x.jsonl", lines(1))
