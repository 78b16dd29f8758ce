"""Prepared data: lazy, in order, never stale, never half-written, and small in memory."""

import itertools
import json
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc

import grain
import pytest

from br_jax.datasets import shards
from br_jax.datasets.builder import Builder
from br_jax.datasets.builders import DATASETS, Gsm8k
from br_jax.datasets.load import BLOCK, load_dataset
from br_jax.datasets.paper import user_rows
from br_jax.errors import UserError


def lines(count, answer="b"):
    return b"".join(json.dumps({"question": f"q{n}", "answer": answer}).encode() + b"\n" for n in range(count))


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_sequence(load):
    count = 2 * BLOCK + 7
    records = load("gsm8k", "train", "x.jsonl", lines(count))
    everything = list(records)
    assert len(records) == len(everything) == count
    assert [record["question"] for record in everything] == [f"q{n}" for n in range(count)]
    for index in (0, 1, BLOCK, count - 1, -1, -count):
        assert records[index] == everything[index]
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            records[index]
    assert records.__getitems__([5, 0, -1]) == [everything[5], everything[0], everything[-1]]
    assert records.__getitems__([]) == []
    assert all(type(value) is str for value in everything[0].values())
    assert type(load("beavertails", "30k_test", "b.jsonl", BEAVER)[0]["is_safe"]) is bool


BEAVER = b'{"prompt": "a", "response": "b", "category": {}, "is_safe": true}'


@pytest.mark.parametrize("index", [slice(3), slice(2, 9, 3), slice(None, None, -1), slice(-4, None), slice(9, 3)])
def test_slices_are_lazy_and_may_be_sliced(load, index):
    records = load("gsm8k", "train", "x.jsonl", lines(12))
    part = records[index]
    assert type(part) is type(records) and list(part) == list(records)[index]
    assert list(part[1:]) == list(records)[index][1:]
    assert [part[n] for n in range(len(part))] == list(part)


def test_records_travel_to_other_processes(load):
    records = load("gsm8k", "train", "x.jsonl", lines(20))[5:15]
    assert records[0]["question"] == "q5"  # opened, and yet pickled
    copy = pickle.loads(pickle.dumps(records))
    assert list(copy) == list(records)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(list, (records,)) == list(records)


def test_grain_takes_them_as_a_source(load):
    records = load("gsm8k", "train", "x.jsonl", lines(20))
    data = grain.MapDataset.source(records).shuffle(seed=0).map(lambda record: record["question"])
    assert sorted(data[n] for n in range(len(data))) == sorted(f"q{n}" for n in range(20))


