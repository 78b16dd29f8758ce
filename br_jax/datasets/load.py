"""Data sets by name, prepared by TFDS when need be: ArrayRecord without TensorFlow, in the order of the file.

sources.json says what each has, where it is, whose, and under which license. The sha256 of a file was computed from it
(GSM8K, AG News test), is recorded by TFDS (SST-2) or Hugging Face's data set scripts (SST-2, GSM8K, AG News), or is
pinned by several public projects at the same revision (LLM-LAT, Alpaca, AdvBench); of BeaverTails none is known. No
file was downloaded where this was written: a pin that is wrong shows as a 404 or a mismatch, and `path=` helps.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from br_jax.core.errors import UserError, look_up, near_names, one_line
from br_jax.core.io import open_file
from br_jax.core.progress import progress
from br_jax.core.records import file_hash
from br_jax.data.rows import text_of
from br_jax.datasets.formats import MAX_BYTES, Parsed, ending_of, read_records
from br_jax.datasets.paper import AG_NEWS

KEY_LENGTH, TIMEOUT = 16, 20  # hexadecimal digits of a content hash in a folder's name; seconds to a block
logger = logging.getLogger(__name__)
Record = dict[str, str | bool]


def load_dataset(
    name: str, *, split: str, path: str | Path | None = None, folder: str | Path = "data/tfds"
) -> list[Record]:
    """Loads one split of a data set; the first time, it is prepared.

    Several hosts of one run: call it in `distributed.main_first`.

    Args:
        name: a key of `DATASETS`.
        split: one that its `files` name.
        path: a local file of the public layout that holds the split (.jsonl, .json, .csv, .tsv, .parquet; also .gz
            and .xz); None downloads the public files.
        folder: of all prepared data. What is prepared from another content or by another version lies apart.

    Returns:
        The records, in the file's order, each with an "id" such as "gsm8k/train/17".

    Raises:
        UserError: no such data set or split, a bad file (naming the line), no network, a wrong checksum, a full disk.
    """
    files, folder = look_up("data set", name, DATASETS).files, os.path.abspath(folder)
    if split not in files:
        raise UserError(f"data set {name!r} has no split {split!r}; {near_names(split, files)}")
    builder = Builder(name, folder=folder, split=split, path=None if path is None else Path(path))
    if not builder.data_path.exists():
        tfds.display_progress_bar(sys.stderr.isatty())
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            os.makedirs(folder, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as downloads,  # which are not kept
                contextlib.redirect_stdout(io.StringIO()),  # TFDS tells much of its own
            ):
                builder.download_and_prepare(download_dir=downloads, download_config=config)
        except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's, of a full disk
            if not builder.data_path.exists():  # else another process was faster
                reason = getattr(error, "strerror", None) or one_line(error)
                cure = "free some space or choose another folder"
                raise UserError(f"{folder}: the data cannot be prepared there ({reason}): {cure}") from error
    source = tfds.builder_from_directory(builder.data_dir).as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return [_record(example) for example in source.__getitems__(range(len(source)))]


def _record(example: bytes) -> Record:
    """The columns of a tf.Example; TFDS's own decoding takes five times as long."""
    features = tf_example_pb2.Example.FromString(example).features.feature
    return {
        key: value.bytes_list.value[0].decode() if value.bytes_list.value else bool(value.int64_list.value[0])
        for key, value in features.items()
    }


@dataclass(frozen=True)
class PublicFile:
    """A file of a data set's public home."""

    url: str  # pinned to a revision
    sha256: str | None = None  # of the file; None where it could not be known, and then that of what came is logged
    size: int | None = None  # bytes, where known; only told
    member: str | None = None  # the file wanted, where the url is that of a zip archive


@dataclass(frozen=True)
class Source:
    """A data set: an entry of sources.json."""

    description: str
    license: str
    homepage: str  # it explains access and terms
    citation: str
    features: Sequence[str]  # columns of text; "id" ("gsm8k/train/17") is there besides
    files: Mapping[str, PublicFile]  # split -> its public file; a local file holds one of these splits
    flags: Sequence[str] = ()  # columns of True and False
    header: Sequence[str] = ()  # the columns of a CSV or TSV file whose first line does not name any


