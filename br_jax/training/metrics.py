"""Where a run's numbers go: JSON lines."""

import json
import os
import pathlib

from br_jax.core.io import read_jsonl, write_text


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

    def write(self, record: dict) -> None:
        """Writes one record."""
        self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()
