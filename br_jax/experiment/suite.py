"""What a config asks of every model: the held-out prompts, how answers are scored, and by which judges."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from br_jax.core.bounds import TOKENS, require
from br_jax.core.errors import UserError, look_up
from br_jax.core.mesh import make_mesh
from br_jax.experiment.recipe import Recipe
from br_jax.experiment.settings import Settings
from br_jax.models.model import Model
from br_jax.scoring.judges import JUDGES, get_judge
from br_jax.scoring.judges.base import Judge
from br_jax.scoring.judges.texts import TopicJudge
from br_jax.scoring.likelihoods import refusing_tokens
from br_jax.scoring.suite import DEGENERATE, Suite


def make_suite(settings: Settings, recipe: Recipe, raw: Model, mesh: Mesh | None) -> Suite:
    """The prompts of the config's split, with its judges; a judge that is a model lies on the mesh."""
    scored, attacker, n = settings.eval, settings.attacker, settings.reinforce
    refusals = [row for stage in ("align", "reinforce") for row in recipe.refusal_rows(n.refusals, stage)]
    return Suite(
        topic=recipe.harmful_prompts,
        judges=[_judge(settings, name, given, settings.topics.eval, mesh) for name, given in judge_names(settings)],
        degenerate=scored.degenerate,
        attacks=recipe.attacks,
        own=[(attacker.ask(p.prompt), p) for p in recipe.harmful_prompts if attacker.asks_itself],
        samples=attacker.samples,
        task_rows=recipe.scored_task_rows,
        rule=recipe.rule,
        benign=recipe.benign_prompts,
        health=recipe.health_rows,
        refusing=refusing_tokens(raw, refusals, recipe.benign_rows(n.benign)),
        answer_tokens=scored.answer_tokens,
        task_tokens=scored.task_tokens,
        batch_size=scored.batch_size,
    )


def check_scoring(settings: Settings, recipe: Recipe) -> None:
    """Raises a `UserError` where a way to score, or a judge, is unknown, or a judge cannot read what it is to judge."""
    look_up("eval.degenerate", settings.eval.degenerate, DEGENERATE)
    names = [name for name, _ in judge_names(settings)]
    for name in (*names, *filter(None, [settings.calibrate.judge])):
        look_up("judge", name, JUDGES)
        if name == TopicJudge.name and settings.data.material == "paper":
            raise UserError(
                f"the judge {name} reads answers on invented topics alone, and data.material=paper has none: set "
                "eval.judges and calibrate.judge to others"
            )
    unknown = [attack.behavior for attack in recipe.attacks if attack.about is None]
    if unknown and TopicJudge.name in names:
        raise UserError(
            f"data.attacks.path: {unknown[0][:60]!r} is about no invented topic, so the judge {TopicJudge.name} cannot "
            "read its answers: set eval.judges to others"
        )


def calibration_judge(settings: Settings, mesh: Mesh | None) -> Judge | None:
    """Who says which answers to the provider's own prompts comply; none where the config names none."""
    name = settings.calibrate.judge
    return _judge(settings, name, {}, settings.topics.provider, mesh) if name else None


def _judge(settings: Settings, name: str, given: Mapping[str, Any], topics: str, mesh: Mesh | None) -> Judge:
    # FSDP alone: a judge's vocabulary may be one that the experiment's tensor axis does not divide.
    asked = {"topics": [*map(str.strip, topics.split(","))]}
    own = dataclasses.asdict(settings.judges) | {TopicJudge.name: asked}
    return get_judge(name, mesh and make_mesh(data=1, fsdp=-1), **{**own.get(name, {}), **given})


def judge_names(settings: Settings) -> list[tuple[str, dict]]:
    """The judges' names, and what of their settings is said with them: classifier@2048 has another max_length."""
    named = []
    for entry in settings.eval.judges.split(","):
        name, at, length = entry.strip().partition("@")
        if at:
            length = int(length) if re.fullmatch(r"\d{1,9}", length) else length
            require(f"eval.judges: {name}@: the length", length, TOKENS)
        named.append((name, {"max_length": length} if at else {}))
    return named
