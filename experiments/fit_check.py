"""Compiles the stages of a config for a TPU slice, on any host and without weights, and says whether they fit.

python experiments/fit_check.py --config=configs/llama3_8b.py --topology=v5e:2x4 [--stage=user] [--largest] [--json=F]
python experiments/fit_check.py --config=configs/llama3_8b.py --topology=v5e:2x4 --stage=user,pool --slots=8,32

Needs libtpu: pip install 'br_jax[tpu]'. Answers are kept beside the compiled programs (--compilation_cache) and
read back when asked again. Exit status: 0 everything fits, 1 something does not, 2 bad input.
"""

import pathlib
import re

import jax
from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags
from br_jax.core.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/llama3_8b.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v5e:2x4, v4:2x2x1, v5p:4x4x4, v6e:2x4, ...")
STAGE = flags.DEFINE_list("stage", "all", "Stages: all, or some of buffer,reinforce,user,sft,pool,prefill,decode.")
LARGEST = flags.DEFINE_bool("largest", False, "Also find the largest batch of each stage that fits.")
SLOTS = flags.DEFINE_list("slots", ["8"], "Users of a pool; several numbers are checked one after another.")
JSON = flags.DEFINE_string("json", None, "File for every figure.")


def main(argv: list[str]) -> int:
    """Flags and one call a stage."""
    require_flags(argv, CONFIG, TOPOLOGY)
    jax.config.update("jax_enable_compilation_cache", False)  # a program read back would say little of itself
    cache = jax.config.jax_compilation_cache_dir
    keep = pathlib.Path(cache, "fit_check") if cache else None
    from br_jax.core.io import write_json
    from br_jax.core.progress import progress
    from br_jax.planning.fit import check_fit, largest_batch, render
    from br_jax.planning.programs import PROGRAMS

    if not all(re.fullmatch(r"[1-9]\d{0,4}", slots) for slots in SLOTS.value):
        raise UserError(f"--slots={','.join(SLOTS.value)}: give numbers from 1 on, with commas between")
    named = PROGRAMS if STAGE.value == ["all"] else STAGE.value
    stages = [(stage, int(slots)) for stage in named for slots in (SLOTS.value if stage == "pool" else [0])]
    fits = []
    with progress(len(stages), "compile", "stage") as bar:
        for stage, slots in stages:
            bar.set_postfix_str(f"{stage} for {TOPOLOGY.value}", refresh=True)
            fits.append(check_fit(CONFIG.value, TOPOLOGY.value, stage, slots=slots, keep=keep))
            if LARGEST.value and not fits[-1].problem:
                bar.set_postfix_str(f"{stage}: largest batch", refresh=True)
                fits.append(largest_batch(CONFIG.value, TOPOLOGY.value, stage, fits[-1], keep))
            bar.update()
    if JSON.value:
        write_json(JSON.value, [fit.to_json() for fit in fits])
    print(render(fits))
    return int(any(fit.problem for fit in fits))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # before JAX looks for devices: no chip of this host is held
    run_with_flags(main, one_heap=False)
