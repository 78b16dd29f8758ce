"""Serialized records into ArrayRecord files, in order and one at a time."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.splits import SplitInfo

SHARD_BYTES = 64 << 20  # a reader keeps a file's index in memory: many rows are many files


class ShardWriter(contextlib.AbstractContextManager):
    """Writes a split's records as TFDS would: files of the template's names, each record by itself (random access).

    Attributes:
        split_info: once the writer has been left without an error.

    Raises:
        OSError: the disk is full, or another error of the file system.
    """

    def __init__(self, template: ShardedFileTemplate):
        self.split_info: SplitInfo | None = None
        self._template = template
        self._writer: ArrayRecordWriter | None = None
        self._room = 0  # bytes that the open shard still takes
        self._lengths: list[int] = []
        self._size = 0

    def write(self, record: bytes) -> None:
        """Appends a record."""
        with _os_errors():
            if self._room <= 0:
                self._close()
                self._writer = ArrayRecordWriter(os.fspath(self._part(len(self._lengths))), "group_size:1")
                self._lengths.append(0)
                self._room = SHARD_BYTES
            self._writer.write(record)
        self._lengths[-1] += 1
        self._room -= len(record)
        self._size += len(record)

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            with contextlib.suppress(RuntimeError):  # the first error is the one to tell
                self._close()
            return
        with _os_errors():
            self._close()
        count = len(self._lengths)
        for index in range(count):
            self._part(index).rename(self._template.sharded_filepath(shard_index=index, num_shards=count))
        self.split_info = SplitInfo(
            name=self._template.split,
            shard_lengths=self._lengths,
            num_bytes=self._size,
            filename_template=self._template,
        )

    def _part(self, index: int) -> Path:
        """A shard's file until it is known how many there are."""
        return Path(self._template.data_dir) / f"{self._template.split}.{index}.part"

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """ArrayRecord says "write() failed: No space left on device; writing ..." as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition(": ")[2].partition(";")[0]
        raise OSError(errno.EIO, reason or str(error)) from error
