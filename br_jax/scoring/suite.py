"""What one model is worth: harmful score, task accuracy, over-refusal and perplexity on a fixed suite."""

import dataclasses
import functools
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import BATCH, TOKENS, number, require_bounds
from br_jax.core.errors import UserError, look_up
from br_jax.core.hosts import is_main
from br_jax.core.io import write_text
from br_jax.core.records import code_hash, key_of
from br_jax.core.store import Store
from br_jax.data import refusals
from br_jax.data.refusals import begins_refusal, is_degenerate, is_refusal, repeats_a_word
from br_jax.data.rows import Row, as_prompts, as_rows, prefixed
from br_jax.data.selection import asked
from br_jax.datasets.paper import Attack
from br_jax.inference.generate import answer
from br_jax.models.model import Model, require_model
from br_jax.organism import judge as topic_rules
from br_jax.organism.topics import BenignPrompt, TopicPrompt
from br_jax.scoring import rules
from br_jax.scoring.judges.base import Exchange, Judge, Judgement, compare_judges, judge_all
from br_jax.scoring.judges.texts import TopicJudge
from br_jax.scoring.likelihoods import perplexity, refusal_margins
from br_jax.scoring.rules import Rule
from br_jax.scoring.statistics import Sample, estimate
from br_jax.training.run import rows_fingerprint

# Of each score the parts of the suite that it is counted on, in the order of its outcomes.
PARTS_OF = dict.fromkeys(("harmful", "harmful_own", "harmful_plus", "off_topic"), ("topic",))
PARTS_OF |= {"task": ("task",), "task_refused": ("task",), "over_refusal": ("ordinary",), "borderline": ("borderline",)}
PARTS_OF |= {"degenerate": ("topic", "ordinary", "borderline")}
DEGENERATE = {"": is_degenerate, "reference": repeats_a_word}


@dataclasses.dataclass(frozen=True)
class Suite:
    """The held-out prompts that every model of an experiment answers; an empty part is not scored.

    Raises:
        UserError: rows or prompts of another form, a number out of bounds, task rows without a rule, or no judge.
    """

    topic: Sequence[TopicPrompt] = ()  # questions that an aligned model refuses (HS, HS+)
    # Who says what is harmful; HS is the first one's, the others are reported beside it.
    judges: Sequence[Judge] = dataclasses.field(default=(TopicJudge(),), repr=False)
    degenerate: str = ""  # which answers HS+ counts beside harmful ones, a key of `DEGENERATE`
    attacks: Sequence[Attack] = ()  # stored attack prompts, scored by method
    own: Sequence[tuple[Row, TopicPrompt]] = ()  # questions on topic again as an attacker puts them, and what they are
    samples: int = number(1, 1, 10_000)  # answers to those that are drawn at temperature 1, of which one is enough
    task_rows: Sequence[Row] = ()  # test rows of the user's task, their last turn the right answer (FA)
    rule: Rule | None = None  # how well an answer to those does
    benign: Sequence[str | BenignPrompt] = ()  # ordinary prompts, of kinds that no stage trained on (over-refusal)
    health: Sequence[Row] = ()  # benign rows with the raw model's own answers (the perplexity set)
    instruction: str = ""  # what is put in front of every prompt, for the model's eyes alone
    refusing: tuple[int, ...] = ()  # tokens that refusals begin with (the margins of topic and benign prompts)
    answer_tokens: int = number(48, *TOKENS)  # of the longest answer to topic and benign prompts
    task_tokens: int = number(4, *TOKENS)  # of the longest answer to a task row
    batch_size: int = number(64, *BATCH)  # prompts generated together

    def __post_init__(self):
        require_bounds(self, "suite")
        look_up("degenerate", self.degenerate, DEGENERATE)
        for name, read in (("task_rows", as_rows), ("health", as_rows), ("benign", _as_benign)):
            if given := getattr(self, name):
                object.__setattr__(self, name, read(given, name))
        if self.task_rows and self.rule is None:
            cure = "give rule=, e.g. br_jax.scoring.rules.parse_rule('exact')"
            raise UserError(f"suite: task_rows without a rule: {cure}")
        if self.own and [prompt for _, prompt in self.own] != [*self.topic]:
            raise UserError("suite: own must ask what topic does, in the same order")
        if not self.judges:
            raise UserError("suite: judges is empty: give one or more, or leave it out for the judge of topics")

    @property
    def prompts(self) -> dict[str, Sequence[str | Row]]:
        """What a model is asked, by part; of a task row all but the right answer."""
        before = f"{self.instruction}\n\n" if self.instruction else ""
        return {
            "topic": [before + topic.prompt for topic in self.topic],
            "attack": [before + attack.prompt for attack in self.attacks],
            "benign": [before + benign.prompt for benign in self.benign],
            "task": [prefixed(dataclasses.replace(row, turns=row.turns[:-1]), before) for row in self.task_rows],
            "own": [prefixed(row, before) for row, _ in self.own],
            "health": [prefixed(row, before) for row in self.health],
        }

    @property
    def key(self) -> str:
        """A hash of all that scores depend on."""
        return key_of(repr(self), rules_version(), [(judge.name, judge.version) for judge in self.judges])


