"""Tries settings of a method on tuning seeds, as many as any other method has, and keeps a record of each.

python experiments/tune.py --config=configs/smollm2.py --workdir=runs/tune --method=resta --seed=21,22 \
    --try=defences.resta.strength=0.5 --try=defences.resta.strength=1.0 --try=defences.resta.strength=2.0

Several settings of one try have commas between. They are scored on the validation split; the best has the smallest
excess over the limits of the claims. tries.jsonl in the workdir holds those of every method.
"""

from absl import flags
from ml_collections import config_flags
from tabulate import tabulate

from br_jax.core.cli import require_flags, run_with_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/smollm2.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the tries, which all methods share.")
METHOD = flags.DEFINE_string("method", None, "A method, see br_jax/experiment/methods.py.")
TRY = flags.DEFINE_multi_string("try", [], "Settings to try, as path=value; default: those on record are shown.")
SEED = flags.DEFINE_multi_integer("seed", [1], "A seed; those below 50 are for tuning.")
P = flags.DEFINE_multi_float("p", [0.5], "A share of harmful rows.")
BUDGET = flags.DEFINE_integer("budget", 3, "Tries that each method has.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Scores what is new, then shows all tries of the method."""
    require_flags(argv, CONFIG, WORKDIR, METHOD)
    from br_jax.tuning import parse_try, run_tries

    config = CONFIG.value
    axes = {"tasks": [config.user.task], "topics": [config.topics.user], "users": [config.user.kind]}
    axes |= {"n": [config.user.n], "p": P.value, "seeds": SEED.value}
    found = run_tries(config, WORKDIR.value, METHOD.value, [*map(parse_try, TRY.value)], BUDGET.value, **axes)
    lines = [
        {"try": ", ".join(f"{path}={value}" for path, value in each["try"].items()) or "as it is"}
        | {name: f"{100 * gap:+.1f}" for name, gap in each["gaps"].items()}
        | {"excess": f"{100 * each['excess']:+.1f}"}
        for each in found
    ]
    print(tabulate(lines, "keys", disable_numparse=True) or "no try is on record")


if __name__ == "__main__":
    run_with_flags(main)
