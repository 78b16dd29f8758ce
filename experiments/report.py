"""Writes W/report.md or sweep.md, and W/figures/, from what experiments/pipeline.py or sweep.py left in its workdir W.

python experiments/report.py --workdir=W
python experiments/report.py --cells=results/cells.parquet --table=ours --workdir=W
python experiments/report.py --workdir=W --into=results/cells.parquet --table=mine    # adds W's cells as a table
"""

import os

from absl import flags

from br_jax.core.cli import require_flags, run_with_flags

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of experiments/pipeline.py or sweep.py.")
CELLS = flags.DEFINE_string("cells", None, "A file of cells, such as results/cells.parquet, to report on instead.")
INTO = flags.DEFINE_string("into", None, "A file of cells to put those reported on into, as --table.")
TABLE = flags.DEFINE_string("table", None, "Which of its tables, such as ours: see results/README.md.")
EXAMPLES = flags.DEFINE_integer("examples", 2, "Answers of a run to print for each model and prompt set.")


def main(argv: list[str]) -> None:
    """Flags and one call."""
    require_flags(argv, WORKDIR, *([TABLE] if CELLS.value or INTO.value else []))
    from br_jax.report.report import write_report
    from br_jax.report.results import read_archive, read_cells, write_archive

    if CELLS.value:
        cells = read_archive(CELLS.value, TABLE.value)
        os.makedirs(os.path.join(WORKDIR.value, "runs"), exist_ok=True)  # as of a sweep
    else:
        cells = read_cells(WORKDIR.value)
    print(write_report(WORKDIR.value, examples=EXAMPLES.value, cells=cells))
    if INTO.value:  # now, for a report refuses a workdir without cells
        write_archive(INTO.value, TABLE.value, cells)


if __name__ == "__main__":
    run_with_flags(main)
