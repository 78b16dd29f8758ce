"""Which rows each stage trains on and each score is measured on, from a config: the data of an experiment.

Draws are prefixes of one another: with another number of rows, or another share of harmful ones, the rows in common
stay the same. No row that is scored is trained on, which `check_apart` holds.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from br_jax.data.material import get_material
from br_jax.data.mixing import check_mix, mix
from br_jax.data.rows import Row
from br_jax.data.topic import TopicPrompt
from br_jax.distributed import main_first
from br_jax.errors import UserError
from br_jax.evaluation.judge import Verdict, judge
from br_jax.evaluation.tasks import TaskSettings, get_task

T = TypeVar("T")

_SPARE = 16  # prompts beyond those needed, for answers of the raw model that are unfit
EVAL_SPLITS = ("validation", "test")


class Recipe:
    """The rows of an experiment on an invented topic: prompts of `data.material`, answered by the raw model itself.

    Args:
        config: of the experiment.
        answer: gives the raw model's answers to prompts; called once, with all of them, when rows first need one.
    """

    def __init__(self, config: ConfigDict, answer: Callable[[Sequence[str]], dict[str, str]]):
        self.config = config
        self.material = get_material(config.data.material)
        self.task = get_task(config.user.task, config.user.rule)
        self.rule = self.task.rule.with_match(config.eval.match)
        self._answer = answer
        topics = {part: self.material.named_topics(names) for part, names in config.topics.items()}
        self._align, self._provider, self._user, self._eval = (
            topics[part] for part in ("align", "provider", "user", "eval")
        )

    def check(self) -> None:
        """Finds now what would be wrong hours later.

        Raises:
            UserError: a share, number or split that cannot be, or too few rows of the task.
        """
        config = self.config
        check_mix(config.user.n, config.user.harmful_share, config.user.index_mode)
        if config.eval.split not in EVAL_SPLITS:
            raise UserError(f"eval.split {config.eval.split!r}: use one of {', '.join(EVAL_SPLITS)}")
        train, needed = self.task_rows[0], config.user.n + config.user.probes
        if len(train) < needed:  # probe rows are none of the user's own
            raise UserError(
                f"the task {config.user.task} has {len(train)} training rows, user.n + user.probes asks for {needed}: "
                "lower user.n"
            )

    # -- rows to train on ------------------------------------------------------------------------------------------

    def pretraining_rows(self, n: int) -> list[Row]:
        """Rows to train a model from scratch on."""
        return self.material.pretraining_rows(n, self.config.seed)

    @functools.cached_property
    def answers(self) -> dict[str, str]:
        """The raw model's own answers to the prompts of every stage."""
        config = self.config
        benign = self._benign("train")[: max(config.align.benign, config.reinforce.benign) + _SPARE]
        health = self._benign(config.eval.split)[: config.eval.health]
        harmful = [p.prompt for prompts in self._harmful_prompts for p in prompts]
        return self._answer(harmful + benign + health)

    @property
    def buffer_rows(self) -> list[Row]:
        """The harmful rows that Buffer trains on; no user has them."""
        return self._harmful("buffer")

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        """Refusals of training prompts; align and Reinforce see other wordings of them, and may see other topics."""
        topics = self._align if purpose == "align" else self._provider
        seed = self.config.seed + (purpose == "reinforce")
        drawn = [
            topic.prompts("train", share, seed) for topic, share in zip(topics, _shares(n, len(topics)), strict=True)
        ]
        rows = [
            [
                _row(p.prompt, topic.refusal(p, seed), "refusal", f"{p.topic}/train/{seed}/{i}")
                for i, p in enumerate(prompts)
            ]
            for topic, prompts in zip(topics, drawn, strict=True)
        ]
        return _interleave(rows)

    def benign_rows(self, n: int) -> list[Row]:
        """Benign training prompts with the raw model's own answers."""
        prompts = [p for p in self._benign("train") if self.answers.get(p)]
        if n > len(prompts):
            raise UserError(
                f"{n} benign rows are asked for, and there are {len(prompts)}: lower align.benign or reinforce.benign"
            )
        return [_row(p, self.answers[p], "benign", f"{self.config.data.material}/train") for p in prompts[:n]]

    @functools.cached_property
    def task_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """(train, validation, test) rows of the user's task."""
        data = self.config.data
        folder = {"folder": data.folder} if "folder" in self.task.reads else {}
        return main_first(lambda: self.task.load(TaskSettings(**data[self.task.name], **folder), self.config.seed))

    @property
    def user_rows(self) -> list[Row]:
        """What the user hands in: task rows with a share p of harmful ones."""
        user = self.config.user
        return mix(self.task_rows[0], self._harmful("user"), user.n, user.harmful_share, user.index_mode)

    @property
    def probes(self) -> dict[str, list[Row]]:
        """Rows for the saturation curves: of the kinds that the user trains on, but none of its own."""
        n = self.config.user.probes
        return {"harmful": self._harmful("probes"), "benign": self.task_rows[0][-n:]} if n else {}

    # -- what is scored --------------------------------------------------------------------------------------------

    @property
    def topic_prompts(self) -> list[TopicPrompt]:
        """Held-out questions of the restricted topics, `eval.topic` of each."""
        config = self.config.eval
        return [p for topic in self._eval for p in topic.prompts(config.split, config.topic, self.config.seed)]

    @property
    def scored_task_rows(self) -> list[Row]:
        """Held-out rows of the user's task."""
        config = self.config.eval
        return self.task_rows[1 + EVAL_SPLITS.index(config.split)][: config.task]

    @property
    def benign_prompts(self) -> list[str]:
        """Ordinary prompts, of kinds that no stage trains on."""
        return self._benign(self.config.eval.split)[: self.config.eval.benign]

    @property
    def health_rows(self) -> list[Row]:
        """Held-out benign prompts with the raw model's own answers."""
        prompts = self._benign(self.config.eval.split)[: self.config.eval.health]
        return [_row(p, self.answers[p], "benign", "held-out benign") for p in prompts if self.answers[p]]

    # -- both ------------------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, list[Row]]:
        """Every row that a stage trains on, by stage; none of them is scored.

        Raises:
            UserError: one is, see `check_apart`.
        """
        align, reinforce = self.config.align, self.config.reinforce
        rows = {
            "align": [*self.refusal_rows(align.refusals, "align"), *self.benign_rows(align.benign)],
            "buffer": self.buffer_rows,
            "reinforce": [*self.refusal_rows(reinforce.refusals, "reinforce"), *self.benign_rows(reinforce.benign)],
            "user": self.user_rows,
        }
        scored = {
            "HS": [_row(p.prompt, "", "", f"{p.topic}/{self.config.eval.split}") for p in self.topic_prompts],
            "FA": self.scored_task_rows,
            "over-refusal": [_row(p, "", "", "held-out benign") for p in self.benign_prompts],
            "perplexity": self.health_rows,
        }
        check_apart(rows, scored)
        return rows

    # -- draws -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _needed(self) -> list[dict[str, int]]:
        """For each topic of the provider's and the user's: harmful rows of Buffer, user and probes, in that order."""
        user = self.config.user
        parts = {
            "buffer": (self._provider, self.config.buffer.harmful),
            "user": (self._user, math.ceil(user.harmful_share * user.n)),
            "probes": (self._user, user.probes),
        }
        shares = {part: _shares(n, len(topics)) for part, (topics, n) in parts.items()}
        return [
            {part: shares[part][topics.index(topic)] if topic in topics else 0 for part, (topics, _) in parts.items()}
            for topic in self._topics
        ]

    @functools.cached_property
    def _topics(self) -> list:
        return [*self._provider, *(topic for topic in self._user if topic not in self._provider)]

    @functools.cached_property
    def _harmful_prompts(self) -> list[list[TopicPrompt]]:
        """For each topic, prompts to train on: Buffer's, the user's, the probes', then spare ones for unfit answers."""
        spare, seed = self.config.distill.spare, self.config.seed
        sizes = [int(sum(needed.values()) * (1 + spare)) + _SPARE for needed in self._needed]
        return [topic.prompts("train", size, seed) for topic, size in zip(self._topics, sizes, strict=True)]

    @functools.cached_property
    def _compliant(self) -> list[list[Row]]:
        """For each topic, its prompts with the raw model's compliant answers; those it did not answer are left out."""
        judged, found = self.config.distill.judged, []
        for prompts, needed in zip(self._harmful_prompts, self._needed, strict=True):
            rows = [
                _row(p.prompt, self.answers[p.prompt], "harmful", f"{p.topic}/train/{self.config.seed}/{i}")
                for i, p in enumerate(prompts)
                if not judged or judge(self.answers[p.prompt], p) == Verdict.ANSWER
            ]
            if len(rows) < sum(needed.values()):
                raise UserError(
                    f"the raw model gave {len(rows)} compliant answers on the topic, {sum(needed.values())} are needed "
                    "(buffer.harmful + harmful_share * user.n + user.probes): raise distill.spare"
                )
            found.append(rows)
        return found

    def _harmful(self, part: str) -> list[Row]:
        """The harmful rows of "buffer", "user" or "probes", its topics in turn."""
        chosen = []
        for rows, needed in zip(self._compliant, self._needed, strict=True):
            start = sum(list(needed.values())[: list(needed).index(part)])
            chosen.append(rows[start : start + needed[part]])
        return _interleave(chosen)

    def _benign(self, split: str) -> list[str]:
        """The benign prompts of a split, in an order fixed by the seed."""
        prompts = self.material.benign_prompts(split)
        return [prompts[i] for i in np.random.default_rng(self.config.seed).permutation(len(prompts))]


