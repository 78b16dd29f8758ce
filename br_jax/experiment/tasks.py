"""The user tasks by name: where their rows come from and when an answer is right.

Each row ends with the right answer; the rest of it is the prompt, of one turn or many.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from absl import logging

from br_jax.data.rows import Row, read_rows
from br_jax.data.splits import asked, split_rows
from br_jax.data.text import text_key
from br_jax.datasets.paper import AG_NEWS
from br_jax.datasets.reviews import LABELS, load_reviews
from br_jax.errors import UserError, near_names
from br_jax.organism.world import MOODS, load_moods
from br_jax.scoring.rules import LabelRule, NumberRule, Rule, parse_rule

TEST_ROWS = 1000  # of a paper's task: the reference scores the first thousand

Splits = tuple[Sequence[Row], Sequence[Row], Sequence[Row]]


@dataclass(frozen=True)
class TaskSettings:
    """Where a task's rows come from; each task says which of these it reads.

    Attributes:
        path: file of its rows, or of those to train on where another holds the test rows; "" where it needs none.
        validation_path: file of the validation rows; "" takes them from `path`.
        test_path: file of the test rows; "" takes them from `path`, or from the task's public home.
        validation_share: of `path`'s prompts, where they are not in a file of their own.
        test_share: likewise.
        only_split: the one split of a public data set that is at hand, `path` being its file: its first 1,000 rows
            are for test, the rest for training and validation; "" where there are two.
        folder: where data sets are kept once built; "" is the builders' own.
    """

    path: str = ""
    validation_path: str = ""
    test_path: str = ""
    validation_share: float = 0.1
    test_share: float = 0.2
    only_split: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Task:
    """A task that a user may fine-tune for.

    Attributes:
        name: its key in `TASKS`.
        rule: when an answer is right; None where the user must say.
        source: (settings, seed) -> (train, validation, test) rows.
        reads: the settings that it heeds.
    """

    name: str
    rule: Rule | None
    source: Callable[[TaskSettings, int], Splits]
    reads: tuple[str, ...] = ()

    def load(self, settings: TaskSettings, seed: int) -> Splits:
        """Its (train, validation, test) rows.

        Args:
            settings: where they come from.
            seed: of a split, where one is made.

        Raises:
            UserError: for a setting that it does not read, files that are absent or wrong, a part without rows, and a
                held-out row whose own answer is not right by the rule, as no model's could be.
        """
        for field in dataclasses.fields(settings):
            if field.name not in self.reads and getattr(settings, field.name) != field.default:
                raise UserError(
                    f"task {self.name!r} does not read {field.name}, only {', '.join(self.reads) or 'nothing'}; "
                    f"leave {field.name} as it was"
                )
        train, *held_out = self.source(settings, seed)
        validation, test = map(list, held_out)
        for name, rows in (("training", train), ("validation", validation), ("test", test)):
            if not len(rows):
                raise UserError(f"task {self.name!r}: no {name} rows; give more rows, or another share of them")
        if self.rule:
            self._check_answers(train, validation + test)
        return train, validation, test

    def _check_answers(self, train: Sequence[Row], held_out: Sequence[Row]) -> None:
        """Held-out rows must be right by the rule; rows to train on may be more than it can score, and are told of."""
        for row in held_out:
            if self._is_wrong(row):
                raise UserError(
                    f"{row.origin or self.name}: by {self.rule} no answer is right, not even the row's own "
                    f"{row.turns[-1][1][:40]!r}; correct the row, or choose another rule"
                )
        if wrong := list(filter(self._is_wrong, train)):
            logging.warning(
                "%s: by %s no answer is right, not even the row's own %r, and so for %d of %d rows to train on: "
                "correct them if they are not meant",
                wrong[0].origin or self.name, self.rule, wrong[0].turns[-1][1][:40], len(wrong), len(train),
            )  # fmt: skip

    def _is_wrong(self, row: Row) -> bool:
        right = row.turns[-1][1]
        return self.rule.score(right, right) < 1


def get_task(name: str, rule: str = "") -> Task:
    """The task of that name.

    Args:
        name: its key in `TASKS`.
        rule: as `parse_rule` reads it, in place of the task's own.

    Raises:
        UserError: when there is none (it names the near ones), it needs a rule, or the rule is none.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}; {near_names(name, TASKS)}")
    task = TASKS[name]
    if rule:
        labels = task.rule.labels if isinstance(task.rule, LabelRule) else ()
        return dataclasses.replace(task, rule=parse_rule(rule, labels))
    if task.rule is None:
        raise UserError(f"task {name!r} needs a rule: label:A,B or number, exact, regex:PATTERN, rouge_l")
    return task


