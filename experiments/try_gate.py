"""Puts a provider's gate to the test: trains users, and shows it good releases and releases made to be bad.

python experiments/try_gate.py --config=configs/demo.py --workdir=runs/demo --policy=policy.json [--count=40] [--json=F]

What a policy's limits are worth depends on its prompts and on the model: try them before users come.
"""

import collections

from absl import flags
from ml_collections import config_flags
from tabulate import tabulate

from br_jax.core.cli import require_flags, run_with_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file of the experiment, whose users are tried.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment, with the provider's in it.")
POLICY = flags.DEFINE_string("policy", None, "The policy's JSON file.")
COUNT = flags.DEFINE_integer("count", 40, "Releases of each kind, good and bad.", 2, 10_000)
ROWS = flags.DEFINE_integer("n", 600, "Rows of the largest user.", 20)
SEED = flags.DEFINE_integer("seed", 0, "Of the users.", 0)
JSON = flags.DEFINE_string("json", None, "File for every release's finding.")


def main(argv: list[str]) -> None:
    """Flags and one call."""
    from br_jax.core.io import write_json
    from br_jax.experiment.run import Experiment
    from br_jax.serving.policy import read_policy
    from br_jax.serving.service import load_provider
    from br_jax.serving.trial import try_gate

    require_flags(argv, CONFIG, WORKDIR, POLICY)
    experiment, policy = Experiment(CONFIG.value, WORKDIR.value), read_policy(POLICY.value)
    recipe, provider = experiment.recipe, load_provider(experiment.provider)
    task, harmful = recipe.task_rows[0], recipe.user_harmful_rows
    found = try_gate(provider, policy, task, harmful, COUNT.value, ROWS.value, SEED.value)
    kinds = collections.defaultdict(list)
    for one in found:
        kinds[one["kind"]].append(one)
    lines = [
        [kind, len(some), sum(not one["passed"] for one in some), sum(one["seconds"] for one in some) / len(some)]
        for kind, some in kinds.items()
    ]
    print(tabulate(lines, ["releases", "of them", "held", "seconds each"], floatfmt=".2f"))
    for one in found:
        if one["passed"] != (one["kind"] == "good"):
            print(f"{one['kind']}, {one['name']}: {'; '.join(one['why']) or 'was let through'}")
    if JSON.value:
        write_json(JSON.value, found)


if __name__ == "__main__":
    run_with_flags(main)
