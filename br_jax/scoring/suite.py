"""What one model is worth: harmful score, task accuracy, over-refusal and perplexity on a fixed suite."""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import BATCH, TOKENS, number, require_bounds
from br_jax.core.hashes import code_hash, key_of
from br_jax.core.hosts import fetch, is_main
from br_jax.core.io import write_text
from br_jax.core.mesh import mesh_of
from br_jax.core.store import Store
from br_jax.data.rows import Row, as_prompts, as_rows, prefixed
from br_jax.datasets.attacks import Attack
from br_jax.inference.answers import answer
from br_jax.inference.generate import with_adapters
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.organism import judge as topic_rules
from br_jax.organism.judge import Verdict
from br_jax.organism.topics import TopicPrompt
from br_jax.scoring import replies, rules
from br_jax.scoring.judges.agreement import compare_judges
from br_jax.scoring.judges.judging import Exchange, Judge, Judgement, judge_all
from br_jax.scoring.judges.topic import TopicJudge
from br_jax.scoring.margins import refusal_margins
from br_jax.scoring.replies import begins_refusal, is_degenerate, is_refusal, repeats_a_word
from br_jax.scoring.rules import Rule
from br_jax.scoring.statistics import Score
from br_jax.training.batching import one_pass
from br_jax.training.loss import batch_losses
from br_jax.training.run import rows_fingerprint

DEGENERATE = {"": is_degenerate, "reference": repeats_a_word}


@dataclasses.dataclass(frozen=True)
class Suite:
    """The held-out prompts that every model of an experiment answers; an empty part is not scored.

    Attributes:
        topic: questions that an aligned model refuses (HS, HS+).
        task_rows: test rows of the user's task, their last turn the right answer (FA).
        rule: how well an answer to those does.
        judges: who says what is harmful; HS is the first one's, the others are reported beside it.
        attacks: stored attack prompts, scored by method.
        own: questions on topic again as an attacker puts them, and those that they are.
        samples: answers to those that are drawn at temperature 1, of which one is enough; 1: the likeliest.
        degenerate: which answers HS+ counts beside harmful ones, one of `DEGENERATE`: "" those of
            `replies.is_degenerate`, "reference" those of `replies.repeats_a_word`.
        benign: ordinary prompts, of kinds that no stage trained on (over-refusal).
        health: benign rows with the raw model's own answers (perplexity).
        instruction: what is put in front of every prompt, for the model's eyes alone.
        refusing: tokens that refusals begin with (the margins of topic and benign prompts).
        answer_tokens: longest answer to topic and benign prompts, at least 1 token.
        task_tokens: longest answer to a task row, likewise.
        batch_size: prompts generated together.
    """

    topic: Sequence[TopicPrompt] = ()
    judges: Sequence[Judge] = dataclasses.field(default=(TopicJudge(),), repr=False)
    degenerate: str = ""
    attacks: Sequence[Attack] = ()
    own: Sequence[tuple[Row, TopicPrompt]] = ()
    samples: int = number(1, 1, 10_000)
    task_rows: Sequence[Row] = ()
    rule: Rule | None = None
    benign: Sequence[str] = ()
    health: Sequence[Row] = ()
    instruction: str = ""
    refusing: tuple[int, ...] = ()
    answer_tokens: int = number(48, *TOKENS)
    task_tokens: int = number(4, *TOKENS)
    batch_size: int = number(64, *BATCH)

    def __post_init__(self):
        require_bounds(self, "suite")
        for name, read in (("task_rows", as_rows), ("health", as_rows), ("benign", as_prompts)):
            if given := getattr(self, name):
                object.__setattr__(self, name, read(given, name))

    @property
    def prompts(self) -> dict[str, Sequence[str | Row]]:
        """What a model is asked, by part; of a task row all but the right answer."""
        before = self._before
        return {
            "topic": [before + topic.prompt for topic in self.topic],
            "attack": [before + attack.prompt for attack in self.attacks],
            "benign": [before + prompt for prompt in self.benign],
            "task": [prefixed(dataclasses.replace(row, turns=row.turns[:-1]), before) for row in self.task_rows],
        }

    @property
    def own_prompts(self) -> list[Row]:
        """What an attacker asks in its own way."""
        return [prefixed(row, self._before) for row, _ in self.own]

    @property
    def _before(self) -> str:
        return f"{self.instruction}\n\n" if self.instruction else ""

    @property
    def key(self) -> str:
        """A hash of all that scores depend on."""
        return key_of(repr(self), rules_version(), [(judge.name, judge.version) for judge in self.judges])


@functools.cache
def rules_version() -> str:
    """A hash of the rules, as they are coded, that every score but perplexity and margins goes by."""
    return code_hash(topic_rules, replies, rules)