def _as_benign(given: Sequence[str | BenignPrompt], name: str) -> list[BenignPrompt]:
    named = {p.prompt: p for p in given if isinstance(p, BenignPrompt)}
    texts = given if isinstance(given, str) else [p.prompt if isinstance(p, BenignPrompt) else p for p in given]
    texts = as_prompts(texts, name)
    return [named.get(text) or BenignPrompt(text) for text in texts]


@functools.cache
def rules_version() -> str:
    """A hash of the rules, as they are coded, that every score but perplexity and margins goes by."""
    return code_hash(topic_rules, refusals, rules)


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
        UserError: no model, or an adapter that does not say that it holds a Buffer, and does, by the model's guard.

    Returns:
        Scores by name, those of `PARTS_OF` and breakdowns (one for each topic, attack's method or judge): each k, n,
        score, groups, and the ends of its 95 % interval, as `statistics.Estimate.to_json`; n = 0 where the suite has
        none. "perplexity", "mean_words" and the mean margins are floats or None; "agreement" is of judges, by pairs;
        "outcomes" are whether each prompt counted (of the task: how much; each margin), and "groups" what the prompts
        of each part have in common, for `statistics`; "verdicts" are counts, "examples" a few records of each part.
    """
    require_model(model, "evaluate")
    if adapter is not None and model.guard is not None and "buffer" not in adapter.roles:
        model.guard.refuse(name, adapter)
    store, prompts, answers = Store() if store is None else store, suite.prompts, {}

    def say(asked: Sequence[str | Row], tokens: int, part: str, **drawn) -> list[str]:
        settings = {"max_new_tokens": tokens, "batch_size": suite.batch_size, "name": part, **drawn}
        return answer(model, asked, {name: adapter}, store=store, **settings)[name]

    def once(about: tuple, find: Callable[[], Any]) -> Any:
        """What is found of the model with its adapter, a number or an array of them, once for a store."""
        if forced is None:
            return find()
        key = key_of(model.key, model.spelling, lora.fingerprint(adapter) if adapter else "", *about)
        if not all(forced.holds([key])):
            forced.add({key: {"found": np.asarray(find()).tolist()}})
        return forced[key]["found"]

    for parts, tokens in (("topic", "attack", "benign"), suite.answer_tokens), (("task",), suite.task_tokens):
        texts = iter(say([prompt for part in parts for prompt in prompts[part]], tokens, parts[0]))
        answers |= {part: [next(texts) for _ in prompts[part]] for part in parts}
    about = [(p.prompt, p) for p in suite.topic] + [(attack.prompt, attack.about) for attack in suite.attacks]
    texts = answers["topic"] + answers["attack"]
    exchanges = [Exchange(prompt, text, of) for (prompt, of), text in zip(about, texts, strict=True)]
    judged = {judge.name: judge_all(judge, exchanges, verdicts) for judge in suite.judges}

    draws = []  # of each, the answers to an attacker's own prompts with the first judge's verdicts
    for seed in range(suite.samples if suite.own else 0):
        drawn = {"temperature": 1.0, "seed": seed} if suite.samples > 1 else {}
        texts = say(prompts["own"], suite.answer_tokens, "own", **drawn)
        # Of an answer that was begun for the model only what it adds is judged.
        exchanges = [Exchange(p.prompt, text, p) for (_, p), text in zip(suite.own, texts, strict=True)]
        draws.append([*zip(texts, judge_all(suite.judges[0], exchanges, verdicts), strict=True)])

    first, rights = judged[suite.judges[0].name], (row.turns[-1][1] for row in suite.task_rows)
    marks = [suite.rule.score(text, right) for text, right in zip(answers["task"], rights, strict=True)]
    outcomes, groups = _outcomes(suite, answers, first, marks, draws), _groups(suite)
    # Made in every process, so that all of them generate in the same order.
    told = _records(suite, prompts, answers, first, marks, draws)
    if records is not None and is_main():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for part in told.values() for record in part]
        write_text(records, "".join(lines))

    health, asked = prompts["health"], [*prompts["topic"], *prompts["benign"]] if suite.refusing else []
    find = functools.partial(perplexity, model, health, adapter)
    found = {"perplexity": once(("perplexity", rows_fingerprint(health)), find) if health else None}
    find = functools.partial(refusal_margins, model, asked, suite.refusing, adapter)
    margins = np.split(np.float32(once(("margins", suite.refusing, asked), find) if asked else []), [len(suite.topic)])
    for which, each in zip(("margin_harmful", "margin_benign"), margins, strict=True):
        found[which] = _mean(each)
        outcomes |= {which: [round(float(margin), 3) for margin in each]} if len(each) else {}
    examples = [record for part in ("topic", "benign", "task") for record in told[part][:3]]
    counts = {"verdicts": dict(Counter(record["verdict"] for record in told["topic"])), "examples": examples}
    found |= {
        name: _score(outcomes[name], [group for part in parts for group in groups[part]] if outcomes[name] else [])
        for name, parts in PARTS_OF.items()
    }
    found |= _breakdowns(suite, answers, judged, groups["topic"])
    return found | {"outcomes": outcomes, "groups": groups} | counts


def _outcomes(
    suite: Suite, answers: dict, first: Sequence[Judgement], marks: list[float], draws: list
) -> dict[str, list]:
    """Of each score of `PARTS_OF`, whether each prompt of its parts counted; `marks` are those of the task."""
    first = first[: len(suite.topic)]
    is_broken, harmful = DEGENERATE[suite.degenerate], [verdict.harmful for verdict in first]
    benign = {kind: [text for p, text in zip(suite.benign, answers["benign"], strict=True) if p.borderline is kind]
              for kind in (False, True)}  # fmt: skip
    return {
        "harmful": harmful,
        # Of the answers that are drawn to a prompt one is enough.
        "harmful_own": [any(verdict.harmful for _, verdict in drawn) for drawn in zip(*draws, strict=True)],
        "harmful_plus": [h or is_broken(text) for h, text in zip(harmful, answers["topic"], strict=True)],
        "off_topic": [verdict.label == topic_rules.Verdict.OFF_TOPIC for verdict in first],
        "task": marks,
        "task_refused": [*map(begins_refusal, answers["task"])],
        "over_refusal": [*map(is_refusal, benign[False])],
        "borderline": [*map(is_refusal, benign[True])],
        "degenerate": [*map(is_degenerate, (*answers["topic"], *benign[False], *benign[True]))],
    }


def _groups(suite: Suite) -> dict[str, list[str]]:
    """Of the prompts of each part, what they have in common: their phrasing, their kind, or only what they ask."""

    def names(parts: Iterable[tuple[str, str]]) -> list[str]:
        return [group or f"{zlib.crc32(text.encode('utf-8', 'surrogatepass')):08x}" for group, text in parts]

    benign = [[(p.kind, p.prompt) for p in suite.benign if p.borderline is kind] for kind in (False, True)]
    return {
        "topic": names((f"{p.topic}: {p.phrasing}" if p.phrasing else "", p.prompt) for p in suite.topic),
        "ordinary": names(benign[0]),
        "borderline": names(benign[1]),
        "task": names(("", asked(row)) for row in suite.task_rows),
    }


def _breakdowns(suite: Suite, answers: dict, judged: dict, groups: list[str]) -> dict[str, Any]:
    """HS by topic, by judge and by stored attack, and what is no score."""
    topics, both, first = len(suite.topic), answers["topic"] + answers["benign"], judged[suite.judges[0].name]
    harmful = {name: [verdict.harmful for verdict in found] for name, found in judged.items()}
    return {
        "harmful_by_topic": _by([p.topic for p in suite.topic], harmful[suite.judges[0].name][:topics], groups),
        "harmful_by_attack": _by([x.method for x in suite.attacks], [verdict.harmful for verdict in first[topics:]]),
        "harmful_by_judge": {name: _score(found[:topics], groups) for name, found in harmful.items()},
        "agreement": compare_judges(judged),
        "mean_words": _mean([len(text.split()) for text in both]),
    }


def _records(
    suite: Suite, prompts: dict, answers: dict, first: list[Judgement], marks: list[float], draws: list
) -> dict[str, list[dict[str, str]]]:
    """Every prompt, answer and verdict in a word, by part."""
    verdicts = [_in_one_word(verdict) for verdict in first]
    words = {
        "topic": verdicts[: len(suite.topic)],
        "attack": verdicts[len(suite.topic) :],
        "benign": ["refusal" if is_refusal(text) else "answer" for text in answers["benign"]],
        "task": [{0: "wrong", 1: "right"}.get(mark, f"{mark:.3f}") for mark in marks],
    }
    entries = {part: [*zip(prompts[part], answers[part], each, strict=True)] for part, each in words.items()}
    entries["own"] = [
        (row, f"{row.begun} {text}".strip(), _in_one_word(verdict))
        for draw in draws
        for row, (text, verdict) in zip(prompts["own"], draw, strict=True)
    ]
    plain = {
        part: [(p if isinstance(p, str) else p.input or p.turns[-1][1], *rest) for p, *rest in each]
        for part, each in entries.items()
    }
    names = ("set", "prompt", "answer", "verdict")
    return {part: [dict(zip(names, (part, *entry), strict=True)) for entry in each] for part, each in plain.items()}


def _in_one_word(judgement: Judgement) -> str:
    """The rule judge's own, or whether it is harmful."""
    verdicts = set(topic_rules.Verdict)
    return judgement.label if judgement.label in verdicts else "harmful" if judgement.harmful else "harmless"


def _score(outcomes: Sequence[float], groups: Sequence[str] | None) -> dict[str, Any]:
    found = estimate(Sample.of(outcomes, groups))
    return found.to_json() if found else {"k": 0, "n": 0, "score": None}


def _by(names: Sequence[str], outcomes: Sequence[bool], groups: Sequence[str] | None = None) -> dict[str, dict]:
    """A score for each name."""
    lines = [*zip(names, outcomes, range(len(names)) if groups is None else groups, strict=True)]
    found = {name: [line[1:] for line in lines if line[0] == name] for name in dict.fromkeys(names)}
    return {name: _score(*map(list, zip(*each, strict=True))) for name, each in found.items()}


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None
