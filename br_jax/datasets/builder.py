"""What every builder shares: where its files come from, the columns it wants, and where the prepared data lie.

TFDS writes and reads ArrayRecord without TensorFlow, in the order of the file.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds

from br_jax.core.errors import UserError
from br_jax.core.io import open_file
from br_jax.core.progress import progress
from br_jax.core.records import file_hash
from br_jax.data.rows import text_of
from br_jax.datasets.formats import MAX_BYTES, Parsed, read_records

KEY_LENGTH = 16  # hexadecimal digits of a content hash in a folder's name
TIMEOUT = 20  # seconds to a connection, and to each block of a download
logger = logging.getLogger(__name__)
_SOURCES = json.loads(resources.files(__package__).joinpath("sources.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PublicFile:
    """A file of a data set's public home."""

    url: str  # pinned to a revision
    sha256: str | None = None  # of the file; None where it could not be known, and then that of what came is logged
    size: int | None = None  # bytes, where known; only told
    member: str | None = None  # the file wanted, where the url is that of a zip archive

    @property
    def name(self) -> str:
        return (self.member or self.url).rsplit("/", 1)[-1]


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set from a local file or its public home; subclasses say which columns it has and what they mean.

    Attributes:
        name: its name in `DATASETS`, in sources.json and on disk.
        VERSION: raised whenever the same file would be prepared differently.
        FEATURES: columns of text; "id" ("gsm8k/train/17") is there besides.
        FLAGS: columns of True and False.
        HEADER: the columns of a CSV or TSV file whose first line does not name any.
        LICENSE, HOMEPAGE, CITATION: of sources.json; the page explains access and terms.
        FILES: of sources.json: split -> its public file; a local file holds one of these splits.
    """

    VERSION = tfds.core.Version("1.0.0")
    FLAGS = HEADER = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(skip_registration=True, **kwargs)  # TFDS may have one of this name
        source = _SOURCES[cls.name]
        cls.LICENSE, cls.HOMEPAGE, cls.CITATION = (source[key] for key in ("license", "homepage", "citation"))
        cls.FILES = {split: PublicFile(**file) for split, file in source["files"].items()}

    def __init__(self, *, folder: str, split: str, path: Path | None = None):
        """Names the place of the prepared data in `folder`, by the file's content; nothing is prepared yet.

        `path` is a local file of the public layout, which holds `split`; None downloads every split.
        """
        self._split, self._path = split, path
        super().__init__(data_dir=folder, config=tfds.core.BuilderConfig(name=self._key()), file_format="array_record")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The features of a record, all but its id; by default the columns of those names, which hold text.

        Raises:
            UserError: a column is missing or holds something else.
        """
        return {key: text_of(record, key, where) for key in self.FEATURES}

    def parse(self, path: Path, name: str, member: str | None) -> Iterator[Parsed]:
        """The records of a file."""
        return read_records(path, name=name, member=member, header=self.HEADER)

    def _key(self) -> str:
        """A folder name that another content, or other public files, would not have."""
        if self._path is None:
            return f"public-{hashlib.sha256(repr(self.FILES).encode()).hexdigest()[:KEY_LENGTH]}"
        endings = "".join(self._path.suffixes).encode()  # they say how the content is read
        with open_file(self._path, MAX_BYTES) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.sha256(endings))
        return f"{self._split}-{digest.hexdigest()[:KEY_LENGTH]}"

    def _create_builder_config(self, builder_config, version):
        return builder_config  # TFDS would warn that it is not among `BUILDER_CONFIGS`

    def _info(self) -> tfds.core.DatasetInfo:
        texts = {key: tfds.features.Text() for key in ("id", *self.FEATURES)}
        flags = {key: tfds.features.Scalar(np.bool_) for key in self.FLAGS}
        return _Info(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(texts | flags),
            license=self.LICENSE,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        if self._path is not None:
            return {self._split: self._generate_examples(self._split, self._path, str(self._path))}
        files = {file.url: file for file in self.FILES.values()}  # an archive may hold several splits
        paths = {url: self._download(file, Path(dl_manager.download_dir)) for url, file in files.items()}
        return {
            split: self._generate_examples(split, paths[file.url], file.name, file.member)
            for split, file in self.FILES.items()
        }

    def _generate_examples(
        self, split: str, path: Path, name: str, member: str | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        number = None
        for number, where, record in self.parse(path, name, member):
            yield number, {"id": f"{self.name}/{split}/{number}", **self.example(record, where)}
        if number is None:
            raise UserError(f"{name}: no rows: the file is empty; give one that holds {', '.join(self.FEATURES)}")

    def _download(self, file: PublicFile, folder: Path) -> Path:
        """Downloads a public file into a folder and verifies it; the license is logged before."""
        size = f"{file.size / 1e6:.1f} MB" if file.size else "size unknown"
        logger.warning(
            "%s: downloading %s (%s); license: %s (%s)", self.name, file.url, size, self.LICENSE, self.HOMEPAGE
        )
        path = folder / file.url.rsplit("/", 1)[-1]
        try:
            with (
                requests.get(file.url, stream=True, timeout=TIMEOUT) as response,
                path.open("wb") as target,
                progress(file.size, file.name, "B", keep=False) as bar,
            ):
                response.raise_for_status()
                for block in response.iter_content(1 << 20):
                    target.write(block)
                    bar.update(len(block))
        except requests.RequestException as error:
            status = "" if error.response is None else f" {error.response.status_code}"
            raise UserError(
                f"{file.url}: cannot be downloaded ({type(error).__name__}{status}): check the network and the terms "
                f"of access at {self.HOMEPAGE}, or download the file by hand from there and give path="
            ) from error
        got = file_hash(path)
        if file.sha256 is None:
            logger.warning("%s: no checksum is known of %s: what came has sha256 %s", self.name, file.url, got)
        elif got != file.sha256:
            expected = f"expected {file.sha256}, got {got}"
            raise UserError(f"{file.url}: sha256 mismatch: {expected}: nothing was kept: look at {self.HOMEPAGE}")
        return path


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS makes a temporary folder here, asks nobody, and leaves it."""
