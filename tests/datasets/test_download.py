"""Downloads from a server on this machine: what comes is verified, what does not is one line; nothing is left over."""

import hashlib
import socket

import pytest
from contents import as_zip

from br_jax.core.errors import UserError
from br_jax.datasets.builder import PublicFile
from br_jax.datasets.load import Gsm8k, Sst2, load_dataset

TRAIN = b'{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * 3
TEST = b'{"question": "2 + 2?", "answer": "4\\n#### 4"}\n'


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def fetch(serve, monkeypatch, tmp_path):
    """fetch({"/path": answer}, split=(path, sha256)) -> the records of GSM8K's first split, from there."""

    def download(answers, **files):
        address = serve(answers)
        files = {split: PublicFile(address + path, checksum) for split, (path, checksum) in files.items()}
        monkeypatch.setattr(Gsm8k, "FILES", files)
        return load_dataset("gsm8k", split=next(iter(files)), folder=tmp_path / "tfds")

    return download


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() or path.name.startswith("."))


def test_right_files(fetch, tmp_path, caplog, capfd):
    answers = {"/a/train.jsonl": (200, TRAIN), "/a/test.jsonl": (200, TEST)}
    records = fetch(answers, train=("/a/train.jsonl", sha256(TRAIN)), test=("/a/test.jsonl", sha256(TEST)))
    assert [record["id"] for record in records] == [f"gsm8k/train/{n}" for n in (1, 2, 3)]
    told = [message for message in caplog.messages if "downloading" in message]
    assert len(told) == 2 and all("MIT" in message and Gsm8k.HOMEPAGE in message for message in told)
    assert [name for name in left(tmp_path) if name.startswith(".")] == []
    assert capfd.readouterr().out == ""
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
    assert left(tmp_path) == []


def test_no_network(monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/train.jsonl"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Gsm8k, "FILES", {"train": PublicFile(url, sha256(TRAIN))})
    with pytest.raises(UserError, match=rf"^{url}: cannot be downloaded \(ConnectionError\): check the network and"):
        load_dataset("gsm8k", split="train", folder=tmp_path)


def test_a_full_disk_while_downloading(fetch, tmp_path, small_disk):
    with small_disk(1 << 20), pytest.raises(UserError, match=r"tfds: .* \(File too large\): free some"):
        fetch({"/f/train.jsonl": (200, TRAIN * 100_000)}, train=("/f/train.jsonl", None))
    assert left(tmp_path) == []


def test_another_pin_is_another_preparation_and_an_unknown_one_is_told(fetch, caplog):
    first = fetch({"/h/train.jsonl": (200, TEST)}, train=("/h/train.jsonl", sha256(TEST)))
    second = fetch({"/h/train.jsonl": (200, TRAIN)}, train=("/h/train.jsonl", None))
    assert (len(first), len(second)) == (1, 3) and sha256(TRAIN) in caplog.messages[-1]
    with pytest.raises(UserError, match=r"^train\.jsonl:2: not valid JSON"):
        fetch({"/g/train.jsonl": (200, TEST + b"half")}, train=("/g/train.jsonl", None))


def test_two_splits_in_one_archive(serve, monkeypatch, tmp_path):
    members = {"train": "SST-2/train.tsv", "validation": "SST-2/dev.tsv"}
    lines = ("fine \t1\n", "dull\t0\n")
    archive = as_zip({m: f"sentence\tlabel\n{line}" for m, line in zip(members.values(), lines, strict=True)})
    url = serve({"/SST-2.zip": (200, archive)}) + "/SST-2.zip"
    files = {split: PublicFile(url, sha256(archive), None, member) for split, member in members.items()}
    monkeypatch.setattr(Sst2, "FILES", files)
    train, validation = (load_dataset("sst2", split=split, folder=tmp_path) for split in members)
    assert train == [{"id": "sst2/train/2", "sentence": "fine ", "label": "positive"}]
    assert validation == [{"id": "sst2/validation/2", "sentence": "dull", "label": "negative"}]
