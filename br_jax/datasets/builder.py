"""What every builder shares: where its files come from, the columns it wants, and how records are written to disk.

TFDS writes and reads ArrayRecord without TensorFlow. Its own writer keeps up to a gigabyte of a split in memory to
shuffle it and needs TensorFlow beyond that; here the order of the file is kept and records are streamed.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo
from tensorflow_datasets.proto import tf_example_pb2

from br_jax.data.rows import text_of
from br_jax.datasets.download import Origin, download
from br_jax.datasets.formats import Parsed, one_line, read_records
from br_jax.datasets.shards import ShardWriter
from br_jax.errors import UserError
from br_jax.progress import progress

KEY_LENGTH = 16  # hexadecimal digits of a content hash in a folder's name


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set from a local file or its public home; subclasses say which columns it has and what they mean.

    Attributes:
        name: its name in `DATASETS` and on disk.
        VERSION: raised whenever the same file would be prepared differently.
        ORIGIN: where it comes from.
        SPLITS: the splits that a local file may hold.
        FEATURES: columns of text; "id" ("gsm8k/train/17") is there besides.
        FLAGS: columns of True and False.
        HEADER: the columns of a CSV or TSV file whose first line does not name any.
    """

    VERSION = tfds.core.Version("1.0.0")
    ORIGIN: ClassVar[Origin]
    SPLITS: ClassVar[tuple[str, ...]]
    FEATURES: ClassVar[tuple[str, ...]]
    FLAGS: ClassVar[tuple[str, ...]] = ()
    HEADER: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(skip_registration=True, **kwargs)  # TFDS may have one of this name

    def __init__(self, *, folder: str, split: str, path: Path | None = None):
        """Names the place of the prepared data, by the file's content; nothing is prepared yet.

        Args:
            folder: of all prepared data.
            split: what `path` holds.
            path: a local file of the public layout; None downloads every split of `ORIGIN`.

        Raises:
            UserError: when `path` cannot be read.
        """
        self._split, self._path = split, path
        super().__init__(data_dir=folder, config=tfds.core.BuilderConfig(name=self._key()), file_format="array_record")

    def example(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Makes the features of a record, all but its id; by default the columns of those names, which hold text.

        Raises:
            UserError: a column is missing or holds something else.
        """
        require_columns(record, self.FEATURES, where)
        return {key: text_of(record, key, where) for key in self.FEATURES}

    def parse(self, path: Path, name: str, member: str | None) -> Iterator[Parsed]:
        """Yields the records of a file."""
        return read_records(path, name=name, member=member, header=self.HEADER)

    def fetch(self, manager: tfds.download.DownloadManager) -> dict[str, Path]:
        """Downloads the files: split -> path."""
        return download(manager, self.name, self.ORIGIN)

    @property
    def url_infos(self) -> dict[str, UrlInfo]:
        """What TFDS verifies downloads against."""
        files = self.ORIGIN.files.values()
        return {file.url: _Checksum(file.size, file.sha256, None) for file in files if file.sha256}

    def _key(self) -> str:
        """A folder name that another content, or other public files, would not have."""
        if self._path is None:
            return f"public-{hashlib.sha256(repr(self.ORIGIN.files).encode()).hexdigest()[:KEY_LENGTH]}"
        endings = "".join(self._path.suffixes).encode()  # they say how the content is read
        try:
            with self._path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.sha256(endings))
        except OSError as error:
            raise UserError(f"{self._path}: cannot read ({error.strerror}); check the path") from error
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
            license=self.ORIGIN.license,
            homepage=self.ORIGIN.homepage,
            citation=self.ORIGIN.citation,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        if self._path is not None:
            return {self._split: self._generate_examples(self._split, self._path, str(self._path))}
        files = self.ORIGIN.files
        return {
            split: self._generate_examples(split, path, files[split].url.rsplit("/", 1)[-1], files[split].member)
            for split, path in self.fetch(dl_manager).items()
        }

    def _generate_examples(
        self, split: str, path: Path, name: str, member: str | None = None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        number = None
        for number, where, record in self.parse(path, name, member):
            yield number, {"id": f"{self.name}/{split}/{number}", **self.example(record, where)}
        if number is None:
            raise UserError(f"{name}: no rows: the file is empty; give one that holds {', '.join(self.FEATURES)}")

    def _generate_splits(self, dl_manager, download_config) -> Sequence[tfds.core.SplitInfo]:
        """Writes the splits, in place of TFDS's shuffling writer."""
        infos = []
        for split, examples in self._split_generators(dl_manager).items():
            bar = progress(None, f"preparing {self.name}/{split}", " rows", keep=False)
            with bar, ShardWriter(self._get_filename_template(split)) as writer:
                for _, example in examples:
                    writer.write(serialize(example))
                    bar.update()
            infos.append(writer.split_info)
        return infos

    def _log_download_bytes(self) -> None:
        """Nothing: TFDS prints here, and after the preparation."""

    _log_download_done = _log_download_bytes


def serialize(example: Mapping[str, str | bool]) -> bytes:
    """A tf.Example, as TFDS's own serializer makes it in three times the time."""
    message = tf_example_pb2.Example()
    for key, value in example.items():
        if isinstance(value, bool):
            message.features.feature[key].int64_list.value.append(int(value))
        else:
            message.features.feature[key].bytes_list.value.append(value.encode())
    return message.SerializeToString()


def require_columns(record: Mapping[str, Any], wanted: Sequence[str], where: str) -> None:
    """Raises a `UserError` that names the columns found and wanted, when one is missing."""
    for key in wanted:
        if key not in record:
            found = one_line(", ".join(map(str, record)))
            raise UserError(f"{where}: no column {key!r}: found {found}; wanted {', '.join(wanted)}")


def label_of(names: Sequence[str], value: Any, where: str, first: int = 0) -> str:
    """The name of a class given by its number, or text of it, from `first` on.

    Raises:
        UserError: when there is no such class.
    """
    labels = {str(number): name for number, name in enumerate(names, start=first)}
    if str(value) not in labels:
        raise UserError(f"{where}: label {str(value)[:40]!r} is none of {', '.join(labels)}; correct or delete the row")
    return labels[str(value)]


class _Info(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS makes a temporary folder here, asks nobody, and leaves it."""


class _Checksum(UrlInfo):
    """What is known of a file beforehand: its sha256 tells everything that its size would."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlInfo) and self.checksum == other.checksum
