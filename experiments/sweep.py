"""Runs a grid of experiments over methods, p, n, tasks, topics, seeds, a and models; writes tables and figures.

python experiments/sweep.py --config=configs/smollm2.py --workdir=runs/sweep --p=0,0.1,0.5,1 --seed=1,2,3
python experiments/sweep.py --config=... --workdir=... --p=0.5 --seed=1,2,3 --method=sft,ours --a=0,0.1,0.5,1 --dry-run

The same command goes on where it was stopped; several commands may share a workdir. --engine=ray spreads one over the
nodes of a Ray cluster (pip install 'br_jax[ray]'). Exit status as experiments/pipeline.py's.
"""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags
from br_jax.core.errors import UserError
from br_jax.core.hosts import is_main

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/smollm2.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
METHOD = flags.DEFINE_list(
    "method", "aligned,sft,ours", "Methods, see br_jax/experiment/methods.py; all: every defence."
)
P = flags.DEFINE_list("p", None, "Shares of harmful rows; default: the config's.")
N = flags.DEFINE_list("n", None, "Numbers of user rows; default: the config's.")
SEED = flags.DEFINE_list("seed", None, "Seeds of data and training; default: the config's.")
REPEAT = flags.DEFINE_list("repeat", None, "Which trainings on the same rows: 1,2 for two; default: the first.")
A = flags.DEFINE_list("a", None, "Strengths of the QR merge; default: the config's.")
TASK = flags.DEFINE_list("task", None, "User tasks; default: the config's.")
ATTACKER = flags.DEFINE_list("attacker", None, "Kinds of user, see br_jax/attackers; all; default: the config's.")
TOPIC = flags.DEFINE_list("topic", None, "Topics of the user's harmful rows, + for a mixture; default: the config's.")
MODEL = flags.DEFINE_list("model", None, "Models (model.source); default: the config's.")
ENGINE = flags.DEFINE_enum("engine", "here", ["here", "ray"], "Where runs are made: in this process, or on a cluster.")
ADDRESS = flags.DEFINE_string("address", "auto", "Of the Ray cluster; local: one of this machine alone.")
RESOURCES = flags.DEFINE_string("resources", '{"CPU": 1}', "What a task takes of a node, as JSON.")
BUCKET = flags.DEFINE_string("bucket", "", "gs:// or another folder between nodes that share no file system.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be run, and what that costs, and run nothing.")
flags.DEFINE_alias("dry-run", "dry_run")


def main(argv: list[str]) -> int:
    """Flags and a loop over what is done."""
    require_flags(argv, CONFIG, WORKDIR)
    from br_jax.attackers.registry import ATTACKERS
    from br_jax.experiment.grid import Grid, in_turn, plan, render_plan, run_sweep
    from br_jax.experiment.methods import COMPARED
    from br_jax.report.report import print_cell, print_summary, write_report

    config = CONFIG.value
    grid = Grid(
        models=MODEL.value or [config.model.source],
        tasks=TASK.value or [config.user.task],
        users=[*ATTACKERS] if ATTACKER.value == ["all"] else ATTACKER.value or [config.user.kind],
        topics=[topic.replace("+", ",") for topic in TOPIC.value or [config.topics.user]],
        n=_numbers(N, int, config.user.n),
        p=_numbers(P, float, config.user.harmful_share),
        seeds=_numbers(SEED, int, config.seed),
        methods=COMPARED if METHOD.value == ["all"] else METHOD.value,
        a=_numbers(A, float, config.merge.a),
        repeats=_numbers(REPEAT, int, config.user.repeat),
    )
    if DRY_RUN.value:
        print(render_plan(plan(config, WORKDIR.value, grid)))
        return 0
    engine = in_turn
    if ENGINE.value == "ray":
        from br_jax.experiment.cluster import on_ray, parse_resources

        engine = on_ray(ADDRESS.value, parse_resources(RESOURCES.value), BUCKET.value)
    cells, records, total = [], {}, len(grid.runs()) * len(grid.cells())
    for cell in run_sweep(config, WORKDIR.value, grid, records, engine):
        cells.append(cell)
        if is_main():
            print_cell(cell, f"{len(cells)}/{total}")
    if not is_main():
        return 0
    status = print_summary(cells)  # the report is of other sweeps in the workdir, too
    print(write_report(WORKDIR.value, command=shlex.join(sys.argv), known=records))
    return status


def _numbers(flag: flags.FlagHolder, kind: type, default) -> list:
    try:
        return [kind(value) for value in flag.value] if flag.value else [default]
    except ValueError as error:
        raise UserError(f"--{flag.name}={','.join(flag.value)}: {error}") from error


if __name__ == "__main__":
    run_with_flags(main)