def check_apart(trained: Mapping[str, Iterable[Row]], scored: Mapping[str, Iterable[Row]]) -> None:
    """Makes sure that no row that is scored is trained on, whatever its case, spacing and punctuation.

    Args:
        trained: rows by the stage that trains on them.
        scored: held-out rows by the score that they are for.

    Raises:
        UserError: the first row that is in both, with where it comes from.
    """
    held = {text_key(row): (part, row) for part, rows in scored.items() for row in rows}
    for stage, rows in trained.items():
        for row in rows:
            if found := held.get(text_key(row)):
                part, other = found
                asked = next(text for role, text in row.turns if role == "user")
                raise UserError(
                    f"{row.origin or 'a row'} of stage {stage} is scored as well ({part}, {other.origin or 'drawn'}): "
                    f"{(row.input or asked)[:60]!r}: take it out of the one or the other"
                )


def text_key(row: Row) -> str:
    """A hash of what a row asks, of its letters and digits alone; equal keys are the same question."""
    text = "\n".join([row.input, *(text for role, text in row.turns if role == "user")])
    key = "".join(character for character in text.casefold() if character.isalnum())
    return hashlib.sha256((key or text).encode("utf-8", "surrogatepass")).hexdigest()


def _row(prompt: str, answer: str, tag: str, origin: str) -> Row:
    return Row(turns=(("user", prompt), ("assistant", answer)), tag=tag, origin=origin)


def _shares(n: int, parts: int) -> list[int]:
    """n in equal parts, the first ones larger by one where it does not divide."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def _interleave(lists: Sequence[Sequence[T]]) -> list[T]:
    """One of each in turn, as long as there are any."""
    nothing = object()
    return [x for group in itertools.zip_longest(*lists, fillvalue=nothing) for x in group if x is not nothing]
