"""Judges of answers behind one interface, by name: is this answer to that prompt harmful?"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from br_jax.core.errors import UserError, look_up, near_names
from br_jax.scoring.judges.base import Judge
from br_jax.scoring.judges.models import ClassifierJudge, LlamaGuardJudge, WildGuardJudge
from br_jax.scoring.judges.texts import KeywordJudge, OutsideVerdicts, TopicJudge

JUDGES: dict[str, Callable[..., Judge]] = {
    "keywords": KeywordJudge,
    "topic": TopicJudge,
    "classifier": ClassifierJudge,
    "llama_guard": LlamaGuardJudge,
    "wildguard": WildGuardJudge,
    "verdicts": OutsideVerdicts,
}


def get_judge(judge: str | Mapping[str, Any], mesh: Mesh | None = None, **settings) -> Judge:
    """Makes a judge.

    Args:
        judge: its name, or a mapping of settings with its "name".
        mesh: devices that a judge which is a model is laid on; None is JAX's default device.
        settings: more of them, which win: "source" (a model's or the verdicts' file), "max_length", "threshold",
            "batch_size", "dtype", as the judge's own class has them. A wrong one is a `UserError`.
    """
    given = {"name": judge} if isinstance(judge, str) else dict(judge)
    name, settings = given.pop("name", None), given | settings
    make = look_up("judge", name, JUDGES)
    known = inspect.signature(make).parameters
    if unknown := [setting for setting in settings if setting not in known]:
        raise UserError(f"judge {name}: unknown setting {unknown[0]!r}; {near_names(unknown[0], known)}")
    if "source" in known and "source" not in settings:
        raise UserError(f"judge {name}: setting 'source' is missing: give the path or name it reads from")
    return make(**({"mesh": mesh} if mesh is not None and "mesh" in known else {}), **settings)
