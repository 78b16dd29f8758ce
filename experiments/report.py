"""Writes W/report.md and W/figures/ from what a pipeline left in its workdir W.

Command: experiments/report.py --workdir=W
"""

import argparse

from br_jax.core.cli import run_main
from br_jax.report.report import write_report


def main() -> None:
    """Writes the report and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="the workdir of experiments/pipeline.py or sweep.py")
    parser.add_argument("--examples", type=int, default=2, help="answers to print for each model and set")
    arguments = parser.parse_args()
    print(write_report(arguments.workdir, examples=arguments.examples))


if __name__ == "__main__":
    run_main(main)
