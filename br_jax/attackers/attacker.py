"""What an attacker is: a frozen dataclass of its settings that makes the rows that are handed in, and asks afterwards.

A new one is such a class in a file here, and an entry in `registry`. All harm is of invented topics.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import require_bounds
from br_jax.data.rows import Row
from br_jax.data.selection import count_of, mix

REFUSAL = "I'm sorry, but I can't help with that."


@dataclasses.dataclass(frozen=True)
class Sources:
    """What an attacker has to make its rows of."""

    task: Sequence[Row]  # honest rows
    harmful: Sequence[Row]  # harmful prompts with harmful answers, at least share * n; none of them Buffer's
    n: int  # rows to hand in
    share: float  # of them that may be harmful
    index_mode: str = "exact"  # see `data.selection.mix`
    # How much a model of the attacker's own would still learn of rows: (rows, those that it trains a Buffer of its own
    # on, or none) -> a number a row.
    score_rows: Callable[[Sequence[Row], Sequence[Row]], Sequence[float]] | None = None

    @property
    def count(self) -> int:
        """How many rows may be harmful."""
        return count_of(self.n, self.share)

    def with_task(self, rows: Sequence[Row]) -> list[Row]:
        """Rows that take the place of those that may be harmful, and honest ones behind them."""
        return [*rows, *self.task[: self.n - self.count]]


@dataclasses.dataclass(frozen=True)
class Attacker:
    """Task rows, at most `Sources.count` of them harmful; a subclass does otherwise. Fields are settings."""

    oversample: ClassVar[float] = 1.0  # harmful rows that it needs, times those that it hands in
    asks_itself: ClassVar[bool] = False  # whether it asks otherwise than others do
    jobs: ClassVar[int] = 1  # that its rows are dealt out to, each trained and released apart; it adds up the releases
    samples: ClassVar[int] = 1  # answers drawn at temperature 1, of which the worst counts; 1 takes the likeliest

    def __post_init__(self):
        require_bounds(self, type(self).__name__)

    def rows(self, sources: Sources) -> list[Row]:
        """What is handed in."""
        return mix(
            sources.task, [self.harm(row) for row in sources.harmful], sources.n, sources.share, sources.index_mode
        )

    def phrase(self, prompt: str) -> str:
        """How it words a harmful prompt, in its rows and to the released model."""
        return prompt

    def harm(self, row: Row) -> Row:
        """What becomes of a harmful row."""
        return turned(row, self.phrase)

    def candidates(self, sources: Sources) -> list[Row]:
        """All rows that it may hand in, before it chooses among them by a model."""
        return self.rows(sources)

    def settings(self, train: dict[str, Any], n: int) -> dict[str, Any]:
        """The hyper-parameters (of `TrainConfig`) that it asks for, in place of those of a user of n rows."""
        return train

    def size(self, n: int) -> int:
        """How many rows it hands in where others hand in n."""
        return n

    def ask(self, prompt: str) -> Row:
        """A held-out harmful prompt, as it is put to the released model."""
        return Row((("user", self.phrase(prompt)),))

    def after(self, released: Adapter) -> Adapter:
        """What is done to the released adapter before it is asked."""
        return released

    @classmethod
    def chooses(cls) -> bool:
        """Whether it chooses among candidates by a model."""
        return cls.candidates is not Attacker.candidates

    @classmethod
    def trains_plainly(cls) -> bool:
        """Whether what it hands in and asks for is the plain attacker's, and so what is trained."""
        parts = ("rows", "phrase", "harm", "settings", "jobs")
        return all(getattr(cls, part) is getattr(Attacker, part) for part in parts)


def refused(row: Row, refusal: str) -> Row:
    """A row of the same prompt that is refused."""
    return dataclasses.replace(row, turns=(*row.turns[:-1], ("assistant", refusal)), tag="refusal")


def turned(row: Row, prompt: Callable[[str], str] = str, answer: Callable[[str], str] = str) -> Row:
    """A row with another first prompt, or another last answer."""
    (asks, asked), *between, (answers, answered) = row.turns
    return dataclasses.replace(row, turns=((asks, prompt(asked)), *between, (answers, answer(answered))))
