"""Times the user stage with Buffer against plain SFT: ratios of paired steps in one run.

python experiments/bench.py --config=configs/smollm2.py --pairs=9
"""

import dataclasses
import statistics
import time

from absl import flags
from ml_collections import config_flags

from br_jax.command_line import run_with_flags
from br_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file with a model.source, e.g. configs/smollm2.py.")
PAIRS = flags.DEFINE_integer("pairs", 9, "Pairs of steps; at least 5.", lower_bound=5)


def main(argv: list[str]) -> None:
    """Runs SFT, Buffer folded and Buffer stacked in turn, and prints the ratios of each round."""
    import jax

    import br_jax as br
    from br_jax.training.bench import make_round

    if CONFIG.value is None:
        raise UserError(f"--config is missing: {CONFIG.help}")
    config = CONFIG.value
    model = br.load_model(config.model.source, template=config.model.template, dtype=config.model.dtype)
    train = br.TrainConfig(**config.user.train)
    steps = {
        "SFT": make_round(model, train, buffer=False),
        "Buffer, folded": make_round(model, dataclasses.replace(train, frozen="fold"), buffer=True),
        "Buffer, stacked": make_round(model, dataclasses.replace(train, frozen="stack"), buffer=True),
    }
    seconds = {name: [] for name in steps}
    for round_ in range(PAIRS.value + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            if round_:  # the first one compiled
                seconds[name].append(time.perf_counter() - start)
    print(f"{'step':<18}{'median s':>10}{'ratio to SFT: median (least to most)':>44}")
    for name, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds["SFT"], strict=True)]
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{name:<18}{statistics.median(times):>10.3f}{spread:>44}")


if __name__ == "__main__":
    run_with_flags(main)
