"""Serves users: trains what lies in an inbox beside Buffer, many at a time, and hands over what the gate lets leave.

python experiments/serve_folder.py --provider=W/provider --inbox=I --outbox=O --policy=policy.json [--once]
python experiments/serve_folder.py --config=configs/demo.py --workdir=runs/demo --write_policy=policy.json

A job is I/NAME.jsonl, and if need be I/NAME.json with settings that the policy allows, put there first. It becomes
O/NAME/released with O/NAME/card.md, or O/NAME/held.json with the reason. The same command goes on where it was stopped.
The second form writes the policy of an experiment whose provider's folder is there. See docs/provider.md.
"""

import dataclasses
import json
import os
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from br_jax.core.cli import require_flags, run_with_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "To write a policy: the experiment's config file.")
WORKDIR = flags.DEFINE_string("workdir", None, "To write a policy: the experiment's folder.")
WRITE_POLICY = flags.DEFINE_string("write_policy", None, "File to write the policy of an experiment to.")
PROVIDER = flags.DEFINE_string("provider", None, "Provider's folder.")
INBOX = flags.DEFINE_string("inbox", None, "Folder that users' files come into.")
OUTBOX = flags.DEFINE_string("outbox", None, "Folder that adapters, and reasons why there is none, are put into.")
POLICY = flags.DEFINE_string("policy", None, "The policy's JSON file, see br_jax/serving/policy.py.")
ONCE = flags.DEFINE_bool("once", False, "End when all that lies in the inbox is done.")
SLOTS = flags.DEFINE_integer("slots", None, "Users trained at a time; default: the policy's.", 1, 4096)
SETTLE = flags.DEFINE_float("settle", 2.0, "Seconds for which a file must not have changed to be taken.", 0.0, 3600.0)
PROMPTS = 80  # of each kind that releases are calibrated by, where an experiment does not calibrate
PRECISION = flags.DEFINE_enum(
    "matmul_precision", "float32", ["float32", "bfloat16", "auto"], "In what an f32 model's products are made."
)


def write_policy(experiment, path) -> None:
    """Writes the policy of an experiment, and its prompts beside it: what its users are trained by, what is held out.

    Releases are calibrated by prompts of the validation split, and looked at by those that the experiment scores by:
    a provider whose scores are to mean anything afterwards puts others there.
    """
    from br_jax.core.io import write_text
    from br_jax.experiment.suite import judge_names
    from br_jax.organism.topics import TopicPrompt
    from br_jax.serving.policy import Quotas
    from br_jax.training.config import TrainConfig

    path = pathlib.Path(path)
    recipe, settings, train = experiment.recipe, experiment.settings, experiment.settings.train("user")
    validation = recipe.held_out_harmful("validation", settings.calibrate.harmful or PROMPTS, "provider")
    uses = {
        ("harmful", "calibrate"): [p.prompt for p in validation],
        ("benign", "calibrate"): [
            p.prompt for p in recipe.held_out_benign("validation", settings.calibrate.benign or PROMPTS)
        ],
        ("harmful", "canary"): [p.prompt for p in recipe.harmful_prompts],
        ("benign", "canary"): [p.prompt for p in recipe.benign_prompts],
    }
    about = {
        p.prompt: dataclasses.asdict(p) for p in (*validation, *recipe.harmful_prompts) if isinstance(p, TopicPrompt)
    }
    lines = {}
    for (kind, use), prompts in uses.items():
        for prompt in (prompt for prompt in prompts if prompt not in lines):  # a recipe may draw one twice
            lines[prompt] = {"prompt": prompt, "kind": kind, "use": use}
            if prompt in about:
                lines[prompt]["about"] = {name: value for name, value in about[prompt].items() if name != "prompt"}
    usual, used = dataclasses.asdict(TrainConfig()), dataclasses.asdict(train)
    judge, given = judge_names(settings)[0]
    judging = {**dataclasses.asdict(settings.judges).get(judge, {}), **given}
    policy = {
        "train": {name: value for name, value in used.items() if value != usual[name] and not name.endswith("_every")},
        "merge": dataclasses.asdict(settings.merge),
        "prompts": f"{path.stem}-prompts.jsonl",
        "users_may_set": {
            "learning_rate": [train.learning_rate / 4, train.learning_rate * 2],
            "epochs": [1, max(3, train.epochs)],
            "rank": [1, train.rank],
            "batch_size": [1, train.batch_size],
        },
        "quotas": dataclasses.asdict(Quotas()),
        "judge": {"name": judge, **judging} if judging else judge,
        "answer_tokens": settings.eval.answer_tokens,
        "batch_size": settings.eval.batch_size,
    }
    write_text(path.parent / policy["prompts"], "".join(json.dumps(line) + "\n" for line in lines.values()))
    write_text(path, json.dumps(policy, indent=1) + "\n")


def main(argv: list[str]) -> None:
    """Flags and one loop."""
    if WRITE_POLICY.value:
        from br_jax.experiment.run import Experiment

        require_flags(argv, CONFIG, WORKDIR)
        write_policy(Experiment(CONFIG.value, WORKDIR.value), WRITE_POLICY.value)
        print(f"{WRITE_POLICY.value}: written, with its prompts beside it")
        return
    from br_jax.serving.policy import read_policy
    from br_jax.serving.reports import Table
    from br_jax.serving.service import Service, load_provider

    require_flags(argv, PROVIDER, INBOX, OUTBOX, POLICY)
    os.umask(0o077)  # what is written is the provider's to hand on
    policy = read_policy(POLICY.value)
    provider = load_provider(PROVIDER.value, PRECISION.value)
    settings = {"once": ONCE.value, "settle": SETTLE.value, "slots": SLOTS.value}
    table, status = Table(sys.stderr), {}
    for status in Service(provider, INBOX.value, OUTBOX.value, policy, **settings).run():
        table.show(status)
    print(f"{status['released']} released, {status['held']} held back, in {OUTBOX.value}")


if __name__ == "__main__":
    run_with_flags(main)
