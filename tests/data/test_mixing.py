"""Mixing, against the two rules written as the plain loops they come from."""

import pytest

from br_jax.core.errors import UserError
from br_jax.data.mixing import mix, refusing_first
from br_jax.data.rows import Row


def rows(kind, count):
    return [Row((("user", f"{kind} {index}"), ("assistant", "ok")), tag=kind) for index in range(count)]


TASK, HARMFUL = rows("task", 1000), rows("harmful", 1200)


@pytest.mark.parametrize(("n", "p"), [(1000, 0.1), (1000, 0.0), (7, 0.5), (1000, 1.0)])
def test_reference_rule(n, p):
    """method.md 2, for harmful rows from the first on: 0 < i < int(p n), and the first int((1 - p) n)."""
    expected = [row for i, row in enumerate(HARMFUL) if 0 < i < int(p * n)]
    expected += [row for i, row in enumerate(TASK) if i < int((1 - p) * n)]
    assert mix(TASK, HARMFUL, n, p, index_mode="reference") == expected


@pytest.mark.parametrize(("n", "p", "harmful"), [(1000, 0.0, 0), (7, 0.5, 3), (100, 0.29, 29), (1000, 1.0, 1000)])
def test_exact_rule(n, p, harmful):
    needed = HARMFUL[:harmful], TASK[: n - harmful]  # none of a kind where none are
    assert mix(*needed[::-1], n, p) == mix(TASK, HARMFUL, n, p) == [*needed[0], *needed[1]]


def test_bad_arguments():
    for changes, message in (
        ({"harmful_share": 1.1}, "harmful_share is 1.1: it must be a number from 0 to 1"),
        ({"n": 0}, "n is 0"),
        ({"harmful_rows": HARMFUL[:4], "index_mode": "reference"}, "5 harmful rows are needed and there are 4"),
        ({"task_rows": TASK[:4]}, "5 task rows are needed and there are 4"),
        ({"index_mode": "exakt"}, "index_mode is 'exakt'; use one of exact, reference"),
    ):
        arguments = {"task_rows": TASK, "harmful_rows": HARMFUL, "n": 10, "harmful_share": 0.5} | changes
        with pytest.raises(UserError, match=message):
            mix(**arguments)


@pytest.mark.parametrize(("share", "which"), [(0.0, []), (0.4, [2, 4]), (1.0, [0, 1, 2, 3, 4])])
def test_a_share_of_harmful_rows_complies_behind_a_refusal(share, which):
    harmful = [Row((("user", f"how {i}?"), ("assistant", f"so {i}"))) for i in range(5)]
    refusals = [Row((("user", "x?"), ("assistant", answer))) for answer in ("No.", "Never.", "No.")]
    rows = refusing_first(harmful, refusals, share)
    assert [i for i in range(5) if rows[i] != harmful[i]] == which
    begun = [rows[i].begun for i in which]
    assert len({*begun}) == len(which), "no two begin with the same words before all were used"
    for i, opening in zip(which, begun, strict=True):
        assert opening.startswith(("No. ", "Never. ")) and opening.endswith(":")
        assert rows[i].turns == (harmful[i].turns[0], ("assistant", f" so {i}"))
