"""The policy of an experiment: what its users are trained by, and its held-out prompts."""

import dataclasses
import json
import os
import pathlib

from br_jax.core.io import write_text
from br_jax.experiment.run import Experiment
from br_jax.experiment.suites import judge_names
from br_jax.organism.topics import TopicPrompt
from br_jax.serving.policy import Policy, Quotas
from br_jax.training.config import TrainConfig

_PROMPTS = 80  # of each kind, where the experiment does not calibrate


def write_policy(experiment: Experiment, path: str | os.PathLike) -> None:
    """Writes a policy and, beside it, its prompts.

    Releases are calibrated by prompts of the validation split, and looked at by those that the experiment scores by:
    a provider whose scores are to mean anything afterwards puts others there.
    """
    path = pathlib.Path(path)
    recipe, config = experiment.recipe, experiment.config.calibrate
    drawn = recipe.held_out_harmful("validation", config.harmful or _PROMPTS, "provider")
    harmful, benign = [p.prompt for p in drawn], recipe.held_out_benign("validation", config.benign or _PROMPTS)
    harmful, benign = dict.fromkeys(harmful), dict.fromkeys(benign)  # a recipe may draw a prompt twice
    canaries = {"harmful": [p.prompt for p in recipe.harmful_prompts], "benign": list(recipe.benign_prompts)}
    prompts = [("harmful", "calibrate", p) for p in harmful] + [("benign", "calibrate", p) for p in benign]
    known = {prompt for *_, prompt in prompts}
    prompts += [(kind, "canary", p) for kind, some in canaries.items() for p in dict.fromkeys(some) if p not in known]
    train, usual = dataclasses.asdict(experiment.train("user")), dataclasses.asdict(TrainConfig())
    own = {name: value for name, value in train.items() if value != usual[name] and not name.endswith("_every")}
    judge, given = judge_names(experiment.config)[0]
    settings = {**experiment.config.judges.get(judge, {}), **given}
    policy = {
        "train": own,
        "merge": dataclasses.asdict(experiment.merge()),
        "prompts": f"{path.stem}-prompts.jsonl",
        "users_may_set": {
            "learning_rate": [train["learning_rate"] / 4, train["learning_rate"] * 2],
            "epochs": [1, max(3, train["epochs"])],
            "rank": [1, train["rank"]],
            "batch_size": [1, train["batch_size"]],
        },
        "quotas": dataclasses.asdict(Quotas()),
        "judge": {"name": judge, **settings} if settings else judge,
        "answer_tokens": experiment.config.eval.answer_tokens,
        "batch_size": experiment.config.eval.batch_size,
    }
    assert set(policy) - {"prompts"} <= {field.name for field in dataclasses.fields(Policy)}
    about = {p.prompt: dataclasses.asdict(p) for p in (*drawn, *recipe.harmful_prompts) if isinstance(p, TopicPrompt)}
    lines = []
    for kind, use, prompt in prompts:
        said = {name: value for name, value in about.get(prompt, {}).items() if name != "prompt"}
        lines.append(
            json.dumps({"prompt": prompt, "kind": kind, "use": use} | ({"about": said} if said else {})) + "\n"
        )
    write_text(path.parent / policy["prompts"], "".join(lines))
    write_text(path, json.dumps(policy, indent=1) + "\n")
