"""The user tasks by name: where their rows come from and when an answer is right."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from br_jax.data.demo import MOODS, load_moods
from br_jax.data.reviews import LABELS, Reviews, load_reviews
from br_jax.data.rows import Row
from br_jax.errors import UserError

MATCHES = ("first", "substring")


@dataclass(frozen=True)
class Task:
    """A task that a user may fine-tune for.

    Attributes:
        name: its key in `TASKS`.
        labels: the answers to choose from; empty for a task with free answers.
        load: (path, *, seed) -> (train, validation, test) rows; a row's last turn is the right answer.
        score: (model's answer, row, match) -> whether it is right.
    """

    name: str
    labels: tuple[str, ...]
    load: Callable[..., Reviews]
    score: Callable[[str, Row, str], bool]


def first_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer names first, as a whole word in any case; None if it names none."""
    found = []
    for label in labels:
        match = re.search(rf"(?<!\w){re.escape(label)}(?!\w)", answer, re.IGNORECASE)
        if match:
            # At one place the longer label wins: "Sci/Tech" over "Sci".
            found.append((match.start(), -len(label), label))
    return min(found)[2] if found else None


def label_is_right(answer: str, right: str, labels: Sequence[str], match: str = "first") -> bool:
    """Whether an answer names the right label.

    Args:
        answer: the model's text.
        right: the right label.
        labels: all labels.
        match: "first" asks that the first label named is the right one. "substring" is the reference's
            rule: the right label occurs anywhere, as it is or capitalized, so that an answer naming
            every label counts.

    Raises:
        UserError: when match is neither.
    """
    if match == "substring":
        return any(spelling in answer for spelling in (right, right.lower(), right.capitalize()))
    if match == "first":
        return first_label(answer, labels) == right
    raise UserError(f"match is {match!r}; use one of {', '.join(MATCHES)}")


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: when there is none; it names the near ones.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(str(name), TASKS, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"the tasks are {', '.join(TASKS)}"
    raise UserError(f"unknown task {name!r}; {hint}")


def _label_task(name: str, labels: tuple[str, ...], load: Callable[..., Reviews]) -> Task:
    """A task whose answer is one of a few labels."""

    def score(answer: str, row: Row, match: str = "first") -> bool:
        return label_is_right(answer, row.turns[-1][1], labels, match)

    return Task(name, labels, load, score)


TASKS = {
    "reviews": _label_task("reviews", LABELS, load_reviews),
    "moods": _label_task("moods", MOODS, load_moods),
}
