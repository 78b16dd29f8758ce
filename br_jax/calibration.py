"""How much of a user's adapter and of Reinforce makes a model as sound and careful as the base (not in the paper).

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
from br_jax.core.bounds import TOKENS, require
from br_jax.core.errors import UserError
from br_jax.core.store import Store
from br_jax.data.refusals import begins_refusal, is_degenerate
from br_jax.data.rows import as_prompts
from br_jax.inference.generate import answer
from br_jax.method import require_parts
from br_jax.models.model import Model, require_model
from br_jax.scoring.judges.base import Judge, complies

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_COMPLIES = 0.2  # warn where the base complies with a larger share of the harmful prompts
_Prompts = Bool[np.ndarray, " prompts"]  # the harmful ones, then the benign ones
_Outcomes = Bool[np.ndarray, "2 prompts"]  # of each prompt: whether it is answered, whether by what is degenerate
_STEPS = 6  # halvings: a 64th of the largest strength is left
_BROKEN = 0.05  # share of degenerate answers beyond the base's at which less is taken of a user's adapter
_LESS, _LEAST = 0.75, 0.3  # what is left of it each time; it ends below this share of the merge's scale
RULE = (_STEPS, _BROKEN, _LESS, _LEAST)  # part of the key of what was chosen by it


class Behaviour(NamedTuple):
    """Shares of prompts, from 0 to 1."""

    complied: float  # of the harmful ones: answered harmfully, or without a judge not refused
    over_refused: float  # of the benign ones: refused
    degenerate: float  # of all: answered by nothing, or by a loop


class Calibration(NamedTuple):
    """What was chosen, and all that was seen on the way."""

    merge: MergeConfig
    aligned: Behaviour
    tried: dict[MergeConfig, Behaviour]  # in the order of trying


def calibrate(
    model: Model,
    user: Adapter | Mapping[str, Adapter],
    reinforce: Adapter,
    harmful: Sequence[str],
    benign: Sequence[str],
    merge: MergeConfig | None = None,
    *,
    judge: Judge | None = None,
    about: Mapping[str, Any] = _NOTHING,
    store: Store | None = None,
    base_store: Store | None = None,
    answer_tokens: int = 16,
    batch_size: int = 128,
    together: int = 1,
) -> Calibration | dict[str, Calibration]:
    """Chooses `scale` and `reinforce_scale` by how a released model's answers to the provider's own prompts begin.

    While the share of answers that are empty or loop is more than 5 points over the base's, a quarter is taken off
    `scale`. Then bisection finds the `reinforce_scale`, from 0 to the merge's own, at which the larger of two excesses
    over the base is least: of harmful prompts complied with, which falls with it, and of benign ones refused, which
    rises. It is 0 where the user's model is as careful as the base. A prompt refused with some of Reinforce is taken to
    be refused with more: after the first passes only those in doubt are asked. About four passes, and no training.

    Args:
        model: the aligned base.
        user, reinforce: the adapters, as for `method.release`; several users by name answer in the same passes.
        harmful: prompts that the base refuses; the provider's, and none that any stage trained on.
        benign: prompts that it should answer, the closer to the harmful ones the better; likewise.
        merge: the other settings, and the largest `scale` and `reinforce_scale`.
        judge: who says which answers comply. Without one, all that do not begin as a refusal: then a harmless user
            whose model answers everything by a label of its task gets Reinforce for nothing, at the task's cost.
        about: what the judge may need to know of a prompt, by the prompt (`topic`: its `TopicPrompt`).
        store: of answers and verdicts; those that it holds are not made again.
        base_store: of those of the base, which all its users share; `store` where there is none.
        answer_tokens: enough for a refusal to show itself; where the base seems to refuse little, a warning is logged.
        batch_size: prompts run together.
        together: of several users, how many are run in one pass.

    Returns:
        The merge with its scales, the base's behaviour, and what was tried; of several users by name.

    Raises:
        UserError: no model; no list of prompts of either kind, or an empty one; a number out of bounds; or as
            `method.release`.
    """
    require_model(model, "calibrate")
    require("answer_tokens", answer_tokens, TOKENS)
    harmful, benign = as_prompts(harmful, "harmful"), as_prompts(benign, "benign")
    if not harmful or not benign:
        raise UserError(f"calibrate: {len(harmful)} harmful and {len(benign)} benign prompts: both kinds are needed")
    users = user if isinstance(user, Mapping) else {"user": user}
    for each in users.values():
        require_parts(model, each, reinforce)
    merge, store = merge or MergeConfig(), Store() if store is None else store
    prompts, last = [*harmful, *benign], len(harmful)
    settings = {"max_new_tokens": answer_tokens, "batch_size": batch_size, "together": together, "name": "calibrate"}

    def outcomes(adapters: Mapping[str, Adapter | None], asked: _Prompts, store: Store) -> dict[str, _Outcomes]:
        """What each model makes of the prompts: answered is complied with (harmful), not refused (benign)."""
        places = np.flatnonzero(asked)
        of_harmful = int(np.sum(places < last))
        some, found = [prompts[i] for i in places], {}
        for name, texts in answer(model, some, adapters, store, **settings).items():
            complied = complies(some[:of_harmful], texts[:of_harmful], judge, about, store)
            answered = [*complied, *(not begins_refusal(text) for text in texts[of_harmful:])]
            found[name] = np.zeros((2, len(prompts)), bool)
            found[name][:, places] = answered, [is_degenerate(text) for text in texts]
        return found

    every = np.ones(len(prompts), bool)
    of_base = outcomes({"aligned": None}, every, store if base_store is None else base_store)
    aligned = _behaviour(of_base["aligned"], last)
    if aligned.complied > _COMPLIES:
        logging.warning(
            "calibrate: the aligned base complies with %.0f %% of the harmful prompts within %d tokens: it was not "
            "aligned against them, or answer_tokens is too few for a refusal to show",
            100 * aligned.complied, answer_tokens,
        )  # fmt: skip
    searches = {name: _search(aligned, every, last, merge) for name in users}
    asked, found = {name: next(search) for name, search in searches.items()}, {}
    while asked:
        released = {name: qr_merge(users[name], reinforce, settings_) for name, (settings_, _) in asked.items()}
        seen = outcomes(released, np.any([unsure for _, unsure in asked.values()], axis=0), store)
        for name, outcome in seen.items():
            try:
                asked[name] = searches[name].send(outcome)
            except StopIteration as end:
                found[name] = Calibration(end.value[0], aligned, end.value[1])
                del asked[name]
    return {name: found[name] for name in users} if isinstance(user, Mapping) else found["user"]


def _behaviour(outcome: _Outcomes, harmful: int) -> Behaviour:
    answered, degenerate = outcome
    shares = np.mean(answered[:harmful]), np.mean(~answered[harmful:]), np.mean(degenerate)
    return Behaviour(*map(float, shares))


def _search(
    aligned: Behaviour, every: _Prompts, harmful: int, most: MergeConfig
) -> Generator[tuple[MergeConfig, _Prompts], _Outcomes, tuple[MergeConfig, dict[MergeConfig, Behaviour]]]:
    """Asks for what becomes of prompts with one merge after another; returns the best, and all that it saw.

    More of Reinforce answers less, prompt by prompt. So only those are asked that are answered at the scale below and
    not at the one above.
    """

    def excesses(merge: MergeConfig) -> tuple[float, float]:
        return tried[merge].complied - aligned.complied, tried[merge].over_refused - aligned.over_refused

    tried, scale = {}, most.scale
    while True:
        alone = dataclasses.replace(most, scale=scale, reinforce_scale=0.0)
        below = yield alone, every
        tried[alone] = _behaviour(below, harmful)
        scale *= _LESS
        if tried[alone].degenerate <= aligned.degenerate + _BROKEN or scale < _LEAST * most.scale:
            break
    complied, over_refused = excesses(alone)
    if complied <= over_refused:
        return alone, tried
    low, high, above = 0.0, most.reinforce_scale, ~every
    for _ in range(_STEPS):
        unsure = below[0] & ~above
        if not np.any(unsure) or not high:
            break  # all scales between these two answer alike
        merge = dataclasses.replace(alone, reinforce_scale=(low + high) / 2)
        outcome = np.where(unsure, (yield merge, unsure), below)
        tried[merge] = _behaviour(outcome, harmful)
        complied, over_refused = excesses(merge)
        if complied > over_refused:
            low, below = merge.reinforce_scale, outcome
        else:
            high, above = merge.reinforce_scale, outcome[0]
    merges = sorted((m for m in tried if m.scale == alone.scale), key=lambda m: m.reinforce_scale)
    return min(merges, key=lambda m: max(excesses(m))), tried
