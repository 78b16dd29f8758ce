"""The protocol of a table: what a seed may be used for, and that cells of test seeds are scored once and in one way."""

import functools
import hashlib
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import br_jax
from br_jax.core.errors import UserError
from br_jax.core.records import file_hash, key_of
from br_jax.core.store import Store
from br_jax.organism.topics import is_file
from br_jax.scoring.judges.base import Judge

VALIDATION, TEST = 50, 100  # the first seeds of these roles; those below are for tuning
MARKS = ("code", "config", "judge", "prompts")  # what all cells of a table's test seeds share
_TABLE = "table"
_APART = ("report", "serving", "planning")  # parts of the package that no score depends on


def role(seed: int) -> str:
    """What a seed is for: "tuning" (to 49), "validation" (to 99), or "test", which is scored once."""
    return "tuning" if seed < VALIDATION else "validation" if seed < TEST else "test"


def made_with(config: Mapping[str, Any], judges: Sequence[Judge]) -> dict[str, str]:
    """How a cell is made: `MARKS`, each a short hash, the commit, and the machine, of which the last bits depend.

    Args:
        config: the settings that all cells of a table share, as dicts.
        judges: of its suite.
    """
    home = pathlib.Path(br_jax.__file__).parent / "organism"
    files = [*sorted(home.glob("*.json*")), *filter(is_file, map(str.strip, config["topics"]["eval"].split(",")))]
    marks = {"code": code(), "config": key_of(config), "prompts": key_of([*map(file_hash, files)], config["eval"])}
    marks |= {"judge": key_of([(judge.name, judge.version) for judge in judges])}
    return {name: marks[name][:12] for name in MARKS} | {"commit": commit()} | machine()


@functools.cache
def code() -> str:
    """A hash of all of the package that a score may depend on."""
    home, digest = pathlib.Path(br_jax.__file__).parent, hashlib.sha256()
    for file in sorted(home.rglob("*.py")):
        if file.relative_to(home).parts[0] not in (*_APART, "configs"):
            digest.update(file.relative_to(home).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def commit() -> str:
    """The commit of the checkout that this is, "" where it is none."""
    home = pathlib.Path(br_jax.__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()[:12] if found.returncode == 0 else ""


def machine() -> dict[str, str]:
    """What two trainings of one seed may differ by: processor, threads, devices, versions and flags of the compiler."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor(),
        "threads": str(threads),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


class Ledger:
    """The test cells of a table's folder, in scored.jsonl: the first one fixes how all others are made."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._store = folder, Store(folder / "scored.jsonl")

    def require(self, path: pathlib.Path, made: Mapping[str, str], *, there: bool) -> None:
        """Raises a `UserError` where a cell is not made as this table's, or would be scored a second time."""
        known = self._store[_TABLE] if self._store.holds([_TABLE])[0] else made
        for mark in MARKS:
            if made.get(mark) != known.get(mark):
                of = known[mark] + (f", commit {known['commit']}" if mark == "code" and known["commit"] else "")
                raise UserError(
                    f"{path}: made with another {mark} ({made.get(mark, 'not said')}) than this table's test cells "
                    f"({of}): make it with that, or in a folder of its own"
                )
        if not there and (name := self._name(path)) in self._store:
            raise UserError(
                f"{path}: was scored on {self._store[name]['when']}, and a test seed is scored once: put the file "
                "back, or begin a new folder"
            )

    def add(self, path: pathlib.Path, made: Mapping[str, str]) -> None:
        """Enters a cell that has been scored."""
        self._store.add({_TABLE: {**made}})  # what is there stays
        self._store.add({self._name(path): {"when": time.strftime("%Y-%m-%d"), **made}})

    def _name(self, path: pathlib.Path) -> str:
        return path.relative_to(self._folder).as_posix()
