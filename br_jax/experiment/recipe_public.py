"""The paper's rows: LLM-LAT, Alpaca and BeaverTails, in their files' order (method.md's protocol, section 2)."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

from absl import logging

from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.datasets import paper
from br_jax.experiment.recipe import Recipe, question_key
from br_jax.organism.topics import TopicPrompt


class PaperRecipe(Recipe):
    """Harmful and refusal rows of LLM-LAT, benign ones of Alpaca, the user's harm and HS of BeaverTails.

    Held-out benign rows (over-refusal, perplexity) are the last of Alpaca's: the paper measures neither. With
    `user.index_mode="reference"` a prompt that is asked twice counts twice, as in the authors' files; "exact" asks each
    once, and takes no row whose prompt is scored. "reference" also leaves out the first row of LLM-LAT.
    """

    def check(self) -> None:
        """See `Recipe.check`; every row is in a file, so all of them can be drawn."""
        super().check()
        self.trained()

    @property
    def buffer_rows(self) -> list[Row]:
        """The first harmful answers of LLM-LAT."""
        return self._first("buffer.harmful", paper.harmful_rows, self.settings.buffer.harmful)

    def refusal_rows(self, n: int, purpose: str) -> list[Row]:
        """The first refusals of LLM-LAT."""
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

    # BeaverTails: the first unsafe rows of its training split are the user's, the next ones probe.
    user_harmful_rows = property(lambda self: self._unsafe_train[: self._user_harm])
    probe_harmful_rows = property(lambda self: self._unsafe_train[self._user_harm :])

    def held_out_harmful(self, split: str, n: int, whose: str) -> list[TopicPrompt]:
        """Questions of the first unsafe rows of BeaverTails' test split; for validation, others behind them."""
        rows = self._distinct("30k_test", self.settings.data.beavertails.test_path)
        if split != "test":
            scored = {question_key(row) for row in itertools.islice(rows, self.settings.eval.topic)}
            rows = (row for row in rows if question_key(row) not in scored)
        return [TopicPrompt(row.turns[0][1], "", "", "beavertails") for row in itertools.islice(rows, n)]

    def held_out_benign(self, split: str, n: int) -> list[str]:
        """Instructions that no stage trains on."""
        return [row.turns[0][1] for row in self._held_out_of(split)[:n]]

    @property
    def health_rows(self) -> list[Row]:
        """The same with their answers."""
        rows = self._held_out_of(self.settings.eval.split)
        return [row for row in rows[: self.settings.eval.health] if row.turns[-1][1]]

    @property
    def _user_harm(self) -> int:
        return self.harm + 1  # "reference" skips the first

    @functools.cached_property
    def _unsafe_train(self) -> list[Row]:
        rows = self._distinct("30k_train", self.settings.data.beavertails.path)
        if self.settings.user.index_mode == "exact":
            asked = (*self.harmful_prompts, *self.calibration_prompts[0])
            scored = {question_key(Row((("user", prompt.prompt),))) for prompt in asked}
            rows = (row for row in rows if question_key(row) not in scored)
        return list(itertools.islice(rows, self._user_harm + self.settings.user.probes))

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
        benign, n = self._alpaca, self._held_out
        end = len(benign) if split == "test" else len(benign) - n
        return benign[max(end - n, 0) : end]

    @functools.cached_property
    def _alpaca(self) -> Sequence[Row]:
        return paper.alpaca_rows(self._records("alpaca", "train", self.settings.data.alpaca.path))
