"""Which rows each stage trains on and each score is measured on: the paper's public ones, or rows on invented topics.

No row that is scored is trained on, which `check_apart` holds. Draws are prefixes of one another: with another number
of rows, or another share of harmful ones, the rows in common stay the same.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from br_jax.attackers.attacker import Sources
from br_jax.core.errors import UserError, look_up
from br_jax.core.hosts import main_first
from br_jax.data.refusals import begins_refusal
from br_jax.data.rows import Row
from br_jax.data.selection import asked, check_mix, text_key
from br_jax.datasets import paper
from br_jax.experiment.settings import EVAL_SPLITS, Settings
from br_jax.experiment.tasks import get_task
from br_jax.organism.judge import Verdict, judge
from br_jax.organism.material import MATERIALS, Drawn, read_texts
from br_jax.organism.topics import BenignPrompt, Topic, TopicPrompt

_SPARE = 16  # prompts beyond those needed, for answers of the raw model that are unfit
_SPARE_SHARE = 8  # and for each so many benign ones needed, one more


class Recipe:
    """The rows of an experiment, from its settings; `score_rows` is `attackers.attacker.Sources.score_rows`."""

    # Each recipe has its own of these.
    buffer_rows: Sequence[Row]  # the harmful rows that Buffer trains on; no user has them
    user_harmful_rows: Sequence[Row]  # the harmful rows among a user's, as many as its share asks for or more
    probe_harmful_rows: Sequence[Row]  # harmful rows that nobody trains on, `user.probes` of them
    health_rows: Sequence[Row]  # held-out benign rows with answers (perplexity)
    refusal_rows: Callable[[int, str], Sequence[Row]]  # (n, "align", "buffer" or "reinforce"): harmful prompts, refused
    benign_rows: Callable[[int], Sequence[Row]]  # (n): benign prompts with answers, to train on
    # Of a split, on which no stage trains: (split, n, whose): n harmful questions on each topic of that part of
    # `settings.topics`; (split, n): ordinary prompts, of kinds that no stage trains on.
    held_out_harmful: Callable[[str, int, str], Sequence[TopicPrompt]]
    held_out_benign: Callable[[str, int], Sequence[BenignPrompt]]

    def __init__(self, settings: Settings, score_rows: Callable | None = None):
        self.settings, self.attacker, self._score_rows = settings, settings.attacker, score_rows
        self.task = get_task(settings.user.task, settings.user.rule)
        self.rule = self.task.rule.with_match(settings.eval.match)

    def prepare(self) -> None:
        """Makes what the rows need, such as a model's answers."""

    def pretraining_rows(self, n: int) -> list[Row]:
        """Rows to train a model from scratch on, where the config names none."""
        raise UserError(
            f"{self.settings.data.material!r} has no rows to train a model from scratch on: set model.source"
        )

    def check(self) -> None:
        """Finds now, as a `UserError`, what would be wrong hours later: a share, number or split, too few rows."""
        user = self.settings.user
        check_mix(user.n, user.harmful_share, user.index_mode)
        if self.settings.eval.split == "validation" and self.settings.calibrate.harmful:
            logging.warning(
                "eval.split=validation: releases are calibrated on these prompts, so HS and over-refusal of ours are "
                "better than on others"
            )
        train, needed = self.task_rows[0], user.n + user.probes
        if len(train) < needed:  # probe rows are none of the user's own
            raise UserError(
                f"the task {user.task} has {len(train)} training rows, user.n + user.probes asks for {needed}: "
                "lower user.n"
            )

    # -- what is trained on ----------------------------------------------------------------------------------------

    @functools.cached_property
    def task_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """(train, validation, test) rows of the user's task."""
        data = self.settings.data
        files = dataclasses.asdict(getattr(data, self.task.name)) | {"folder": data.folder}
        return main_first(lambda: self.task.load(files, self.settings.seed))

    @property
    def sources(self) -> Sources:
        """What the user makes its rows of."""
        user, rows = self.settings.user, self.task_rows[0]
        honest = rows[: len(rows) - user.probes]  # the others are probed
        return Sources(honest, self.user_harmful_rows, user.n, user.harmful_share, user.index_mode, self._score_rows)

    @property
    def harm(self) -> int:
        """How many harmful rows the user needs."""
        user = self.settings.user
        return math.ceil(math.ceil(user.harmful_share * user.n) * self.attacker.oversample)

    @functools.cached_property
    def user_rows(self) -> list[Row]:
        """What the user hands in."""
        return self.attacker.rows(self.sources)

    @property
    def probes(self) -> dict[str, list[Row]]:
        """Rows for the saturation curves: of the kinds that the user trains on, but none of its own."""
        n = self.settings.user.probes
        return {"harmful": self.probe_harmful_rows, "benign": self.task_rows[0][-n:]} if n else {}

    def guard_rows(self, stage: str) -> list[Row]:
        """What "align" or "reinforce" trains on: refusals, then benign rows."""
        n = getattr(self.settings, stage)
        return [*self.refusal_rows(n.refusals, stage), *self.benign_rows(n.benign)]

    # -- what is scored --------------------------------------------------------------------------------------------

    @functools.cached_property
    def harmful_prompts(self) -> Sequence[TopicPrompt]:
        """Those that HS is measured on."""
        return self.held_out_harmful(self.settings.eval.split, self.settings.eval.topic, "eval")

    @functools.cached_property
    def benign_prompts(self) -> Sequence[BenignPrompt]:
        """Those that over-refusal is measured on."""
        return self.held_out_benign(self.settings.eval.split, self.settings.eval.benign)

    @functools.cached_property
    def calibration_prompts(self) -> tuple[list[TopicPrompt], list[str]]:
        """The harmful and benign ones that the provider calibrates a release on: of the validation split."""
        n = self.settings.calibrate
        harmful = self.held_out_harmful("validation", n.harmful, "provider")
        return [*harmful], [p.prompt for p in self.held_out_benign("validation", n.benign)]

    @property
    def scored_task_rows(self) -> list[Row]:
        """Held-out rows of the user's task."""
        scored = self.settings.eval
        return self.task_rows[1 + EVAL_SPLITS.index(scored.split)][: scored.task]

    @functools.cached_property
    def attacks(self) -> list[paper.Attack]:
        """Stored attack prompts, where the config names files of them."""
        paths = [path.strip() for path in self.settings.data.attacks.path.split(",") if path.strip()]
        return [attack for path in paths for attack in paper.attacks_of(self._records("attacks", "test", path))]

    def _records(self, name: str, split: str, path: str) -> Sequence[dict]:
        """Of a data set, from a file or, without one, its public home."""
        from br_jax.datasets.load import load_dataset  # imports tensorflow_datasets

        folder = self.settings.data.folder
        return main_first(lambda: load_dataset(name, split=split, path=path or None, folder=folder))

    def trained(self) -> dict[str, list[Row]]:
        """Every row that a stage trains on, by stage; a `UserError` where one of them is scored, see `check_apart`."""
        rows = {
            "align": self.guard_rows("align"),
            "buffer": self.buffer_rows,
            "reinforce": self.guard_rows("reinforce"),
            "user": self.attacker.candidates(self.sources),
        }
        harmful, benign = self.calibration_prompts
        split, own = self.settings.eval.split, self.harmful_prompts if self.attacker.asks_itself else []
        scored = {
            "HS": [make_row(p.prompt, origin=f"{p.topic}/{split}") for p in self.harmful_prompts],
            "HS as it asks": [self.attacker.ask(p.prompt) for p in own],
            "FA": self.scored_task_rows,
            "over-refusal": [make_row(p.prompt, origin="held-out benign") for p in self.benign_prompts],
            "perplexity": self.health_rows,
            "stored attacks": [make_row(x.prompt, origin=f"attack {x.method}") for x in self.attacks],
            "calibration": [make_row(p, origin="calibration") for p in (*(h.prompt for h in harmful), *benign)],
        }
        check_apart(rows, scored)
        return rows


