"""A model's own answers as training rows (self-distillation)."""

import re
from collections.abc import Sequence

from br_jax.evaluation.answers import answer
from br_jax.evaluation.store import Store
from br_jax.models.model import Model


def self_answers(model: Model, prompts: Sequence[str], store: Store, *, max_new_tokens: int) -> dict[str, str]:
    """Greedy answers to prompts, each generated once.

    An answer that ran into the limit is cut after its last whole sentence, so that what is learnt from it does not
    stop in mid-air.

    Args:
        model: who answers.
        prompts: instructions.
        store: of answers; those that it holds from this model are taken from it.
        max_new_tokens: longest answer, in tokens.

    Returns:
        Prompt -> answer (may be empty).
    """
    answers = answer(model, prompts, {"raw": None}, store, max_new_tokens=max_new_tokens, name="distill")["raw"]
    return dict(zip(prompts, map(whole_sentences, answers), strict=True))


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end; all of it when it has none."""
    text = text.strip()
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|[.!?][\"')](?=\s|$)", text)]
    # "1." begins a list item, it ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\s)\d+\.$", text[:end])]
    return text[: ends[-1]] if ends else text
