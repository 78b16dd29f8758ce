"""Scores one model, or a model with an adapter, on a config's suite.

python experiments/evaluate.py --config=configs/smollm2.py --workdir=runs/smollm2 --adapter=runs/smollm2/released

The workdir is one that experiments/pipeline.py has filled; the base is its aligned model, or the raw one with --raw.
"""

import json

from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/demo.py.")
WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of experiments/pipeline.py.")
ADAPTER = flags.DEFINE_string("adapter", None, "Adapter folder in PEFT's layout; default: the base alone.")
RAW = flags.DEFINE_bool("raw", False, "Score the raw model instead of the aligned one.")
ANSWERS = flags.DEFINE_string("answers", None, "JSONL file for every prompt, answer and verdict.")


def main(argv: list[str]) -> None:
    """Flags and one call."""
    import br_jax as br
    from br_jax.core.io import owned
    from br_jax.experiment.run import Experiment
    from br_jax.provider import with_guard

    require_flags(argv, CONFIG, WORKDIR)
    experiment = Experiment(CONFIG.value, WORKDIR.value)
    experiment.check()
    with owned(WORKDIR.value):
        experiment.begin()
        model = experiment.raw if RAW.value else with_guard(experiment.aligned, experiment.provider)
        adapter = br.load_adapter(ADAPTER.value, model) if ADAPTER.value else None
        model, adapter = experiment.as_scored(model, adapter, "adapter")
        scores = br.evaluate(model, experiment.suite, adapter, records=ANSWERS.value)
    del scores["examples"], scores["outcomes"]
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    run_with_flags(main)
