"""Runs an experiment: all stages of a config, or some.

python experiments/pipeline.py --config=configs/demo.py --workdir=runs/demo [--stages=user,release] [--config.x.y=z]

On several machines (docs/pods.md): --multihost, or --coordinator=host:port --num_processes=N --process_id=I.

Exit status: 0 done, 1 the attack failed (the experiment shows nothing), 2 bad input, 130 stopped by Ctrl-C, 143 by
SIGTERM.
"""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags
from br_jax.core.hosts import is_main

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/demo.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run makes.")
STAGES = flags.DEFINE_list(
    "stages",
    None,
    "Stages to run, with commas between; default: all. In order: "
    "pretrain, distill, align, buffer, reinforce, sft, user, release, evaluate, report.",
)


def main(argv: list[str]) -> int:
    """Flags and one call."""
    from br_jax.pipeline import STAGES as ALL
    from br_jax.pipeline import run_pipeline
    from br_jax.report.report import print_summary

    require_flags(argv, CONFIG, WORKDIR)
    cells = run_pipeline(CONFIG.value, WORKDIR.value, STAGES.value or ALL, command=shlex.join(sys.argv))
    if not cells or not is_main():
        return 0
    status = print_summary(cells)
    if "report" in (STAGES.value or ALL):
        print(f"report: {WORKDIR.value}/report.md")
    return status


if __name__ == "__main__":
    run_with_flags(main)