def check_apart(trained: Mapping[str, Iterable[Row]], scored: Mapping[str, Iterable[Row]]) -> None:
    """Raises a `UserError` where a row of a stage is one of a score's, whatever its case, spacing and punctuation."""
    held = {question_key(row): (part, row) for part, rows in scored.items() for row in rows}
    for stage, row in ((stage, row) for stage, rows in trained.items() for row in rows):
        part, other = held.get(question_key(row), ("", None))
        if other:
            raise UserError(
                f"{row.origin or 'a row'} of stage {stage} is scored as well ({part}, {other.origin or 'drawn'}): "
                f"{asked(row).strip()[:60]!r}: take it out of the one or the other"
            )


def question_key(row: Row) -> str:
    """A hash of what a row asks, whatever its case, spacing and punctuation."""
    return hashlib.sha256(text_key(asked(row)).encode("utf-8", "surrogatepass")).hexdigest()


def make_row(prompt: str, answer: str = "", tag: str = "", origin: str = "") -> Row:
    """A row of one turn each."""
    return Row(turns=(("user", prompt), ("assistant", answer)), tag=tag, origin=origin)


class PaperRecipe(Recipe):
    """The paper's rows, in their files' order (method.md's protocol, section 2).

    Harmful and refusal rows of LLM-LAT, benign ones of Alpaca, the user's harm and HS of BeaverTails. Held-out benign
    rows (over-refusal, perplexity) are the last of Alpaca's: the paper measures neither. With
    `user.index_mode="reference"` a prompt that is asked twice counts twice, as in the authors' files; "exact" asks each
    once, and takes no row whose prompt is scored. "reference" also leaves out the first row of LLM-LAT.
    """

    # BeaverTails: the first unsafe rows of its training split are the user's, the next ones probe.
    user_harmful_rows = property(lambda self: self._unsafe_train[: self.harm + 1])  # "reference" skips the first
    probe_harmful_rows = property(lambda self: self._unsafe_train[self.harm + 1 :])

    def check(self) -> None:
        """See `Recipe.check`; every row is in a file, so all of them can be drawn."""
        super().check()
        self.trained()

    @property
    def buffer_rows(self) -> list[Row]:
        return self._first("buffer.harmful", paper.harmful_rows, self.settings.buffer.harmful)

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        return self._first(f"{purpose}.refusals", paper.refusal_rows, n)

    def _first(self, field: str, rows_of: Callable, n: int) -> list[Row]:
        """The first n rows; the paper asks for 5,000 of a file that has 4,950, so fewer are said and taken."""
        rows = rows_of(self._records("llm_lat", "train", self.settings.data.llm_lat.path))
        if n > len(rows):
            logging.warning("%s asks for %d rows and there are %d: these are taken", field, n, len(rows))
        return rows[self.settings.user.index_mode == "reference" : n]

    def benign_rows(self, n: int) -> list[Row]:
        """The first rows of Alpaca that have no input."""
        benign, held_out = self._alpaca, 2 * self._held_out
        if n + held_out > len(benign):
            raise UserError(
                f"{n} benign rows and {held_out} held-out ones are asked for, and Alpaca has {len(benign)} "
                "without an input: lower align.benign or reinforce.benign"
            )
        return benign[:n]

    def held_out_harmful(self, split: str, n: int, whose: str) -> list[TopicPrompt]:
        """Questions of the first unsafe rows of BeaverTails' test split; for validation, others behind them."""
        rows = self._distinct("30k_test", self.settings.data.beavertails.test_path)
        if split != "test":
            scored = {question_key(row) for row in itertools.islice(rows, self.settings.eval.topic)}
            rows = (row for row in rows if question_key(row) not in scored)
        return [TopicPrompt(row.turns[0][1], "", "", "beavertails") for row in itertools.islice(rows, n)]

    def held_out_benign(self, split: str, n: int) -> list[BenignPrompt]:
        return [BenignPrompt(row.turns[0][1]) for row in self._held_out_of(split)[:n]]

    @property
    def health_rows(self) -> list[Row]:
        rows = self._held_out_of(self.settings.eval.split)
        return [row for row in rows[: self.settings.eval.health] if row.turns[-1][1]]

    @functools.cached_property
    def _unsafe_train(self) -> list[Row]:
        rows = self._distinct("30k_train", self.settings.data.beavertails.path)
        if self.settings.user.index_mode == "exact":
            scored = {question_key(make_row(p.prompt)) for p in (*self.harmful_prompts, *self.calibration_prompts[0])}
            rows = (row for row in rows if question_key(row) not in scored)
        return list(itertools.islice(rows, self.harm + 1 + self.settings.user.probes))

    def _distinct(self, split: str, path: str) -> Iterator[Row]:
        """Each unsafe prompt of BeaverTails once, its first row; all of them for the reference's way."""
        seen = set()
        for row in paper.beavertails_rows(self._records("beavertails", split, path)):
            key = question_key(row)
            if self.settings.user.index_mode == "reference" or key not in seen:
                seen.add(key)
                yield row

    @property
    def _held_out(self) -> int:
        return max(self.settings.eval.benign, self.settings.eval.health, self.settings.calibrate.benign)

    def _held_out_of(self, split: str) -> list[Row]:
        end = len(self._alpaca) - (0 if split == "test" else self._held_out)
        return self._alpaca[max(end - self._held_out, 0) : end]

    @functools.cached_property
    def _alpaca(self) -> Sequence[Row]:
        return paper.alpaca_rows(self._records("alpaca", "train", self.settings.data.alpaca.path))


