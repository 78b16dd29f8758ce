"""A run's folder, which remembers what it is: finished, stopped, or another run's.

It holds run.json (what it is), metrics.jsonl, probes.jsonl, checkpoints/ (while it runs), and at the end the result and
stage.json (what it cost, and the hashes of all that is there), written last.
"""

import contextlib
import datetime
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from absl import logging

from br_jax.core.errors import UserError
from br_jax.core.hosts import agree, barrier, is_main, require_shared
from br_jax.core.io import make_private, owned, writing
from br_jax.core.records import file_hashes, key_of, read_record, require_unchanged, write_record

_BEGUN, _FINISHED, _CHECKPOINTS = "run.json", "stage.json", "checkpoints"
_NO_RESULT = (_FINISHED, _CHECKPOINTS)


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
                with writing(self.path, "choose another workdir or free space"):
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
            write_record(self.path / _FINISHED, record | {"files": file_hashes(self.path, _NO_RESULT)})
            shutil.rmtree(self.path / _CHECKPOINTS, ignore_errors=True)
            for path in self.path.rglob("*") if self._private else ():
                path.chmod(0o700 if path.is_dir() else 0o600)
        barrier(str(self.path))

    def _look(self) -> bool:
        """Whether this run has finished here; a `UserError` where another one did, or could go on."""
        begun, ended, saved = (self.path / name for name in (_BEGUN, _FINISHED, _CHECKPOINTS))
        with writing(self.path, "choose another workdir"):
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
        mine = _parts(self._identity)
        for part, before in _parts(known).items():
            for key in sorted({*before, *mine[part]}):
                was, is_now = _short(before.get(key)), _short(mine[part].get(key))
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


def _parts(identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What of a run's identity is compared, by the words of the message."""
    return {"name": {"of": identity.get("name")}} | {part: identity.get(part, {}) for part in ("config", "inputs")}


def _short(value) -> str:
    text = json.dumps(value)
    return text[1:13] + "..." if len(text) > 60 else text