_SOURCES = json.loads(resources.files(__package__).joinpath("sources.json").read_text(encoding="utf-8"))
DATASETS = {
    name: Source(**source | {"files": {split: PublicFile(**file) for split, file in source["files"].items()}})
    for name, source in _SOURCES.items()
}


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set from a local file of the public layout, which holds `split`, or with every split from its public home.

    The prepared data lie in `folder`, in a place named by the file's content; making a builder prepares nothing.
    """

    VERSION = tfds.core.Version("1.0.0")  # raised whenever the same file would be prepared differently

    def __init__(self, name: str, *, folder: str, split: str, path: Path | None = None):
        self.name, self._source, self._split, self._path = name, DATASETS[name], split, path
        super().__init__(data_dir=folder, config=tfds.core.BuilderConfig(name=self._key()), file_format="array_record")

    def _key(self) -> str:
        """A folder name that another content, or other public files, would not have."""
        if self._path is None:
            return f"public-{hashlib.sha256(repr(self._source.files).encode()).hexdigest()[:KEY_LENGTH]}"
        endings = "".join(self._path.suffixes).encode()  # they say how the content is read
        with open_file(self._path, MAX_BYTES) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.sha256(endings))
        method = _harmbench_method(self._path) if self.name == "attacks" else ""  # in no content
        return "-".join(filter(None, [self._split, digest.hexdigest()[:KEY_LENGTH], method]))

    def _create_builder_config(self, builder_config, version):
        return builder_config  # TFDS would warn that it is not among `BUILDER_CONFIGS`

    def _info(self) -> tfds.core.DatasetInfo:
        source = self._source
        texts = {key: tfds.features.Text() for key in ("id", *source.features)}
        flags = {key: tfds.features.Scalar(np.bool_) for key in source.flags}
        whose = {key: getattr(source, key) for key in ("description", "license", "homepage", "citation")}
        features = tfds.features.FeaturesDict(texts | flags)
        return _Info(builder=self, features=features, disable_shuffling=True, **whose)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        if self._path is not None:
            return {self._split: self._generate_examples(self._split, self._path, str(self._path))}
        files = {file.url: file for file in self._source.files.values()}  # an archive may hold several splits
        paths = {url: self._download(file, Path(dl_manager.download_dir)) for url, file in files.items()}
        named = {
            split: (paths[f.url], Path(f.member or f.url).name, f.member) for split, f in self._source.files.items()
        }
        return {split: self._generate_examples(split, *place) for split, place in named.items()}

    def _generate_examples(
        self, split: str, path: Path, name: str, member: str | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        source, number = self._source, None
        records = read_records(path, name=name, member=member, header=source.header)
        if self.name == "attacks" and ending_of(path.name) == ".json":
            records = _cases(records, path, name)
        make = _MADE.get(self.name, lambda record, where: record)
        for number, where, record in records:
            made = make(record, where)
            texts = {key: text_of(made, key, where) for key in source.features}
            flags = {key: made[key] for key in source.flags}
            yield number, {"id": f"{self.name}/{split}/{number}", **texts, **flags}
        if number is None:
            raise UserError(f"{name}: no rows: the file is empty; give one that holds {', '.join(source.features)}")

    def _download(self, file: PublicFile, folder: Path) -> Path:
        """Downloads a public file into a folder and verifies it; the license is logged before."""
        size = f"{file.size / 1e6:.1f} MB" if file.size else "size unknown"
        homepage = self._source.homepage
        told = self.name, file.url, size, self._source.license, homepage
        logger.warning("%s: downloading %s (%s); license: %s (%s)", *told)
        path = folder / file.url.rsplit("/", 1)[-1]
        try:
            with (
                requests.get(file.url, stream=True, timeout=TIMEOUT) as response,
                path.open("wb") as target,
                progress(file.size, path.name, "B", keep=False) as bar,
            ):
                response.raise_for_status()
                for block in response.iter_content(1 << 20):
                    target.write(block)
                    bar.update(len(block))
        except requests.RequestException as error:
            status = "" if error.response is None else f" {error.response.status_code}"
            raise UserError(
                f"{file.url}: cannot be downloaded ({type(error).__name__}{status}): check the network and the terms "
                f"of access at {homepage}, or download the file by hand from there and give path="
            ) from error
        got = file_hash(path)
        if file.sha256 is None:
            logger.warning("%s: no checksum is known of %s: what came has sha256 %s", self.name, file.url, got)
        elif got != file.sha256:
            expected = f"expected {file.sha256}, got {got}"
            raise UserError(f"{file.url}: sha256 mismatch: {expected}: nothing was kept: look at {homepage}")
        return path


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS makes a temporary folder here, asks nobody, and leaves it."""


# What each data set makes of a record, where its columns are not those of the file; a `UserError` says `where`.


