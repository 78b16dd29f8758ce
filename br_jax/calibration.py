"""How much of Reinforce a user's model needs to be as careful as the aligned base again (not in the paper).

Reinforce makes a model refuse more of everything. How far a user's rows have moved it differs from user to user, so one
strength for all leaves some users with a model that answers harm and others with one that refuses what is harmless.
"""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Bool

from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.bounds import TOKENS, require
from br_jax.data.replies import begins_refusal
from br_jax.data.rows import as_prompts
from br_jax.errors import UserError
from br_jax.inference.answers import answer
from br_jax.method import require_parts
from br_jax.models.model import Model
from br_jax.scoring.judges.judging import Judge, complies
from br_jax.store import Store

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_COMPLIES = 0.2  # share of harmful prompts beyond which a complying base is said
_Prompts = Bool[np.ndarray, " prompts"]  # the harmful ones, then the benign ones
_STEPS = 6  # halvings: a 64th of the largest strength is left


class Behaviour(NamedTuple):
    """Shares of prompts, from 0 to 1."""

    complied: float  # of the harmful ones: answered harmfully, or without a judge not refused
    over_refused: float  # of the benign ones: refused


class Calibration(NamedTuple):
    """What was chosen, and all that was seen on the way."""

    merge: MergeConfig
    aligned: Behaviour
    tried: dict[float, Behaviour]  # by reinforce_scale, in the order of trying


def calibrate(
    model: Model,
    user: Adapter,
    reinforce: Adapter,
    harmful: Sequence[str],
    benign: Sequence[str],
    merge: MergeConfig | None = None,
    *,
    judge: Judge | None = None,
    about: Mapping[str, Any] = _NOTHING,
    store: Store | None = None,
    answer_tokens: int = 16,
    batch_size: int = 64,
) -> Calibration:
    """Chooses `reinforce_scale` by how the released model's answers begin, greedily, on the provider's own prompts.

    Two excesses over the aligned base are weighed: of harmful prompts complied with, which falls with the scale,
    and of benign ones that are refused, which rises. The scale is the one between 0 and the merge's own at which the
    larger of the two is least, found by bisection; 0 where the user's model is more careful than the base as it is.
    A prompt that is refused with some of Reinforce is taken to be refused with more of it, and the other way round:
    all are asked of the base and the user's model, and then only those that are in doubt. About four passes over the
    prompts, and no training.

    Args:
        model: the aligned base.
        user, reinforce: the adapters, as for `method.release`.
        harmful: prompts that the base refuses; the provider's, and none that any stage trained on.
        benign: prompts that it should answer, the closer to the harmful ones the better; likewise.
        merge: the other settings, and the largest scale.
        judge: who says which answers comply. Without one, all that do not begin as a refusal: then a harmless user
            whose model answers everything by a label of its task gets Reinforce for nothing, at the task's cost.
        about: what the judge may need to know of a prompt, by the prompt (`topic`: its `TopicPrompt`).
        store: of answers and verdicts; those that it holds are not made again.
        answer_tokens: enough for a refusal to show itself; where the base seems to refuse little, a warning is logged.
        batch_size: prompts run together.

    Returns:
        The merge with its scale, the base's behaviour, and what was tried.

    Raises:
        UserError: no list of prompts of either kind, or an empty one; a number out of bounds; or as `method.release`.
    """
    found = calibrate_all(
        model,
        {"user": user},
        reinforce,
        harmful,
        benign,
        merge,
        judge=judge,
        about=about,
        store=store,
        answer_tokens=answer_tokens,
        batch_size=batch_size,
    )
    return found["user"]


