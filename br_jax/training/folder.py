"""A run's folder, which remembers what it is: finished, stopped, or another run's.

It holds run.json (what it is), metrics.jsonl, probes.jsonl, checkpoints/ (while it runs), and at the end the result and
stage.json (what it cost, and the hashes of all that is there), written last.
"""

import contextlib
import datetime
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from absl import logging

from br_jax.core.errors import UserError
from br_jax.core.hosts import agree, barrier, is_main, require_shared
from br_jax.core.io import make_private, owned, read_jsonl, write_text
from br_jax.core.records import file_hashes, key_of, read_record, require_unchanged, write_record

_BEGUN, _FINISHED, _CHECKPOINTS = "run.json", "stage.json", "checkpoints"


class Folder:
    """A run's folder: refuses, by a `UserError`, to serve another run, and says whether this one is `finished`.

    Every process makes one; process 0 writes, and what it sees is what counts. Nothing is written before `begin`.
    """

    def __init__(self, path: pathlib.Path, identity: dict[str, Any], private: bool = False):
        self.path, self._identity, self._private = path, identity, private
        self.finished = self._look()

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Holds the folder, which becomes this run's; afterwards it may be `finished`, by another process meanwhile.

        What lies there of a run that nobody can go on from, for it came to no checkpoint, makes way.
        """
        if is_main() and self._private:
            make_private(self.path.parent)
            make_private(self.path)
        with owned(self.path, wait=self._private):
            self.finished = self._look()
            if not self.finished and is_main():
                write_record(self.path / _BEGUN, self._identity)
            barrier(str(self.path))
            require_shared(self.path / _BEGUN, (self.path / _BEGUN).exists())
            yield

    def finish(self, report: dict) -> None:
        """Writes stage.json, after which the run is finished, and clears its checkpoints."""
        if is_main():
            name, config, inputs = (self._identity[part] for part in ("name", "config", "inputs"))
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            record = {"name": name, "config_hash": key_of(config), "inputs": inputs, **report, "finished": now}
            files = file_hashes(self.path, (_FINISHED, _CHECKPOINTS))
            write_record(self.path / _FINISHED, record | {"files": files})
            shutil.rmtree(self.path / _CHECKPOINTS, ignore_errors=True)
            for path in self.path.rglob("*") if self._private else ():
                path.chmod(0o700 if path.is_dir() else 0o600)
        barrier(str(self.path))

    def _look(self) -> bool:
        """Whether this run has finished here; a `UserError` where another one did, or could go on."""
        begun, ended, saved = (self.path / name for name in (_BEGUN, _FINISHED, _CHECKPOINTS))
        there = [ended.exists(), saved.is_dir() and any(saved.iterdir()), begun.exists()]
        finished, stopped, known = agree(there)
        if known:
            require_shared(begun, begun.exists())
        if finished or stopped:
            cure = f"delete {self.path} to start anew"
            if not known:
                raise UserError(f"{begun}: is gone, so nothing says which run this is: {cure}")
            self._compare(read_record(begun, cure))
        if finished and is_main():
            read_finished(self.path)
        return finished

    def _compare(self, known: dict) -> None:
        for part in ("name", "config", "inputs"):
            before, mine = (run.get(part, {}) for run in (known, self._identity))
            if part == "name":
                before, mine = {"of": before}, {"of": mine}
            for key in sorted({*before, *mine}):
                was, is_now = _short(before.get(key)), _short(mine.get(key))
                if was != is_now:
                    raise UserError(
                        f"{self.path}: holds a run with another {part}: {key} was {was}, is {is_now}: "
                        "choose another workdir or delete that folder"
                    )


def read_finished(path: pathlib.Path) -> dict[str, Any]:
    """What a finished run's stage.json says, all of whose files must be as they were when it finished.

    Raises:
        UserError: one was changed, or is gone.
    """
    cure = f"delete {path} to run it again"
    record = read_record(path / _FINISHED, cure)
    if "files" not in record:
        logging.warning("%s: finished under an earlier br_jax, which kept no hashes: not verified", path)
    require_unchanged(path, record.get("files", {}), cure)
    return record


def _short(value) -> str:
    text = json.dumps(value)
    return text[1:13] + "..." if len(text) > 60 else text


class MetricWriter:
    """Appends records with a `step` to a JSONL file; on resumption drops what is later than the checkpoint.

    Without a folder it takes records all the same, and keeps none.
    """

    def __init__(self, folder: pathlib.Path | None, name: str, from_step: int = 0):
        self._path = pathlib.Path(os.devnull) if folder is None else folder / name
        if folder is not None:
            kept = [record for record in read_jsonl(self._path) if record["step"] <= from_step]
            write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a")

    def write(self, record: dict) -> None:
        """Writes one record."""
        self._file.write(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Hands what was written to the operating system."""
        try:
            self._file.flush()
        except OSError as error:  # which does not say of which file
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        """Flushes and closes."""
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):  # which `flush` has raised
                self._file.close()
