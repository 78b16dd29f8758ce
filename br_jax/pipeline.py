"""One user's experiment from a raw model to a report: a grid of one, stage by stage.

Stages, in order: pretrain (a model from scratch, where the config names no other), distill (the raw model answers the
prompts that others train on), align, buffer, reinforce, sft, user, release, evaluate, report. Each leaves its result in
the workdir or the provider's folder and is read back when it is there already.
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from br_jax.adapters.diagnostics import merge_report
from br_jax.core.errors import UserError, near_names
from br_jax.core.hosts import is_main
from br_jax.core.io import owned
from br_jax.core.progress import announce
from br_jax.core.records import write_record
from br_jax.experiment.grid import read_run, run_cells
from br_jax.experiment.methods import STEPS, TRAININGS, cells_of
from br_jax.experiment.run import Experiment
from br_jax.experiment.settings import TRAINED
from br_jax.report.report import write_report
from br_jax.version import __version__

STAGES = ("pretrain", "distill", *TRAININGS, "release", "evaluate", "report")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def run_pipeline(
    config: ConfigDict, workdir: str | os.PathLike, stages: Sequence[str] = STAGES, command: str = ""
) -> list[dict[str, Any]]:
    """Runs stages of an experiment; what is finished is read back, what was stopped goes on.

    Args:
        config: see configs/base.py.
        workdir: made if absent; the same config comes back to the same workdir, another one is refused.
        stages: which to run; what they need from earlier ones is read back, or made.
        command: recorded in the report.

    Returns:
        The scored cells, see `grid.run_cells` (none when "evaluate" is not among the stages).

    Raises:
        UserError: a wrong stage or setting, or missing files, before anything is written; a workdir of another run, or
            in which another process works.
        Stopped: SIGTERM came, see `training.loop.Loop`.
    """
    for stage in stages:
        if stage not in STAGES:
            raise UserError(f"stage {stage!r}: {near_names(stage, STAGES)}")
    start, workdir, cells = time.perf_counter(), pathlib.Path(workdir), []
    e = Experiment(config, workdir)
    e.check(one_job=True)
    actions = {
        "pretrain": functools.partial(e.model, "raw"),
        "distill": e.recipe.prepare,
        "align": functools.partial(e.model, "aligned"),
        **{name: functools.partial(e.adapter, name) for name in TRAININGS if name != "align"},
        "release": e.release,
    }
    with owned(workdir):
        e.begin()
        for stage, act in actions.items():
            if stage in stages:
                announce(f"{stage} ...")
                act()
        if "evaluate" in stages:
            announce("evaluate ...")
            strengths = sorted({0.0, e.settings.merge.a})  # a plain sum is what QR is compared with
            known = read_run(e.settings, workdir, cells_of(STEPS, strengths))
            cells = [cell.shown for cell in run_cells(e.settings, workdir, known, e)]
            record = {"command": command, "wall_seconds": time.perf_counter() - start, **_details(e)}
            if is_main():
                write_record(workdir / "results.json", record)
        if "report" in stages and is_main():
            write_report(workdir, cells=cells or None)
    return cells


def _details(e: Experiment) -> dict[str, Any]:
    """What a report says of a run beside its cells."""
    s, versions = e.settings, {"python": platform.python_version(), "br_jax": __version__}
    versions["matmul_precision"] = s.model.matmul_precision
    return {
        "calibration": e.calibration("user") if s.calibrate.harmful else None,
        "merge": merge_report(e.adapter("user"), e.adapter("reinforce"), e.merge_of("user")),
        "entered": e.entered(),
        "seeds": {"data": s.seed, **{stage: getattr(s, stage).train.seed for stage in TRAINED}},
        "versions": versions | {name: importlib.metadata.version(name) for name in PACKAGES},
        "hashes": e.hashes(),
        "devices": [str(device) for device in jax.devices()],
        "config": dataclasses.asdict(s),
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """The most bytes that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # in bytes on macOS, in kibibytes elsewhere