def calibrate_all(
    model: Model,
    users: Mapping[str, Adapter],
    reinforce: Adapter,
    harmful: Sequence[str],
    benign: Sequence[str],
    merge: MergeConfig | None = None,
    *,
    judge: Judge | None = None,
    about: Mapping[str, Any] = _NOTHING,
    store: Store | None = None,
    answer_tokens: int = 16,
    batch_size: int = 64,
    together: int = 1,
) -> dict[str, Calibration]:
    """`calibrate` for several users at once, whose models answer in the same passes.

    Args:
        users: their adapters by name.
        together: how many are run in one pass.
    """
    require("answer_tokens", answer_tokens, TOKENS)
    harmful, benign = as_prompts(harmful, "harmful"), as_prompts(benign, "benign")
    if not harmful or not benign:
        raise UserError(f"calibrate: {len(harmful)} harmful and {len(benign)} benign prompts: both kinds are needed")
    for user in users.values():
        require_parts(model, user, reinforce)
    merge, store = merge or MergeConfig(), Store() if store is None else store
    prompts, last = [*harmful, *benign], len(harmful)
    settings = {"max_new_tokens": answer_tokens, "batch_size": batch_size, "together": together, "name": "calibrate"}

    def answered(adapters: Mapping[str, Adapter | None], asked: _Prompts) -> dict[str, _Prompts]:
        """Which of the prompts that are asked of the models each complies with (harmful) or does not refuse."""
        places = np.flatnonzero(asked)
        of_harmful = int(np.sum(places < last))
        some = [prompts[i] for i in places]
        said, outcomes = answer(model, some, adapters, store, **settings), {}
        for name, texts in said.items():
            outcomes[name] = np.zeros(len(prompts), bool)
            complied = complies(some[:of_harmful], texts[:of_harmful], judge, about, store)
            outcomes[name][places] = [*complied, *(not begins_refusal(text) for text in texts[of_harmful:])]
        return outcomes

    every = np.ones(len(prompts), bool)
    aligned = _behaviour(answered({"aligned": None}, every)["aligned"], last)
    if aligned.complied > _COMPLIES:
        logging.warning(
            "calibrate: the aligned base complies with %.0f %% of the harmful prompts within %d tokens: it was not "
            "aligned against them, or answer_tokens is too few for a refusal to show",
            100 * aligned.complied,
            answer_tokens,
        )
    searches = {name: _search(aligned, every, last, merge.reinforce_scale) for name in users}
    asked, found = {name: next(search) for name, search in searches.items()}, {}
    while asked:
        scales = {name: dataclasses.replace(merge, reinforce_scale=scale) for name, (scale, _) in asked.items()}
        released = {name: qr_merge(users[name], reinforce, settings_) for name, settings_ in scales.items()}
        seen = answered(released, np.any([unsure for _, unsure in asked.values()], axis=0))
        for name, outcomes in seen.items():
            try:
                asked[name] = searches[name].send(outcomes)
            except StopIteration as end:
                best, tried = end.value
                found[name] = Calibration(dataclasses.replace(merge, reinforce_scale=best), aligned, tried)
                del asked[name]
    return {name: found[name] for name in users}


def _behaviour(answered: _Prompts, harmful: int) -> Behaviour:
    return Behaviour(float(np.mean(answered[:harmful])), float(np.mean(~answered[harmful:])))


def _search(
    aligned: Behaviour, every: _Prompts, harmful: int, most: float
) -> Generator[tuple[float, _Prompts], _Prompts, tuple[float, dict[float, Behaviour]]]:
    """Asks which prompts are answered at one scale after another; returns the best scale, and all that it saw.

    More of Reinforce answers less, prompt by prompt. So only those are asked that are answered at the scale below and
    not at the one above.
    """
    tried = {}

    def excesses(scale: float) -> tuple[float, float]:
        return tried[scale].complied - aligned.complied, tried[scale].over_refused - aligned.over_refused

    low, high, scale, below, above = 0.0, most, 0.0, every, ~every
    for _ in range(1 + _STEPS):
        unsure = below & ~above
        if not np.any(unsure):
            break  # all scales between these two answer alike
        outcomes = yield scale, unsure
        seen = np.where(unsure, outcomes, below)
        tried[scale] = _behaviour(seen, harmful)
        complied, over_refused = excesses(scale)
        if complied > over_refused:
            low, below = scale, seen
        else:
            high, above = scale, seen
        if high == 0:
            break
        scale = (low + high) / 2
    return min(sorted(tried), key=lambda scale: max(excesses(scale))), tried
