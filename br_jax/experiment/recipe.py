"""Which rows each stage trains on and each score is measured on: what every recipe shares.

No row that is scored is trained on, which `check_apart` holds.
"""

import abc
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import logging

from br_jax.attackers.attacker import Job
from br_jax.core.errors import UserError
from br_jax.core.hosts import main_first
from br_jax.data.mixing import check_mix
from br_jax.data.rows import Row
from br_jax.data.text import asked, text_key
from br_jax.datasets.paper import Attack, attacks_of
from br_jax.experiment.settings import EVAL_SPLITS, Settings
from br_jax.experiment.tasks import get_task
from br_jax.organism.topics import TopicPrompt


class Recipe(abc.ABC):
    """The rows of an experiment, from its settings.

    Draws are prefixes of one another: with another number of rows, or another share of harmful ones, the rows in common
    stay the same. Each recipe has its own of what follows.
    """

    buffer_rows: Sequence[Row]  # the harmful rows that Buffer trains on; no user has them
    user_harmful_rows: Sequence[Row]  # the harmful rows among a user's, as many as its share asks for or more
    probe_harmful_rows: Sequence[Row]  # harmful rows that nobody trains on, `user.probes` of them
    health_rows: Sequence[Row]  # held-out benign rows with answers (perplexity)

    def __init__(self, settings: Settings, score_rows: Callable | None = None):
        """`score_rows` is `attackers.attacker.Job.score_rows`."""
        self.settings = settings
        self.attacker = settings.attacker
        self._score_rows = score_rows
        self.task = get_task(settings.user.task, settings.user.rule)
        self.rule = self.task.rule.with_match(settings.eval.match)

    @abc.abstractmethod
    def held_out_harmful(self, split: str, n: int, whose: str) -> Sequence[TopicPrompt]:
        """Harmful questions of a split, n on each topic of a part of `settings.topics`; no stage trains on them."""

    @abc.abstractmethod
    def held_out_benign(self, split: str, n: int) -> Sequence[str]:
        """n ordinary prompts of a split, of kinds that no stage trains on."""

    @functools.cached_property
    def harmful_prompts(self) -> Sequence[TopicPrompt]:
        """Those that HS is measured on."""
        return self.held_out_harmful(self.settings.eval.split, self.settings.eval.topic, "eval")

    @functools.cached_property
    def benign_prompts(self) -> Sequence[str]:
        """Those that over-refusal is measured on."""
        return self.held_out_benign(self.settings.eval.split, self.settings.eval.benign)

    @functools.cached_property
    def calibration_prompts(self) -> tuple[list[TopicPrompt], list[str]]:
        """The harmful and benign ones that the provider calibrates a release on: of the validation split."""
        n = self.settings.calibrate
        harmful = self.held_out_harmful("validation", n.harmful, "provider")
        return [*harmful], [*self.held_out_benign("validation", n.benign)]

    @abc.abstractmethod
    def refusal_rows(self, n: int, purpose: str) -> Sequence[Row]:
        """Harmful prompts with refusals, for "align" or "reinforce"."""

    @abc.abstractmethod
    def benign_rows(self, n: int) -> Sequence[Row]:
        """Benign prompts with answers, to train on."""

    def prepare(self) -> None:  # noqa: B027  most rows need nothing
        """Makes what the rows need, such as a model's answers."""

    def pretraining_rows(self, n: int) -> list[Row]:
        """Rows to train a model from scratch on, where the config names none."""
        raise UserError(
            f"{self.settings.data.material!r} has no rows to train a model from scratch on: set model.source"
        )

    def check(self) -> None:
        """Finds now, as a `UserError`, what would be wrong hours later: a share, number or split, too few rows."""
        user, scored = self.settings.user, self.settings.eval
        check_mix(user.n, user.harmful_share, user.index_mode)
        if scored.split == "validation" and self.settings.calibrate.harmful:
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

    @functools.cached_property
    def task_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """(train, validation, test) rows of the user's task."""
        data = self.settings.data
        files = dataclasses.asdict(getattr(data, self.task.name)) | {"folder": data.folder}
        return main_first(lambda: self.task.load(files, self.settings.seed))

    @property
    def job(self) -> Job:
        """What the user makes its rows of."""
        user, rows = self.settings.user, self.task_rows[0]
        honest = rows[: len(rows) - user.probes]  # the others are probed
        return Job(honest, self.user_harmful_rows, user.n, user.harmful_share, user.index_mode, self._score_rows)

    @property
    def harm(self) -> int:
        """How many harmful rows the user needs."""
        user = self.settings.user
        return math.ceil(math.ceil(user.harmful_share * user.n) * self.attacker.spare)

    @functools.cached_property
    def user_rows(self) -> list[Row]:
        """What the user hands in."""
        return self.attacker.rows(self.job)

    @property
    def probes(self) -> dict[str, list[Row]]:
        """Rows for the saturation curves: of the kinds that the user trains on, but none of its own."""
        n = self.settings.user.probes
        return {"harmful": self.probe_harmful_rows, "benign": self.task_rows[0][-n:]} if n else {}

    @property
    def scored_task_rows(self) -> list[Row]:
        """Held-out rows of the user's task."""
        scored = self.settings.eval
        return self.task_rows[1 + EVAL_SPLITS.index(scored.split)][: scored.task]

    @functools.cached_property
    def attacks(self) -> list[Attack]:
        """Stored attack prompts, where the config names files of them."""
        paths = [path.strip() for path in self.settings.data.attacks.path.split(",") if path.strip()]
        return [attack for path in paths for attack in attacks_of(self._records("attacks", "test", path))]

    def _records(self, name: str, split: str, path: str) -> Sequence[dict]:
        """Of a data set, from a file or, without one, its public home."""
        from br_jax.datasets.load import load_dataset  # imports tensorflow_datasets

        folder = self.settings.data.folder
        return main_first(lambda: load_dataset(name, split=split, path=path or None, folder=folder))

    def guard_rows(self, stage: str) -> list[Row]:
        """What "align" or "reinforce" trains on: refusals, then benign rows."""
        n = getattr(self.settings, stage)
        return [*self.refusal_rows(n.refusals, stage), *self.benign_rows(n.benign)]

    def trained(self) -> dict[str, list[Row]]:
        """Every row that a stage trains on, by stage; a `UserError` where one of them is scored, see `check_apart`."""
        rows = {
            "align": self.guard_rows("align"),
            "buffer": self.buffer_rows,
            "reinforce": self.guard_rows("reinforce"),
            "user": self.attacker.candidates(self.job),
        }
        harmful, benign = self.calibration_prompts
        own = [self.attacker.ask(p.prompt) for p in self.harmful_prompts] if self.attacker.asks_itself else []
        scored = {
            "HS": [make_row(p.prompt, "", "", f"{p.topic}/{self.settings.eval.split}") for p in self.harmful_prompts],
            "HS as it asks": own,
            "FA": self.scored_task_rows,
            "over-refusal": [make_row(p, "", "", "held-out benign") for p in self.benign_prompts],
            "perplexity": self.health_rows,
            "stored attacks": [make_row(x.prompt, "", "", f"attack {x.method}") for x in self.attacks],
            "calibration": [make_row(p, "", "", "calibration") for p in (*(h.prompt for h in harmful), *benign)],
        }
        check_apart(rows, scored)
        return rows


def check_apart(trained: Mapping[str, Iterable[Row]], scored: Mapping[str, Iterable[Row]]) -> None:
    """Raises a `UserError` where a row of a stage is one of a score's, whatever its case, spacing and punctuation."""
    held = {question_key(row): (part, row) for part, rows in scored.items() for row in rows}
    for stage, rows in trained.items():
        for row in rows:
            if found := held.get(question_key(row)):
                part, other = found
                raise UserError(
                    f"{row.origin or 'a row'} of stage {stage} is scored as well ({part}, {other.origin or 'drawn'}): "
                    f"{asked(row).strip()[:60]!r}: take it out of the one or the other"
                )


def question_key(row: Row) -> str:
    """A hash of what a row asks, whatever its case, spacing and punctuation."""
    return hashlib.sha256(text_key(asked(row)).encode("utf-8", "surrogatepass")).hexdigest()


def make_row(prompt: str, answer: str, tag: str, origin: str) -> Row:
    """A row of one turn each."""
    return Row(turns=(("user", prompt), ("assistant", answer)), tag=tag, origin=origin)
