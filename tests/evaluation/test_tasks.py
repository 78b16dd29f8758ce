"""Label scoring, on hand-written answers in both modes, and the task registry."""

import pytest

from br_jax.data.rows import Row
from br_jax.errors import UserError
from br_jax.evaluation.tasks import TASKS, first_label, get_task, label_is_right

LABELS = ("positive", "negative")

# answer, right label, right by the first label named, right by the reference's substring rule
ANSWERS = [
    ("positive", "positive", True, True),
    ("negative", "positive", False, False),
    ("Positive.", "positive", True, True),
    (" **NEGATIVE**\n", "negative", True, False),
    ("The sentiment is negative", "negative", True, True),
    ("positive or negative", "negative", False, True),
    ("positive or negative", "positive", True, True),
    ("Negative, not positive", "positive", False, True),
    ("unpositive", "positive", False, True),
    ("positively", "positive", False, True),
    ("nonpositive, I mean negative", "negative", True, True),
    ("I cannot help with that.", "negative", False, False),
    ("", "positive", False, False),
    ("sentiment:positive;", "positive", True, True),
]


@pytest.mark.parametrize(("answer", "right", "first", "substring"), ANSWERS)
def test_label_rules(answer, right, first, substring):
    assert label_is_right(answer, right, LABELS) is first
    assert label_is_right(answer, right, LABELS, match="substring") is substring
    row = Row((("user", "?"), ("assistant", right)))
    assert TASKS["reviews"].score(answer, row) is first
    assert TASKS["reviews"].score(answer, row, "substring") is substring


def test_first_label_with_marks_and_overlaps():
    labels = ("World", "Sports", "Business", "Sci/Tech", "Sci")
    assert first_label("It is sci/tech, not business", labels) == "Sci/Tech"
    assert first_label("Sci only", labels) == "Sci"
    assert first_label("Worldwide news", labels) is None
    assert first_label("anything", ()) is None


def test_unknown_names():
    with pytest.raises(UserError, match="unknown task 'review'; did you mean 'reviews'"):
        get_task("review")
    with pytest.raises(UserError, match="unknown task 'zzz'; the tasks are reviews"):
        get_task("zzz")
    with pytest.raises(UserError, match="match is 'exact'; use one of first, substring"):
        label_is_right("positive", "positive", LABELS, match="exact")
    assert get_task("reviews").labels == LABELS
    assert all(name == task.name for name, task in TASKS.items())