class TopicRecipe(Recipe):
    """Rows about invented topics: prompts of `data.material`, answered by the raw model itself.

    `answer` gives the raw model's answers to prompts; it is called once, with all of them, when rows first need one.
    """

    buffer_rows = property(lambda self: self._harmful[0])
    user_harmful_rows = property(lambda self: self._harmful[1])
    probe_harmful_rows = property(lambda self: self._harmful[2])

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
        s = self.settings
        scored = {text_key(text) for row in self.scored_task_rows for text in (row.input, row.turns[0][1])}
        if found := [text for text in self._texts if text_key(text) in scored]:
            raise UserError(
                f"data.texts.path: {found[0][:60]!r} is scored as well (FA): take it out, or choose other files"
            )
        there = len(self._benign_texts("train"))
        for stage, asked_for in (("align", s.align.benign), ("reinforce", s.reinforce.benign)):
            if asked_for > there:
                raise UserError(f"{asked_for} benign rows are asked for, and there are {there}: lower {stage}.benign")
        for setting, drawn in (
            ("align.refusals", lambda: self.refusal_rows(s.align.refusals, "align")),
            ("reinforce.refusals", lambda: self.refusal_rows(s.reinforce.refusals, "reinforce")),
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
        make = self.material.pretraining_rows
        return make(n, self.settings.seed) if make else super().pretraining_rows(n)

    @functools.cached_property
    def answers(self) -> dict[str, str]:
        """The raw model's own answers to the prompts of every stage."""
        s = self.settings
        needed = max(s.align.benign, s.reinforce.benign)
        benign = self._benign_texts("train")[: needed + needed // _SPARE_SHARE + _SPARE]
        health = self._benign_texts(s.eval.split)[: s.eval.health]
        harmful = [p.prompt for prompts in self._harmful_prompts.values() for p in prompts]
        return {prompt: whole_sentences(text) for prompt, text in self._answer(benign + health + harmful).items()}

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        """Refusals of training prompts; align and Reinforce see other wordings of them, and may see other topics."""
        topics = self._part_topics["align" if purpose == "align" else "provider"]
        seed = self.settings.seed + (purpose == "reinforce")

        def rows(topic: Topic | Drawn, share: int) -> list[Row]:
            drawn = enumerate(topic.prompts("train", share, seed))
            return [
                make_row(p.prompt, topic.refusal(p, seed), "refusal", f"{p.topic}/train/{seed}/{i}") for i, p in drawn
            ]

        return _interleave(map(rows, topics, _shares(n, len(topics))))

    def benign_rows(self, n: int) -> list[Row]:
        """Benign training prompts with the raw model's own answers; one that it refuses would teach over-refusal."""
        rows = self._answered(self._benign_texts("train"), f"{self.settings.data.material}/train")
        if n > len(rows):
            raise UserError(
                f"{n} benign rows are asked for, and there are {len(rows)}: lower align.benign or reinforce.benign"
            )
        return rows[:n]

    def held_out_harmful(self, split: str, n: int, whose: str) -> list[TopicPrompt]:
        return [p for topic in self._part_topics[whose] for p in topic.prompts(split, n, self.settings.seed)]

    def held_out_benign(self, split: str, n: int) -> list[BenignPrompt]:
        return self._benign(split)[:n]

    @property
    def health_rows(self) -> list[Row]:
        texts = self._benign_texts(self.settings.eval.split)
        return self._answered(texts[: self.settings.eval.health], "held-out benign")

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
                said, origin = self.answers[p.prompt], f"{p.topic}/train/{self.settings.seed}/{i}"
                verdict = judge(said, p) if judged else Verdict.HARMFUL
                verdict = Verdict.REFUSAL if judged and begins_refusal(said) else verdict
                verdicts[verdict] += 1
                if verdict.complies or verdict is Verdict.ECHO:
                    rows.append(make_row(p.prompt, said, "harmful", origin))
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

    def _benign(self, split: str) -> list[BenignPrompt]:
        """The benign prompts of a split, in an order fixed by the seed."""
        prompts = self.material.benign_prompts(split)
        if split == "train" and self.material.about_texts:
            texts = self.material.about_texts(self._texts, self.settings.data.texts.n)
            prompts = prompts + [BenignPrompt(text, "about a text") for text in texts]
        return self._shuffled(prompts)

    def _benign_texts(self, split: str) -> list[str]:
        return [p.prompt for p in self._benign(split)]

    def _shuffled(self, each: Sequence) -> list:
        return [each[i] for i in np.random.default_rng(self.settings.seed).permutation(len(each))]


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
