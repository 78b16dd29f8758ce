"""A run's folder, which remembers what it is: finished, stopped, or another run's.

It holds run.json (what it is), metrics.jsonl, probes.jsonl, checkpoints/ (while it runs), and at the end the result and
stage.json (what it cost), written last.
"""

import datetime
import json
import pathlib
import shutil

from br_jax.distributed import agree, barrier, is_main, require_shared
from br_jax.errors import UserError
from br_jax.files import make_private, read_json, write_json, writing
from br_jax.hashes import key_of


class Folder:
    """A run's folder: refuses, by a `UserError`, to serve another run, and says whether this one is `finished`.

    Every process makes one; process 0 writes, and what it sees is what counts.
    """

    def __init__(self, path: pathlib.Path, identity: dict, private: bool = False):
        self.path, self._identity = path, identity
        known = path / "run.json"
        with writing(path, "choose another workdir or free space"):
            if is_main():
                if private:
                    make_private(path.parent)
                path.mkdir(parents=True, exist_ok=True)
                if not known.exists():
                    write_json(known, identity)
            barrier(str(known))
            require_shared(known, known.exists())
        self._compare(read_json(known, f"delete {path} to start anew"))
        self.finished = agree((path / "stage.json").exists())

    def _compare(self, known: dict) -> None:
        for part in ("config", "inputs"):
            was, is_now = known.get(part, {}), self._identity[part]
            for key in sorted({*was, *is_now}):
                before, now = _short(was.get(key)), _short(is_now.get(key))
                if before != now:
                    raise UserError(
                        f"{self.path}: holds a run with another {part}: {key} was {before}, is {now}: "
                        "choose another workdir or delete that folder"
                    )

    def finish(self, report: dict) -> None:
        """Writes stage.json, after which the run is finished, and clears its checkpoints."""
        if is_main():
            name, config, inputs = (self._identity[part] for part in ("name", "config", "inputs"))
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            record = {"name": name, "config_hash": key_of(config), "inputs": inputs, **report, "finished": now}
            write_json(self.path / "stage.json", record)
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)
        barrier(str(self.path))


def _short(value) -> str:
    text = json.dumps(value)
    return text[1:13] + "..." if len(text) > 60 else text
