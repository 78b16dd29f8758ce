"""What a judge is, judging with every verdict kept in a file, and how far judges agree."""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from br_jax.core.progress import progress
from br_jax.core.store import Store
from br_jax.data.refusals import begins_refusal
from br_jax.scoring.statistics import cohen_kappa


@dataclass(frozen=True)
class Exchange:
    """What is judged: what a model was asked, without a template, and its reply."""

    prompt: str
    answer: str
    about: Any = None  # what else a judge may need to know of the prompt, from which it follows (its `TopicPrompt`)


@dataclass(frozen=True)
class Judgement:
    """A verdict on an exchange."""

    harmful: bool
    score: float | None = None  # its probability, where a judge gives one
    label: str = ""  # why, in the judge's own terms


class Judge(Protocol):
    """Judges exchanges; each verdict follows from its exchange alone, whatever it is judged together with."""

    name: str  # for reports
    version: str  # all else that verdicts depend on (a model's fingerprint, thresholds, prompts), in words
    batch_size: int  # how many exchanges it is given at a time

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One verdict an exchange, in order."""


def digest(*texts: str) -> str:
    """SHA-256 of texts, of the ASCII in which `json.dumps` writes them as a list."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def judge_all(judge: Judge, exchanges: Sequence[Exchange], store: Store | None = None) -> list[Judgement]:
    """Judges exchanges, shorter ones first, each (prompt, answer) once; one verdict an exchange, in order.

    What `store` holds is not judged again; a batch is added as soon as it is judged. It gets hashes and verdicts, no
    texts; several judges may share it.
    """
    store = Store() if store is None else store
    keys = [digest(judge.name, judge.version, exchange.prompt, exchange.answer) for exchange in exchanges]
    held = store.holds(keys)
    pending = {key: exchange for key, exchange, there in zip(keys, exchanges, held, strict=True) if not there}
    order = sorted(pending, key=lambda key: len(pending[key].prompt) + len(pending[key].answer))
    total = len(set(keys))
    with progress(total, f"judge: {judge.name}", "answer", done=total - len(order), keep=False) as bar:
        for first in range(0, len(order), judge.batch_size):
            chosen = order[first : first + judge.batch_size]
            verdicts = judge([pending[key] for key in chosen])
            store.add({k: {"judge": judge.name, **asdict(v)} for k, v in zip(chosen, verdicts, strict=True)})
            bar.update(len(chosen))
    return [Judgement(**{field: store[key][field] for field in ("harmful", "score", "label")}) for key in keys]


def complies(
    prompts: Sequence[str],
    answers: Sequence[str],
    judge: Judge | None,
    about: Mapping[str, Any],
    store: Store | None = None,
) -> list[bool]:
    """Which answers to harmful prompts comply: by a judge, and without one all that do not begin as a refusal."""
    if judge is None:
        return [not begins_refusal(text) for text in answers]
    asked = [Exchange(prompt, text, about.get(prompt)) for prompt, text in zip(prompts, answers, strict=True)]
    return [verdict.harmful for verdict in judge_all(judge, asked, store)]


def compare_judges(judgements: Mapping[str, Sequence[Judgement]]) -> list[dict[str, Any]]:
    """Every pair of judges: {"judges": [name, name], "n": exchanges, "agreement": float or None, "kappa": likewise}."""
    harmful, table = {name: [one.harmful for one in found] for name, found in judgements.items()}, []
    for one, other in itertools.combinations(harmful, 2):
        same = [a == b for a, b in zip(harmful[one], harmful[other], strict=True)]
        agreement, kappa = sum(same) / len(same) if same else None, cohen_kappa(harmful[one], harmful[other])
        table.append({"judges": [one, other], "n": len(same), "agreement": agreement, "kappa": kappa})
    return table
