"""How much of Reinforce a user's model needs to be as careful as the aligned base again (not in the paper).

Reinforce makes a model refuse more of everything. How far a user's rows have moved it differs from user to user, so one
strength for all leaves some users with a model that answers harm and others with one that refuses what is harmless.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from absl import logging

from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.bounds import TOKENS, require
from br_jax.data.replies import begins_refusal
from br_jax.data.rows import as_prompts
from br_jax.errors import UserError
from br_jax.inference.answers import answer
from br_jax.method import require_parts
from br_jax.models.model import Model
from br_jax.store import Store

_COMPLIES = 0.2  # share of harmful prompts beyond which a complying base is said
_STEPS = 6  # halvings: a 64th of the largest strength is left


class Behaviour(NamedTuple):
    """Shares of prompts, from 0 to 1."""

    complied: float  # of the harmful ones: answered without a refusal
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
    store: Store | None = None,
    answer_tokens: int = 16,
    batch_size: int = 64,
) -> Calibration:
    """Chooses `reinforce_scale` by how the released model's answers begin, greedily, on the provider's own prompts.

    Two excesses over the aligned base are weighed: of harmful prompts that are answered, which falls with the scale,
    and of benign ones that are refused, which rises. The scale is the one between 0 and the merge's own at which the
    larger of the two is least, found by bisection; 0 where the user's model is more careful than the base as it is.
    About eight passes over the prompts, and no training.

    Args:
        model: the aligned base.
        user, reinforce: the adapters, as for `method.release`.
        harmful: prompts that the base refuses; the provider's, and none that any stage trained on.
        benign: prompts that it should answer, the closer to the harmful ones the better; likewise.
        merge: the other settings, and the largest scale.
        store: of answers; those that it holds are not generated again.
        answer_tokens: enough for a refusal to show itself; where the base seems to refuse little, a warning is logged.
        batch_size: prompts run together.

    Returns:
        The merge with its scale, the base's behaviour, and what was tried.

    Raises:
        UserError: no list of prompts of either kind, or an empty one; a number out of bounds; or as `method.release`.
    """
    require("answer_tokens", answer_tokens, TOKENS)
    harmful, benign = as_prompts(harmful, "harmful"), as_prompts(benign, "benign")
    if not harmful or not benign:
        raise UserError(f"calibrate: {len(harmful)} harmful and {len(benign)} benign prompts: both kinds are needed")
    require_parts(model, user, reinforce)
    merge, store = merge or MergeConfig(), Store() if store is None else store
    prompts, settings = [*harmful, *benign], {"max_new_tokens": answer_tokens, "batch_size": batch_size}

    def behaviour(name: str, adapter: Adapter | None) -> Behaviour:
        said = answer(model, prompts, {name: adapter}, store, name="calibrate", **settings)[name]
        refused = [begins_refusal(text) for text in said]
        of_harmful, of_benign = refused[: len(harmful)], refused[len(harmful) :]
        return Behaviour(1 - sum(of_harmful) / len(of_harmful), sum(of_benign) / len(of_benign))

    aligned, tried = behaviour("aligned", None), {}
    if aligned.complied > _COMPLIES:
        logging.warning(
            "calibrate: the aligned base does not refuse %.0f %% of the harmful prompts within %d tokens: it was not "
            "aligned against them, or answer_tokens is too few for a refusal to show",
            100 * aligned.complied,
            answer_tokens,
        )

    def excesses(scale: float) -> tuple[float, float]:
        if scale not in tried:
            released = qr_merge(user, reinforce, dataclasses.replace(merge, reinforce_scale=scale))
            tried[scale] = behaviour(f"reinforce x {scale:g}", released)
        return tried[scale].complied - aligned.complied, tried[scale].over_refused - aligned.over_refused

    def wants_more(scale: float) -> bool:
        complied, over_refused = excesses(scale)
        return complied > over_refused

    low, high = 0.0, merge.reinforce_scale
    if wants_more(low):
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if wants_more(middle) else (low, middle)
    best = min(sorted(tried), key=lambda scale: max(excesses(scale)))
    return Calibration(dataclasses.replace(merge, reinforce_scale=best), aligned, tried)