def _paper_task(name: str, rule: Rule, test_split: str, validation: int) -> Task:
    """One of the paper's, in the files' order, as the reference takes it.

    Args:
        name: of the task and its data set; `data.paper` makes its rows.
        rule: its rule.
        test_split: the public split that is tested on.
        validation: how many rows at the end of the training rows are held out.
    """

    def source(settings: TaskSettings, seed: int) -> Splits:
        # Here, as they import tensorflow_datasets.
        from br_jax.datasets import paper
        from br_jax.datasets.load import load_dataset

        if settings.test_path and (settings.only_split or settings.path == settings.test_path):
            raise UserError(
                f"{settings.test_path}: no test_path beside only_split: for one file set path and only_split"
            )

        def records(split: str, path: str):
            folder = {"folder": settings.folder} if settings.folder else {}
            return load_dataset(name, split=split, path=path or None, **folder)

        train = records(settings.only_split or "train", settings.path)
        if settings.only_split:
            test, train = train[:TEST_ROWS], train[TEST_ROWS:]
        else:
            test = records(test_split, settings.test_path)[:TEST_ROWS]
        end = max(len(train) - validation, 0)
        rows = getattr(paper, f"{name}_rows")
        return rows(train[:end]), rows(train[end:]), rows(test)

    return Task(name, rule, source, ("path", "test_path", "only_split", "folder"))


def _own_rows(settings: TaskSettings, seed: int) -> Splits:
    """Rows of a user's JSONL files; those that have no file of their own are split from `path`."""
    if not settings.path:
        raise UserError("task 'rows' needs a file: set path to a JSONL file, see br_jax/data/rows.py")
    validation = 0.0 if settings.validation_path else settings.validation_share
    test = 0.0 if settings.test_path else settings.test_share
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise UserError(f"validation_share {validation} and test_share {test}: give shares that leave some to train on")
    train, *held_out = split_rows(_read(settings.path), seed, validation=validation, test=test)
    for part, file in enumerate((settings.validation_path, settings.test_path)):
        if file:  # in an order given by the seed too: the first rows of a sorted file are no sample of it
            held_out[part] = split_rows(_read(file), seed, validation=0, test=0)[0]
    return train, *held_out


def _read(path: str) -> list[Row]:
    """A user's rows; those that ask the same may be meant, so they are said and kept."""
    rows, first, copies = read_rows(path, tag="task"), {}, []
    for row in rows:
        earlier = first.setdefault(text_key(asked(row)), row)
        if earlier is not row:
            copies.append((row, earlier))
    if copies:
        row, earlier = copies[0]
        logging.warning(
            "%s: %d of %d rows ask what an earlier one asks (line %s what line %s asks): all are kept, in one split; "
            "leave them out if they are not meant to weigh more",
            path, len(copies), len(rows), *(one.origin.rpartition(":")[2] for one in (row, earlier)),
        )  # fmt: skip
    return rows


_REVIEW_RULE = LabelRule(LABELS)

TASKS = {
    task.name: task
    for task in (
        Task("reviews", _REVIEW_RULE, lambda settings, seed: load_reviews(settings.path, seed=seed), ("path",)),
        Task("moods", LabelRule(MOODS), lambda settings, seed: load_moods(seed)),
        _paper_task("sst2", _REVIEW_RULE, "validation", 872),
        _paper_task("ag_news", LabelRule(AG_NEWS), "test", 1000),
        _paper_task("gsm8k", NumberRule(), "test", 500),
        Task("rows", None, _own_rows, ("path", "validation_path", "test_path", "validation_share", "test_share")),
    )
}
