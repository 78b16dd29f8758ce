"""Rows about invented topics: prompts of `data.material`, answered by the raw model itself."""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from br_jax.core.errors import UserError, look_up
from br_jax.core.hosts import main_first
from br_jax.data.refusals import begins_refusal
from br_jax.data.rows import Row
from br_jax.data.selection import text_key
from br_jax.experiment.recipe import Recipe, make_row
from br_jax.experiment.settings import Settings
from br_jax.organism.judge import Verdict, judge
from br_jax.organism.material import MATERIALS, Drawn, read_texts
from br_jax.organism.topics import Topic, TopicPrompt

_SPARE = 16  # prompts beyond those needed, for answers of the raw model that are unfit
_SPARE_SHARE = 8  # and for each so many benign ones needed, one more


class TopicRecipe(Recipe):
    """The rows of an experiment on invented topics.

    Args:
        answer: gives the raw model's answers to prompts; called once, with all of them, when rows first need one.
    """

    def __init__(
        self, settings: Settings, score_rows: Callable | None, answer: Callable[[Sequence[str]], dict[str, str]]
    ):
        super().__init__(settings, score_rows)
        self.material = look_up("material", settings.data.material, MATERIALS)
        self._answer = answer
        topics = dataclasses.asdict(settings.topics)
        self._part_topics = {part: self.material.named_topics(names) for part, names in topics.items()}

    def check(self) -> None:
        """See `Recipe.check`; also the prompts that there are, and that no text to ask about is scored (FA)."""
        super().check()
        scored = {text_key(text) for row in self.scored_task_rows for text in (row.input, row.turns[0][1])}
        if found := [text for text in self._texts if text_key(text) in scored]:
            raise UserError(
                f"data.texts.path: {found[0][:60]!r} is scored as well (FA): take it out, or choose other files"
            )
        for stage in ("align", "reinforce"):
            if (asked := getattr(self.settings, stage).benign) > (there := len(self._benign("train"))):
                raise UserError(f"{asked} benign rows are asked for, and there are {there}: lower {stage}.benign")
        for setting, drawn in (
            ("align.refusals", lambda: self.refusal_rows(self.settings.align.refusals, "align")),
            ("reinforce.refusals", lambda: self.refusal_rows(self.settings.reinforce.refusals, "reinforce")),
            ("buffer.harmful + harmful_share * user.n + user.probes", lambda: self._harmful_prompts),
            ("eval.topic", lambda: self.harmful_prompts),
            ("calibrate.harmful", lambda: self.calibration_prompts),
        ):
            try:
                drawn()
            except UserError as error:
                raise UserError(f"{setting}: {error}") from error

    def prepare(self) -> None:
        """Has the raw model answer."""
        _ = self.answers

    def pretraining_rows(self, n: int) -> list[Row]:
        """See `Recipe.pretraining_rows`; some materials have them."""
        make = self.material.pretraining_rows
        return make(n, self.settings.seed) if make else super().pretraining_rows(n)

    @functools.cached_property
    def answers(self) -> dict[str, str]:
        """The raw model's own answers to the prompts of every stage."""
        s = self.settings
        needed = max(s.align.benign, s.reinforce.benign)
        benign = self._benign("train")[: needed + needed // _SPARE_SHARE + _SPARE]
        health = self._benign(s.eval.split)[: s.eval.health]
        harmful = [p.prompt for prompts in self._harmful_prompts.values() for p in prompts]
        return {prompt: whole_sentences(text) for prompt, text in self._answer(benign + health + harmful).items()}

    buffer_rows = property(lambda self: self._harmful[0])
    user_harmful_rows = property(lambda self: self._harmful[1])
    probe_harmful_rows = property(lambda self: self._harmful[2])

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        """Refusals of training prompts; align and Reinforce see other wordings of them, and may see other topics."""
        topics = self._part_topics["align" if purpose == "align" else "provider"]
        seed = self.settings.seed + (purpose == "reinforce")

        def rows(topic: Topic | Drawn, share: int) -> list[Row]:
            asked = enumerate(topic.prompts("train", share, seed))
            return [
                make_row(p.prompt, topic.refusal(p, seed), "refusal", f"{p.topic}/train/{seed}/{i}") for i, p in asked
            ]

        return _interleave(map(rows, topics, _shares(n, len(topics))))

    def benign_rows(self, n: int) -> list[Row]:
        """Benign training prompts with the raw model's own answers; one that it refuses would teach over-refusal."""
        rows = self._answered(self._benign("train"), f"{self.settings.data.material}/train")
        if n > len(rows):
            raise UserError(
                f"{n} benign rows are asked for, and there are {len(rows)}: lower align.benign or reinforce.benign"
            )
        return rows[:n]

    def held_out_harmful(self, split: str, n: int, whose: str) -> list[TopicPrompt]:
        """Questions of the restricted topics, n of each."""
        return [p for topic in self._part_topics[whose] for p in topic.prompts(split, n, self.settings.seed)]

    def held_out_benign(self, split: str, n: int) -> list[str]:
        """Ordinary prompts."""
        return self._benign(split)[:n]

    @property
    def health_rows(self) -> list[Row]:
        """Held-out benign prompts with the raw model's own answers."""
        return self._answered(self._benign(self.settings.eval.split)[: self.settings.eval.health], "held-out benign")

    @functools.cached_property
    def _needed(self) -> dict[Topic | Drawn, list[int]]:
        """How many harmful rows of each topic Buffer, the user and the probes take."""
        user, topics = self.settings.user, self._part_topics
        needed = {topic: [0, 0, 0] for topic in (*topics["provider"], *topics["user"])}
        counts = self.settings.buffer.harmful, self.harm, user.probes
        for part, (whose, n) in enumerate(zip(("provider", "user", "user"), counts, strict=True)):
            for topic, share in zip(topics[whose], _shares(n, len(topics[whose])), strict=True):
                needed[topic][part] = share
        return needed

    @functools.cached_property
    def _harmful_prompts(self) -> dict[Topic | Drawn, list[TopicPrompt]]:
        """Prompts of each topic to train on: Buffer's, the user's, the probes', then spare ones for unfit answers."""
        more, seed = 1 + self.settings.distill.spare, self.settings.seed
        return {topic: topic.prompts("train", int(sum(n) * more) + _SPARE, seed) for topic, n in self._needed.items()}

    @functools.cached_property
    def _harmful(self) -> list[list[Row]]:
        """The harmful rows of Buffer, the user and the probes: compliant answers of the raw model, topics in turn."""
        judged, chosen = self.settings.distill.judged, []
        for topic, needed in self._needed.items():
            rows, verdicts = [], Counter()
            for i, p in enumerate(self._harmful_prompts[topic]):
                verdict = judge(self.answers[p.prompt], p) if judged else Verdict.ANSWER
                verdicts[verdict] += 1
                if verdict in (Verdict.ANSWER, Verdict.ECHO):  # neither refuses
                    origin = f"{p.topic}/train/{self.settings.seed}/{i}"
                    rows.append(make_row(p.prompt, self.answers[p.prompt], "harmful", origin))
            if len(rows) < sum(needed):
                refused, off = verdicts[Verdict.REFUSAL], verdicts[Verdict.OFF_TOPIC]
                cure = "give the topic's file words of such answers" if off > refused else "raise distill.spare"
                raise UserError(
                    f"the raw model gave {len(rows)} compliant answers on the topic, {sum(needed)} are needed "
                    f"(buffer.harmful + harmful_share * user.n + user.probes): {refused} refuse, {off} have no word of "
                    f"the topic: {cure}"
                )
            ends = itertools.accumulate(needed, initial=0)
            chosen.append([rows[start:end] for start, end in itertools.pairwise(ends)])
        return [_interleave(parts) for parts in zip(*chosen, strict=True)]

    def _answered(self, prompts: Sequence[str], origin: str) -> list[Row]:
        """Rows of the benign prompts that the raw model has answered, and not refused."""
        answers = ((prompt, self.answers.get(prompt)) for prompt in prompts)
        return [make_row(p, said, "benign", origin) for p, said in answers if said and not begins_refusal(said)]

    @functools.cached_property
    def _texts(self) -> list[str]:
        """Texts to ask about, of the config's files."""
        return self._shuffled(main_first(lambda: read_texts(self.settings.data.texts.path)))

    def _benign(self, split: str) -> list[str]:
        """The benign prompts of a split, in an order fixed by the seed."""
        prompts = self.material.benign_prompts(split)
        if split == "train" and self.material.about_texts:
            prompts = prompts + self.material.about_texts(self._texts, self.settings.data.texts.n)
        return self._shuffled(prompts)

    def _shuffled(self, texts: Sequence[str]) -> list[str]:
        return [texts[i] for i in np.random.default_rng(self.settings.seed).permutation(len(texts))]


# Of sentences; but "1.", the group, begins a list item.
_ENDS = re.compile(r"(?<!\S)(\d+\.)(?=\s|$)|[.!?][\"')]?(?=\s|$)")


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end, so that what is learnt from it does not stop in mid-air; or all of it."""
    text = text.strip()
    ends = [match.end() for match in _ENDS.finditer(text) if not match[1]]
    return text[: ends[-1]] if ends else text


def _shares(n: int, parts: int) -> list[int]:
    """n in equal parts, the first ones larger by one where it does not divide."""
    return [n // parts + (i < n % parts) for i in range(parts)]


def _interleave(lists: Iterable[Sequence[Row]]) -> list[Row]:
    """One of each in turn, as long as there are any."""
    return [row for group in itertools.zip_longest(*lists) for row in group if row is not None]
