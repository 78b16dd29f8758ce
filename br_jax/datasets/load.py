"""Data sets by name, prepared when need be."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tensorflow_datasets as tfds

from br_jax.datasets.builder import Builder
from br_jax.datasets.builders import DATASETS
from br_jax.datasets.formats import one_line
from br_jax.errors import UserError, near_names

BLOCK = 512  # records read at once when they are wanted in order: a single read costs as much as a hundred

Record = dict[str, str | bool]


class Records(Sequence[Record]):
    """Records of one split, each read from disk when it is asked for; a slice is as lazy. Can be pickled.

    Args:
        directory: of the prepared data.
        split: a split there.
        places: which of its records, and in which order; None takes all in the order of the file.
    """

    def __init__(self, directory: str, split: str, places: range | None = None):
        self.directory, self.split = directory, split
        self._places = range(len(self._source)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Records(self.directory, self.split, self._places[index])
        return _plain(self._source[self._places[index]])

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        """Several records at once, much faster than one by one."""
        return [_plain(record) for record in self._source.__getitems__([self._places[index] for index in indices])]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), BLOCK):
            yield from self.__getitems__(range(start, min(start + BLOCK, len(self))))

    def __reduce__(self):
        return Records, (self.directory, self.split, self._places)

    @cached_property
    def _source(self):
        return tfds.builder_from_directory(self.directory).as_data_source(split=self.split)


def _plain(record: Mapping[str, bytes | bool]) -> Record:
    """A record as TFDS gives it, with its texts decoded."""
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in record.items()}


def load_dataset(name: str, *, split: str, path: str | Path | None = None, folder: str | Path = "data/tfds") -> Records:
    """Loads one split of a data set; the first time, it is prepared.

    Several hosts of one run: call it in `distributed.main_first`.

    Args:
        name: a key of `DATASETS`.
        split: one of the data set's `SPLITS`.
        path: a local file of the public layout that holds the split (.jsonl, .json, .csv, .tsv, .parquet; also .gz
            and .xz); None downloads the public files.
        folder: of all prepared data. What is prepared from another content or by another version lies apart.

    Returns:
        The records, in the file's order, each with an "id" such as "gsm8k/train/17".

    Raises:
        UserError: no such data set or split, a bad file (naming the line), no network, a wrong checksum, a full disk.
    """
    if name not in DATASETS:
        raise UserError(f"no data set {name!r}; {near_names(name, DATASETS)}")
    builder_class = DATASETS[name]
    if split not in builder_class.SPLITS:
        raise UserError(f"data set {name!r} has no split {split!r}; {near_names(split, builder_class.SPLITS)}")
    if path is None and not builder_class.ORIGIN.files:
        raise UserError(f"data set {name!r} is not to be downloaded: give the file as path=")
    folder = os.path.abspath(folder)
    builder = builder_class(folder=folder, split=split, path=None if path is None else Path(path))
    _prepare(builder, folder)
    return Records(builder.data_dir, split)


def _prepare(builder: Builder, folder: str) -> None:
    """Prepares a data set that is not; what is downloaded for it is not kept."""
    if builder.data_path.exists():
        return
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as downloads:
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except OSError as error:
        if builder.data_path.exists():  # meanwhile, by another process
            return
        reason = one_line(error.strerror or error)
        raise UserError(
            f"{folder}: the data cannot be prepared there ({reason}): free some space or choose another folder"
        ) from error