def test_many_shards_keep_the_order(load, monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2_000)
    records = load("gsm8k", "train", "x.jsonl", lines(500))
    assert [record["question"] for record in records] == [f"q{n}" for n in range(500)]
    assert records[499]["id"] == "gsm8k/train/500"
    names = [path.name for path in files(tmp_path / "tfds") if "array_record" in path.name]
    assert len(names) > 10 and names[-1].endswith(f"-{len(names) - 1:05}-of-{len(names):05}")
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_is_prepared_twice_and_nothing_stale_is_read(load, tmp_path, monkeypatch):
    load("gsm8k", "train", "x.jsonl", lines(3))
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path / "tfds")}
    monkeypatch.setattr(Builder, "_generate_splits", lambda *_: pytest.fail("prepared again"))
    assert len(load("gsm8k", "train", "y.jsonl", lines(3))) == 3  # the same content
    monkeypatch.undo()
    assert len(load("gsm8k", "train", "x.jsonl", lines(4))) == 4  # the same name
    assert load("gsm8k", "test", "x.jsonl", lines(3))[0]["id"] == "gsm8k/test/1"
    # The same bytes are other records under another ending.
    table = b"goal,target\na\tb,c\n"
    assert load("attacks", "test", "x.csv", table)[0]["prompt"] == "a\tb"
    with pytest.raises(UserError, match=r"x\.tsv"):
        load("attacks", "test", "x.tsv", table)
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
import sys
from br_jax.datasets.load import load_dataset
print(len(load_dataset("gsm8k", split="train", path=sys.argv[1], folder=sys.argv[2])))
"""


def start(path, folder):
    return subprocess.Popen([sys.executable, "-c", CHILD, path, folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_preparation_is_redone(tmp_path):
    path, folder = tmp_path / "x.jsonl", tmp_path / "tfds"
    path.write_bytes(lines(200_000))
    child = start(path, folder)
    while not list(folder.rglob("*.part")):
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not list(folder.glob("gsm8k/*/1.0.0"))
    path.write_bytes(lines(30))  # less of it, to be quick; the ruins are another content's
    assert len(load_dataset("gsm8k", split="train", path=path, folder=folder)) == 30


def test_two_processes_may_prepare_the_same(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(20_000))
    children = [start(path, tmp_path / "tfds") for _ in range(2)]
    for child in children:
        assert child.communicate() == (b"20000\n", b"")
    assert len(list((tmp_path / "tfds").glob("gsm8k/*/*"))) == 1


def test_another_process_was_faster(load, tmp_path, monkeypatch):
    prepare = Builder._generate_splits

    def late(self, *arguments):
        monkeypatch.undo()
        load("gsm8k", "train", "x.jsonl", lines(5))
        return prepare(self, *arguments)

    monkeypatch.setattr(Builder, "_generate_splits", late)
    assert len(load("gsm8k", "train", "x.jsonl", lines(5))) == 5
    assert len(list((tmp_path / "tfds").glob("gsm8k/*/*"))) == 1


def test_memory_does_not_grow_with_the_file(load):
    """What Python allocates at its peak, for a file of some rows and for one of ten times as many."""
    peaks = []
    load("gsm8k", "train", "warm.jsonl", lines(10))
    for count in (2_000, 20_000):
        content = lines(count, "b" * 100)
        tracemalloc.start()
        records = load("gsm8k", "train", "x.jsonl", content)
        assert len(list(itertools.islice(records, 1000))) == 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000 < len(content), peaks


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("gsm", "train", "no data set 'gsm'; near: gsm8k"),
        ("nothing", "train", f"no data set 'nothing'; near: {', '.join(sorted(DATASETS))}"),
        ("gsm8k", "tain", "data set 'gsm8k' has no split 'tain'; near: train"),
        ("beavertails", "test", "data set 'beavertails' has no split 'test'; near: 30k_test"),
        ("rows", "train", "data set 'rows' is not to be downloaded: give the file as path="),
    ],
)
def test_wrong_names(tmp_path, name, split, message):
    with pytest.raises(UserError) as error:
        load_dataset(name, split=split, folder=tmp_path)
    assert str(error.value) == message


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot read \(No such file or directory\); check the path"):
        load_dataset("gsm8k", split="train", path=tmp_path / "nowhere.jsonl", folder=tmp_path)


FULL = {
    "in words of ArrayRecord": RuntimeError("write() failed: No space left on device; writing x; at byte 7"),
    "in words of the system": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=list(FULL))
@pytest.mark.parametrize("call", ["write", "close"])
def test_a_full_disk(load, tmp_path, monkeypatch, error, call):
    class Full(shards.ArrayRecordWriter):
        pass

    def fail(*_):
        raise error

    setattr(Full, call, fail)
    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(UserError) as caught:
        load("gsm8k", "train", "x.jsonl", lines(9))
    reason = "the data cannot be prepared there (No space left on device): free some space or choose another folder"
    assert str(caught.value) == f"{tmp_path / 'tfds'}: {reason}"
    monkeypatch.undo()
    assert files(tmp_path / "tfds") == [] and len(load("gsm8k", "train", "x.jsonl", lines(9))) == 9


def test_a_disk_that_takes_no_more(load, tmp_path):
    """For real: a limit on the size of files, which ArrayRecord's own writer meets."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    content = b"".join(
        json.dumps({"question": os.urandom(99).hex(), "answer": "b"}).encode() + b"\n" for _ in range(9_999)
    )
    (tmp_path / "x.jsonl").write_bytes(content)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, limits[1]))
    try:
        with pytest.raises(UserError, match=r"tfds: the data cannot be prepared there \(File too large\): free some"):
            load_dataset("gsm8k", split="train", path=tmp_path / "x.jsonl", folder=tmp_path / "tfds")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path / "tfds") == []


def test_a_file_where_the_folder_should_be(load, tmp_path):
    (tmp_path / "tfds").write_text("mine")
    with pytest.raises(UserError, match=r"tfds: the data cannot be prepared there \(File exists\)"):
        load("gsm8k", "train", "x.jsonl", lines(1))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder(load, tmp_path):
    (tmp_path / "tfds").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match=r"tfds: the data cannot be prepared there \(Permission denied\)"):
        load("gsm8k", "train", "x.jsonl", lines(1))


def test_prepared_data_is_read_where_nothing_may_be_written(load, tmp_path, monkeypatch):
    load("gsm8k", "train", "x.jsonl", lines(2))
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: pytest.fail("written"))
    assert len(load("gsm8k", "train", "x.jsonl", lines(2))) == 2


def test_silence(load, tmp_path, capfd, recwarn):
    load("gsm8k", "train", "x.jsonl", lines(2))
    assert capfd.readouterr() == ("", "") and not list(recwarn)


def test_importing_br_jax_does_not_import_tfds():
    code = "import sys, br_jax, br_jax.datasets.paper; assert 'tensorflow_datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensorflow_is_not_needed(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines(2))
    (tmp_path / "tensorflow.py").write_text("raise RuntimeError('imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "error", "-c", CHILD, tmp_path / "x.jsonl", tmp_path / "tfds"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_rows_of_prepared_records_are_lazy(load):
    rows = user_rows(load("rows", "train", "x.jsonl", b'{"prompt": "a", "response": "b"}\n' * 2000))
    assert (len(rows), rows[1999].origin, rows[-1].turns[0]) == (2000, "rows/train/2000", ("user", "a"))
    assert [row.origin for row in rows[3:5]] == ["rows/train/4", "rows/train/5"]