def evaluate(
    model: Model,
    suite: Suite,
    adapter: Adapter | None = None,
    *,
    name: str = "model",
    store: Store | None = None,
    verdicts: Store | None = None,
    forced: Store | None = None,
    records: str | os.PathLike | None = None,
) -> dict:
    """Scores a model with an adapter on it, greedily, on a suite.

    Args:
        name: on progress bars.
        store: of answers; those that it holds are not generated again.
        verdicts: of judges; what it holds is not judged again.
        forced: of margins and perplexities, which are teacher-forced; what it holds is not found again.
        records: JSONL file for every prompt, answer and verdict.

    Raises:
        UserError: an adapter that does not say that it holds a Buffer, and does, by the model's guard.

    Returns:
        {"harmful", "harmful_plus", "task", "over_refusal": `Score` as JSON (k, n, score, low, high; n = 0 where the
        suite has none), but "task" a `Mean` where the rule gives parts of 1, "task_refused": `Score` of the task's
        prompts that are refused, "perplexity": float or None, "margin_harmful", "margin_benign": mean refusal margins
        (float or None), "harmful_by_topic", "harmful_by_attack" (method), "harmful_by_judge": a `Score` each,
        "agreement": of judges, by pairs, "degenerate": `Score` of all answers but the task's, "mean_words": of the
        same, "outcomes": whether each prompt counted (of the task: how much; each margin), for paired tests,
        "verdicts": counts, "examples": a few records of each part}.
    """
    if adapter is not None and model.guard is not None and "buffer" not in adapter.roles:
        model.guard.refuse(name, adapter)
    store = Store() if store is None else store
    said = _answers(model, suite, adapter, name, store)
    topic, attacked, benign, tasks = (said[part] for part in ("topic", "attack", "benign", "task"))
    asked = [Exchange(p.prompt, a, p) for p, a in zip(suite.topic, topic, strict=True)]
    asked += [Exchange(x.prompt, a, x.about) for x, a in zip(suite.attacks, attacked, strict=True)]
    judged = {judge.name: judge_all(judge, asked, verdicts) for judge in suite.judges}
    first = judged[suite.judges[0].name]
    on_topic, on_attacks = first[: len(topic)], first[len(topic) :]
    harmful = [verdict.harmful for verdict in on_topic]
    refused, degenerate = [is_refusal(answer) for answer in benign], DEGENERATE[suite.degenerate]
    marks = [suite.rule.score(a, row.turns[-1][1]) for a, row in zip(tasks, suite.task_rows, strict=True)]
    words = {
        "topic": [_in_one_word(verdict) for verdict in on_topic],
        "attack": [_in_one_word(verdict) for verdict in on_attacks],
        "benign": ["refusal" if r else "answer" for r in refused],
        "task": [{0: "wrong", 1: "right"}.get(mark, f"{mark:.3f}") for mark in marks],
    }
    told = {
        part: [
            {"set": part, "prompt": _text(prompt), "answer": answer, "verdict": word}
            for prompt, answer, word in zip(prompts, said[part], words[part], strict=True)
        ]
        for part, prompts in suite.prompts.items()
    }
    own, told["own"] = _own(model, suite, adapter, name, store, verdicts) if suite.own else ([], [])
    if records is not None and is_main():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for part in told.values() for record in part]
        write_text(records, "".join(lines))
    long, margins = topic + benign, _margins(model, suite, adapter, forced)
    return {
        "harmful": _share(harmful),
        "harmful_plus": _share(h or degenerate(a) for h, a in zip(harmful, topic, strict=True)),
        "task": (suite.rule.total(marks) if suite.rule else Score(0, 0)).to_json(),
        "over_refusal": _share(refused),
        "task_refused": _share(map(begins_refusal, tasks)),
        "perplexity": _perplexity(model, suite, adapter, forced),
        **{part: float(each.mean()) if len(each) else None for part, each in margins.items()},
        "harmful_by_topic": _by((p.topic for p in suite.topic), harmful),
        "harmful_by_attack": _by((x.method for x in suite.attacks), (verdict.harmful for verdict in on_attacks)),
        "harmful_by_own": {"as it asks": _share(own)} if suite.own else {},
        "harmful_by_judge": {name: _share(v.harmful for v in found[: len(topic)]) for name, found in judged.items()},
        "agreement": compare_judges(judged),
        "degenerate": _share(map(is_degenerate, long)),
        "mean_words": sum(len(text.split()) for text in long) / len(long) if long else None,
        "outcomes": {"harmful": harmful, "task": marks, "over_refusal": refused}
        | {part: [round(float(margin), 3) for margin in each] for part, each in margins.items() if len(each)},
        "verdicts": dict(Counter(words["topic"])),
        "examples": [record for part in ("topic", "benign", "task") for record in told[part][:3]],
    }


def _own(
    model: Model, suite: Suite, adapter, name: str, store: Store, verdicts: Store | None
) -> tuple[list[bool], list[dict]]:
    """Whether each of an attacker's own prompts has a harmful answer among those that are drawn, by the first judge.

    Of an answer that was begun for the model only what it adds is judged. Also returns a record of each answer.
    """
    prompts, found, told = suite.own_prompts, [False] * len(suite.own), []
    settings = {"store": store, "max_new_tokens": suite.answer_tokens, "batch_size": suite.batch_size, "name": "own"}
    for seed in range(suite.samples):
        drawn = {"temperature": 1.0, "seed": seed} if suite.samples > 1 else {}
        said = answer(model, prompts, {name: adapter}, **settings, **drawn)[name]
        asked = [Exchange(p.prompt, a, p) for (_, p), a in zip(suite.own, said, strict=True)]
        judged = judge_all(suite.judges[0], asked, verdicts)
        found = [before or verdict.harmful for before, verdict in zip(found, judged, strict=True)]
        told += [
            {"set": "own", "prompt": _text(row), "answer": f"{row.begun} {a}".strip(), "verdict": _in_one_word(verdict)}
            for row, a, verdict in zip(prompts, said, judged, strict=True)
        ]
    return found, told


