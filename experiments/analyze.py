"""Why the defence works on one run: gradients along safety, the loss round the base, what the merge can change.

python experiments/analyze.py --config=configs/demo.py --workdir=runs/demo

Of a finished run of experiments/pipeline.py with the same config. Writes analysis.md with figures, and the arrays
(analysis.npz), into its workdir; a refusal LoRA that was trained without Buffer is added to the provider's folder.
SFT and the user are trained once more, to see the gradients change (--looks=0 leaves that out).
"""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/demo.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a finished run.")
ROWS = flags.DEFINE_integer(
    "rows", 64, "Rows of each kind, at most; the harmful ones are the run's probes (user.probes).", 1, 100_000
)
POINTS = flags.DEFINE_integer("points", 9, "Points of the landscape's grid along each direction.", 2, 200)
LOOKS = flags.DEFINE_integer(
    "looks", 8, "Looks at the gradients while SFT and the user are trained once more; 0 leaves that out.", 0, 10_000
)


def main(argv: list[str]) -> None:
    """Flags and one call."""
    require_flags(argv, CONFIG, WORKDIR)
    from br_jax.analysis import write_analyses

    sizes = ROWS.value, POINTS.value, LOOKS.value
    print(write_analyses(CONFIG.value, WORKDIR.value, *sizes, command=shlex.join(sys.argv)))


if __name__ == "__main__":
    run_with_flags(main)
