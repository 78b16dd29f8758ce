"""Where a run's numbers go: JSON lines always, TensorBoard when `tensorboardX` is installed."""

import importlib.util
import json
import os
import pathlib

from br_jax.files import read_jsonl, write_text


class MetricWriter:
    """Appends records with a `step` to a JSONL file; on resumption drops what is later than the checkpoint.

    Without a folder it takes records all the same, and keeps none.
    """

    def __init__(self, folder: pathlib.Path | None, name: str, from_step: int = 0):
        path = pathlib.Path(os.devnull) if folder is None else folder / name
        kept = [record for record in read_jsonl(path) if record["step"] <= from_step] if folder else []
        if folder is not None:
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._board = None
        if folder is not None and importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def write(self, record: dict) -> None:
        """Writes one record; its numbers go to TensorBoard under their own names."""
        self._file.write(json.dumps(record) + "\n")
        if self._board:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
        if self._board:
            self._board.close()