def _beavertails(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    category, is_safe = record.get("category"), record.get("is_safe")
    if not isinstance(category, dict) or not isinstance(is_safe, bool):
        raise UserError(f"{where}: 'category' is no object, or 'is_safe' not true or false; correct the row")
    return {**record, "category": json.dumps([name for name, holds in category.items() if holds])}


def _ag_news(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    # The CSV's readme says that a new line is written as a backslash and an n. It is written as a backslash alone
    # ("Iran's\nuclear program"), so nothing can be undone; the hub's text, which the reference trains on, has them too.
    columns, key, first = (("text",), "label", 0) if "text" in record else (("title", "description"), "class", 1)
    text = " ".join(text_of(record, column, where) for column in columns)
    return {"text": text, "label": _label(record, key, AG_NEWS, first, where)}


def _label(record: Mapping[str, Any], key: str, labels: Sequence[str], first: int, where: str) -> str:
    """The label that a record gives by its number, or by text of it, counted from `first`."""
    names, number = {str(i): label for i, label in enumerate(labels, first)}, str(record.get(key))
    if number not in names:
        raise UserError(f"{where}: {key!r} {number[:40]!r} is none of {', '.join(names)}; correct or delete the row")
    return names[number]


def _attack(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An attack of AdvBench's CSV, HarmBench's (asked as its direct request does), StrongREJECT's, or any other."""
    made = dict(record)
    if "Behavior" in record:
        prompt = behavior = text_of(record, "Behavior", where)
        if record.get("ContextString"):
            prompt = f"{text_of(record, 'ContextString', where)}\n\n---\n\n{behavior}"
        made = {"prompt": prompt, "behavior": behavior, "method": "HarmBench", "id": record.get("BehaviorID")}
    elif "forbidden_prompt" in record:
        made = dict.fromkeys(("prompt", "behavior"), text_of(record, "forbidden_prompt", where))
        made["method"] = "StrongREJECT"
    elif "prompt" not in record:
        made = dict.fromkeys(("prompt", "behavior"), text_of(record, "goal", where))
        made |= {"method": "AdvBench", "target": text_of(record, "target", where)}
    if made.get("id") is not None:
        made["case"] = str(made["id"])
    return dict.fromkeys(DATASETS["attacks"].features, "") | made


def _cases(records: Iterator[Parsed], path: Path, name: str) -> Iterator[Parsed]:
    """The attacks in the objects of a JSON file, numbered.

    One is an attack by itself, or `Artifact` of jailbreakbench 1.0 (GCG, PAIR, random search), {"parameters":
    {"method"}, "jailbreaks": [...]}, whose behaviors for which no prompt was found are left out, or HarmBench's
    test_cases.json (GCG, AutoDAN, PAIR, TAP, GPTFuzz), {id of a behavior: [prompt, ...]}.
    """
    found = []
    for _, where, document in records:
        method, jailbreaks = _harmbench_method(path), document.get("jailbreaks")
        if document.keys() & {"prompt", "goal"}:
            found.append(document)
        elif isinstance(jailbreaks, list) and all(isinstance(case, dict) for case in jailbreaks):
            if isinstance(said := document.get("parameters"), dict):
                method = said.get("method", method)
            about = [(case.get("prompt"), case.get("goal", ""), case.get("index")) for case in jailbreaks]
            found += ({"prompt": p, "method": method, "behavior": b, "id": i} for p, b, i in about if p is not None)
        else:
            for behavior, prompts in document.items():
                if not isinstance(prompts, list):
                    raise UserError(
                        f"{where}: {one_line(behavior)!r} holds no list of prompts; give JSON lines with a prompt, an "
                        "artifact of JailbreakBench or HarmBench's test_cases.json"
                    )
                found += ({"prompt": prompt, "method": method, "id": behavior} for prompt in prompts)
    return ((number, f"{name}: case {number}", case) for number, case in enumerate(found, start=1))


def _harmbench_method(path: Path) -> str:
    """The method that a file of HarmBench's lies under, RESULTS/METHOD/EXPERIMENT/test_cases/; "" elsewhere."""
    parts = path.absolute().parts
    return parts[-4] if ending_of(path.name) == ".json" and len(parts) > 4 and parts[-2] == "test_cases" else ""


_MADE: dict[str, Callable[[Mapping[str, Any], str], Mapping[str, Any]]] = {
    "beavertails": _beavertails,
    "sst2": lambda record, where: {**record, "label": _label(record, "label", ("negative", "positive"), 0, where)},
    "ag_news": _ag_news,
    "attacks": _attack,
}
