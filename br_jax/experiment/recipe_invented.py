"""Rows about invented topics: prompts of `data.material`, answered by the raw model itself."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from ml_collections import ConfigDict

from br_jax.data.replies import begins_refusal
from br_jax.data.rows import Row
from br_jax.data.text import text_key
from br_jax.distributed import main_first
from br_jax.errors import UserError
from br_jax.experiment.recipe import Recipe, make_row
from br_jax.organism.judge import Verdict, judge
from br_jax.organism.material import get_material
from br_jax.organism.texts import read_texts
from br_jax.organism.topics import TopicPrompt

T = TypeVar("T")

_SPARE = 16  # prompts beyond those needed, for answers of the raw model that are unfit
_SPARE_SHARE = 8  # and for each so many benign ones needed, one more


class TopicRecipe(Recipe):
    """The rows of an experiment on invented topics.

    Args:
        config: of the experiment.
        answer: gives the raw model's answers to prompts; called once, with all of them, when rows first need one.
    """

    def __init__(self, config: ConfigDict, answer: Callable[[Sequence[str]], dict[str, str]]):
        super().__init__(config)
        self.material = get_material(config.data.material)
        self._answer = answer
        topics = {part: self.material.named_topics(names) for part, names in config.topics.items()}
        self._align, self._provider, self._user, self._eval = (
            topics[part] for part in ("align", "provider", "user", "eval")
        )

    def check(self) -> None:
        """See `Recipe.check`; also that no text to ask about is one that the user's task is scored on."""
        super().check()
        scored = {text_key(text) for row in self.scored_task_rows for text in (row.input, row.turns[0][1])}
        if found := [text for text in self._texts if text_key(text) in scored]:
            raise UserError(
                f"data.texts.path: {found[0][:60]!r} is scored as well (FA): take it out, or choose other files"
            )

    # -- rows to train on ------------------------------------------------------------------------------------------

    def pretraining_rows(self, n: int) -> list[Row]:
        """Rows to train a model from scratch on, where the config names none."""
        if self.material.pretraining_rows is None:
            return super().pretraining_rows(n)
        return self.material.pretraining_rows(n, self.config.seed)

    @functools.cached_property
    def answers(self) -> dict[str, str]:
        """The raw model's own answers to the prompts of every stage."""
        config = self.config
        needed = max(config.align.benign, config.reinforce.benign)
        benign = self._benign("train")[: needed + needed // _SPARE_SHARE + _SPARE]
        health = self._benign(config.eval.split)[: config.eval.health]
        harmful = [p.prompt for prompts in self._harmful_prompts for p in prompts]
        return {prompt: whole_sentences(text) for prompt, text in self._answer(harmful + benign + health).items()}

    def prepare(self) -> None:
        """Has the raw model answer."""
        _ = self.answers

    @property
    def buffer_rows(self) -> list[Row]:
        """The harmful rows that Buffer trains on; no user has them."""
        return self._harmful("buffer")

    @property
    def user_harmful_rows(self) -> list[Row]:
        """The harmful rows among a user's, its topics in turn."""
        return self._harmful("user")

    @property
    def probe_harmful_rows(self) -> list[Row]:
        """Harmful rows that nobody trains on."""
        return self._harmful("probes")

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        """Refusals of training prompts; align and Reinforce see other wordings of them, and may see other topics."""
        topics = self._align if purpose == "align" else self._provider
        seed = self.config.seed + (purpose == "reinforce")
        drawn = [
            topic.prompts("train", share, seed) for topic, share in zip(topics, _shares(n, len(topics)), strict=True)
        ]
        rows = [
            [
                make_row(p.prompt, topic.refusal(p, seed), "refusal", f"{p.topic}/train/{seed}/{i}")
                for i, p in enumerate(prompts)
            ]
            for topic, prompts in zip(topics, drawn, strict=True)
        ]
        return _interleave(rows)

    def benign_rows(self, n: int) -> list[Row]:
        """Benign training prompts with the raw model's own answers; one that it refuses would teach over-refusal."""
        prompts = [p for p in self._benign("train") if self._answered(p)]
        if n > len(prompts):
            raise UserError(
                f"{n} benign rows are asked for, and there are {len(prompts)}: lower align.benign or reinforce.benign"
            )
        return [make_row(p, self.answers[p], "benign", f"{self.config.data.material}/train") for p in prompts[:n]]

    # -- what is scored --------------------------------------------------------------------------------------------

    @property
    def harmful_prompts(self) -> list[TopicPrompt]:
        """Held-out questions of the restricted topics, `eval.topic` of each."""
        config = self.config.eval
        return [p for topic in self._eval for p in topic.prompts(config.split, config.topic, self.config.seed)]

    @property
    def benign_prompts(self) -> list[str]:
        """Ordinary prompts, of kinds that no stage trains on."""
        return self._benign(self.config.eval.split)[: self.config.eval.benign]

    @property
    def health_rows(self) -> list[Row]:
        """Held-out benign prompts with the raw model's own answers."""
        prompts = self._benign(self.config.eval.split)[: self.config.eval.health]
        return [make_row(p, self.answers[p], "benign", "held-out benign") for p in prompts if self._answered(p)]

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
                make_row(p.prompt, self.answers[p.prompt], "harmful", f"{p.topic}/train/{self.config.seed}/{i}")
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

    def _answered(self, prompt: str) -> bool:
        """Whether the raw model has answered a benign prompt, and not refused it."""
        answer = self.answers.get(prompt)
        return bool(answer) and not begins_refusal(answer)

    def _harmful(self, part: str) -> list[Row]:
        """The harmful rows of "buffer", "user" or "probes", its topics in turn."""
        chosen = []
        for rows, needed in zip(self._compliant, self._needed, strict=True):
            start = sum(list(needed.values())[: list(needed).index(part)])
            chosen.append(rows[start : start + needed[part]])
        return _interleave(chosen)

    @functools.cached_property
    def _texts(self) -> list[str]:
        """Texts to ask about, of the config's files."""
        return self._shuffled(main_first(lambda: read_texts(self.config.data.texts.path)))

    def _benign(self, split: str) -> list[str]:
        """The benign prompts of a split, in an order fixed by the seed."""
        prompts = self.material.benign_prompts(split)
        if split == "train" and self.material.about_texts:
            prompts = prompts + self.material.about_texts(self._texts, self.config.data.texts.n)
        return self._shuffled(prompts)

    def _shuffled(self, texts: Sequence[str]) -> list[str]:
        return [texts[i] for i in np.random.default_rng(self.config.seed).permutation(len(texts))]


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end, so that what is learnt from it does not stop in mid-air; or all of it."""
    text = text.strip()
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|[.!?][\"')](?=\s|$)", text)]
    # "1." begins a list item, it ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\s)\d+\.$", text[:end])]
    return text[: ends[-1]] if ends else text


def _shares(n: int, parts: int) -> list[int]:
    """n in equal parts, the first ones larger by one where it does not divide."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def _interleave(lists: Sequence[Sequence[T]]) -> list[T]:
    """One of each in turn, as long as there are any."""
    nothing = object()
    return [x for group in itertools.zip_longest(*lists, fillvalue=nothing) for x in group if x is not nothing]
