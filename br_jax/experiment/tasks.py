"""The user tasks by name: where their rows come from and when an answer is right.

Each row ends with the right answer; the rest of it is the prompt, of one turn or many.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from br_jax.core.bounds import number
from br_jax.core.errors import UserError, look_up
from br_jax.data.rows import Row, read_rows
from br_jax.data.text import asked, split_rows, text_key
from br_jax.datasets import paper
from br_jax.datasets.reviews import LABELS, load_reviews
from br_jax.organism.world import MOODS, load_moods
from br_jax.scoring.rules import LabelRule, NumberRule, Rule, parse_rule

TEST_ROWS = 1000  # of a paper's task: the reference scores the first thousand

Settings = Mapping[str, Any]
Splits = tuple[Sequence[Row], Sequence[Row], Sequence[Row]]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that a user may fine-tune for."""

    name: str
    rule: Rule | None  # when an answer is right; None where the user must say
    source: Callable[[Settings, int], Splits]  # (settings, seed) -> (train, validation, test) rows
    settings: Settings = dataclasses.field(default_factory=dict)  # what `data` of a config can say of it: the defaults

    def load(self, settings: Settings, seed: int) -> Splits:
        """Its (train, validation, test) rows, by some of its settings, and "folder", where public data sets are kept.

        Raises a `UserError` for files that are absent or wrong, a part without rows, and a held-out row whose own
        answer is not right by the rule, as no model's could be.
        """
        usual = {name: getattr(value, "default", value) for name, value in self.settings.items()}
        train, *held_out = self.source(usual | settings, seed)
        validation, test = map(list, held_out)
        for name, rows in (("training", train), ("validation", validation), ("test", test)):
            if not len(rows):
                raise UserError(f"task {self.name!r}: no {name} rows; give more rows, or another share of them")
        told = "%s: by %s no answer is right, not even the row's own %r"
        if bad := self._wrong(validation + test):
            raise UserError(f"{told % bad[0]}; correct the row, or choose another rule")
        if bad := self._wrong(train):
            so_for = ", and so for %d of %d rows to train on: correct them if they are not meant"
            logging.warning(told + so_for, *bad[0], len(bad), len(train))
        return train, validation, test

    def _wrong(self, rows: Sequence[Row]) -> list[tuple[str, Rule, str]]:
        """(origin, rule, answer) of the rows whose own answer is not right."""
        right = ((row.origin or self.name, row.turns[-1][1]) for row in rows) if self.rule else ()
        return [(origin, self.rule, text[:40]) for origin, text in right if self.rule.score(text, text) < 1]


def get_task(name: str, rule: str = "") -> Task:
    """The task of that name, with a rule, as `parse_rule` reads it, in place of its own; a `UserError` without."""
    task = look_up("task", name, TASKS)
    if rule:
        labels = task.rule.labels if isinstance(task.rule, LabelRule) else ()
        return dataclasses.replace(task, rule=parse_rule(rule, labels))
    if task.rule is None:
        raise UserError(f"task {name!r} needs a rule: label:A,B or number, exact, regex:PATTERN, rouge_l")
    return task


def _paper_task(name: str, rule: Rule, test_split: str, validation: int) -> Task:
    """One of the paper's, in the files' order, tested on a public split, validated on so many last training rows."""

    def source(settings: Settings, seed: int) -> Splits:
        from br_jax.datasets.load import load_dataset  # imports tensorflow_datasets

        path, test_path, only_split = (settings[name] for name in ("path", "test_path", "only_split"))
        if test_path and (only_split or path == test_path):
            raise UserError(f"{test_path}: no test_path beside only_split: for one file set path and only_split")
        folder = {"folder": settings["folder"]} if settings.get("folder") else {}
        train = load_dataset(name, split=only_split or "train", path=path or None, **folder)
        if only_split:
            test, train = train[:TEST_ROWS], train[TEST_ROWS:]
        else:
            test = load_dataset(name, split=test_split, path=test_path or None, **folder)[:TEST_ROWS]
        end = max(len(train) - validation, 0)
        rows = getattr(paper, f"{name}_rows")
        return rows(train[:end]), rows(train[end:]), rows(test)

    # only_split: the one split at hand, in `path`; its first 1,000 rows are for test, the rest for the others
    return Task(name, rule, source, {"path": "", "test_path": "", "only_split": ""})


def _own_rows(settings: Settings, seed: int) -> Splits:
    """Rows of a user's JSONL files; those that have no file of their own are split from `path`."""
    if not settings["path"]:
        raise UserError("task 'rows' needs a file: set path to a JSONL file, see br_jax/data/rows.py")
    files = settings["validation_path"], settings["test_path"]
    shares = settings["validation_share"], settings["test_share"]
    validation, test = (0.0 if file else share for file, share in zip(files, shares, strict=True))
    if not validation + test < 1:
        raise UserError(f"validation_share {validation} and test_share {test}: give shares that leave some to train on")
    train, *held_out = split_rows(_read(settings["path"]), seed, validation=validation, test=test)
    for part, file in enumerate(files):
        if file:  # in an order given by the seed too: the first rows of a sorted file are no sample of it
            held_out[part] = split_rows(_read(file), seed, validation=0, test=0)[0]
    return train, *held_out


def _read(path: str) -> list[Row]:
    """A user's rows; those that ask the same may be meant, so they are said and kept."""
    rows, first = read_rows(path, tag="task"), {}
    copies = [(row, one) for row in rows if (one := first.setdefault(text_key(asked(row)), row)) is not row]
    if copies:
        logging.warning(
            "%s: %d of %d rows ask what an earlier one asks (line %s what line %s asks): all are kept, in one split; "
            "leave them out if they are not meant to weigh more",
            *(path, len(copies), len(rows), *(row.origin.rpartition(":")[2] for row in copies[0])),
        )
    return rows


_REVIEW_RULE, _SHARE = LabelRule(LABELS), (0.0, 1.0, False, True)
_OWN_FILES = {"path": "", "validation_path": "", "test_path": ""}
# Of `path`'s prompts, where a part has no file of its own.
_OWN_FILES |= {"validation_share": number(0.1, *_SHARE), "test_share": number(0.2, *_SHARE)}

TASKS = {
    task.name: task
    for task in (
        Task("reviews", _REVIEW_RULE, lambda data, seed: load_reviews(data["path"], seed=seed), {"path": ""}),
        Task("moods", LabelRule(MOODS), lambda data, seed: load_moods(seed)),
        _paper_task("sst2", _REVIEW_RULE, "validation", 872),
        _paper_task("ag_news", LabelRule(paper.AG_NEWS), "test", 1000),
        _paper_task("gsm8k", NumberRule(), "test", 500),
        Task("rows", None, _own_rows, _OWN_FILES),
    )
}
