"""Data sets by name, prepared when need be."""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from br_jax.core.errors import UserError, look_up, near_names, one_line
from br_jax.datasets.builder import Builder
from br_jax.datasets.builders import DATASETS

Record = dict[str, str | bool]


def load_dataset(
    name: str, *, split: str, path: str | Path | None = None, folder: str | Path = "data/tfds"
) -> list[Record]:
    """Loads one split of a data set; the first time, it is prepared.

    Several hosts of one run: call it in `distributed.main_first`.

    Args:
        name: a key of `DATASETS`.
        split: one that its `FILES` name.
        path: a local file of the public layout that holds the split (.jsonl, .json, .csv, .tsv, .parquet; also .gz
            and .xz); None downloads the public files.
        folder: of all prepared data. What is prepared from another content or by another version lies apart.

    Returns:
        The records, in the file's order, each with an "id" such as "gsm8k/train/17".

    Raises:
        UserError: no such data set or split, a bad file (naming the line), no network, a wrong checksum, a full disk.
    """
    make, folder = look_up("data set", name, DATASETS), os.path.abspath(folder)
    if split not in make.FILES:
        raise UserError(f"data set {name!r} has no split {split!r}; {near_names(split, make.FILES)}")
    builder = make(folder=folder, split=split, path=None if path is None else Path(path))
    if not builder.data_path.exists():
        _prepare(builder, folder)
    source = tfds.builder_from_directory(builder.data_dir).as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return [_record(example) for example in source.__getitems__(range(len(source)))]


def _prepare(builder: Builder, folder: str) -> None:
    """Prepares a data set; what is downloaded for it is not kept."""
    tfds.display_progress_bar(sys.stderr.isatty())
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        os.makedirs(folder, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as downloads,
            contextlib.redirect_stdout(io.StringIO()),  # TFDS tells much of its own
        ):
            builder.download_and_prepare(download_dir=downloads, download_config=config)
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's, of a full disk
        if builder.data_path.exists():  # meanwhile, by another process
            return
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"{folder}: the data cannot be prepared there ({reason}): free some space or choose another folder"
        ) from error


def _record(example: bytes) -> Record:
    """The columns of a tf.Example; TFDS's own decoding takes five times as long."""
    features = tf_example_pb2.Example.FromString(example).features.feature
    return {
        key: value.bytes_list.value[0].decode() if value.bytes_list.value else bool(value.int64_list.value[0])
        for key, value in features.items()
    }