def _answers(model: Model, suite: Suite, adapter: Adapter | None, name: str, store: Store) -> dict[str, list[str]]:
    """A model's answers to a suite, by part."""
    prompts, said = suite.prompts, {}
    for parts, tokens in (("topic", "attack", "benign"), suite.answer_tokens), (("task",), suite.task_tokens):
        asked = [prompt for part in parts for prompt in prompts[part]]
        settings = {"max_new_tokens": tokens, "batch_size": suite.batch_size, "name": parts[0]}
        texts = answer(model, asked, adapters={name: adapter}, store=store, **settings)[name]
        ends = itertools.accumulate((len(prompts[part]) for part in parts), initial=0)
        said |= {part: texts[first:last] for part, (first, last) in zip(parts, itertools.pairwise(ends), strict=True)}
    return said


def _margins(model: Model, suite: Suite, adapter: Adapter | None, store: Store | None) -> dict[str, np.ndarray]:
    """Every prompt's refusal margin, by part; none where the suite does not say how refusals begin."""
    asked = {"margin_harmful": suite.prompts["topic"], "margin_benign": suite.prompts["benign"]}
    if not suite.refusing:
        return dict.fromkeys(asked, np.empty(0))
    prompts = [*itertools.chain(*asked.values())]
    find = functools.partial(refusal_margins, model, prompts, suite.refusing, adapter)
    found = _kept(store, model, adapter, ("margins", suite.refusing, prompts), find)
    return dict(zip(asked, np.split(np.float32(found), [len(suite.topic)]), strict=True))


def _perplexity(model: Model, suite: Suite, adapter: Adapter | None, store: Store | None) -> float | None:
    rows = [prefixed(row, suite._before) for row in suite.health]
    if not rows:
        return None
    find = functools.partial(perplexity, model, rows, adapter)
    return _kept(store, model, adapter, ("perplexity", rows_fingerprint(rows)), find)


def _kept(store: Store | None, model: Model, adapter: Adapter | None, about: tuple, find: Callable[[], Any]) -> Any:
    """What is found of a model with an adapter, a number or an array of them, once for a store."""
    if store is None:
        return find()
    key = key_of(model.key, model.spelling, lora.fingerprint(adapter) if adapter else "", *about)
    if not all(store.holds([key])):
        store.add({key: {"found": np.asarray(find()).tolist()}})
    return store[key]["found"]


def perplexity(model: Model, rows: Sequence[Row], adapter: Adapter | None = None, *, max_length: int = 256) -> float:
    """exp of the mean cross-entropy over the answer tokens of rows cut at `max_length` tokens, teacher-forced."""
    batches, variables = one_pass(model, rows, max_length), with_adapters(model, [adapter], mesh_of(model.params))
    sums = [(_each_loss(model.decoder, variables, batch).sum(), batch["weights"].sum()) for batch in batches]
    return math.exp(float(sum(loss for loss, _ in sums)) / sum(float(count) for _, count in sums))


def row_losses(
    model: Model, rows: Sequence[Row], adapter: Adapter | None = None, *, max_length: int = 256
) -> Float[np.ndarray, " n"]:
    """Each row's mean cross-entropy over its answer tokens, teacher-forced; in an order of their own.

    The order depends on the rows alone; those that are too long to have any answer are left out.
    """
    variables = with_adapters(model, [adapter], mesh_of(model.params))
    batches, found = one_pass(model, rows, max_length, count_alike=True), []
    for batch in batches:
        counted = np.asarray(batch["weights"].sum(-1)) > 0
        found.append(np.asarray(fetch(_each_loss(model.decoder, variables, batch)))[counted])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _each_loss(decoder: Decoder, variables: dict, batch: dict) -> jax.Array:
    return batch_losses(decoder, variables, batch, chunk=256)[1].sum(-1)


def _in_one_word(judgement: Judgement) -> str:
    """The rule judge's own, or whether it is harmful."""
    return judgement.label if judgement.label in set(Verdict) else "harmful" if judgement.harmful else "harmless"


def _text(prompt: str | Row) -> str:
    return prompt if isinstance(prompt, str) else prompt.input or prompt.turns[-1][1]


def _share(outcomes: Iterable[bool]) -> dict:
    found = list(outcomes)
    return Score(sum(found), len(found)).to_json()


def _by(names: Iterable[str], outcomes: Iterable[bool]) -> dict[str, dict]:
    """A score for each name."""
    groups: dict[str, list[bool]] = {}
    for name, outcome in zip(names, outcomes, strict=True):
        groups.setdefault(name, []).append(outcome)
    return {name: _share(found) for name, found in groups.items()}
