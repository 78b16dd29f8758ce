"""Writes W/report.md or sweep.md, and W/figures/, from what experiments/pipeline.py or sweep.py left in its workdir W.

python experiments/report.py --workdir=W
"""

from absl import flags

from br_jax.core.cli import require_flags, run_with_flags

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of experiments/pipeline.py or sweep.py.")
EXAMPLES = flags.DEFINE_integer("examples", 2, "Answers of a run to print for each model and prompt set.")


def main(argv: list[str]) -> None:
    """Flags and one call."""
    require_flags(argv, WORKDIR)
    from br_jax.report.report import write_report

    print(write_report(WORKDIR.value, examples=EXAMPLES.value))


if __name__ == "__main__":
    run_with_flags(main)
