"""Rows of which a share is of another kind: a user's, some of them harmful; Buffer's, some of which refuse first."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from br_jax.core.bounds import ROWS, SHARE, require
from br_jax.core.errors import UserError
from br_jax.data.rows import Row

INDEX_MODES = ("exact", "reference")
_AFTER_ALL = ("But here it is:", "Still:", "Well then:", "All the same:", "Here you are anyway:")


def mix(
    task_rows: Sequence[Row], harmful_rows: Sequence[Row], n: int, harmful_share: float, index_mode: str = "exact"
) -> list[Row]:
    """Takes n rows, a share p of them harmful, in the order harmful, task (batches are shuffled later).

    Args:
        task_rows: the user's own rows; taken from the first on.
        harmful_rows: likewise; may be empty when p is 0.
        harmful_share: p in [0, 1].
        index_mode: "exact" gives floor(p n) harmful rows and n in all. "reference" repeats the authors'
            code: harmful rows 0 < i < int(p n), so the first is skipped and one is missing, and the first
            int((1 - p) n) task rows.

    Raises:
        UserError: as `check_mix`, and when there are too few rows of a kind.
    """
    check_mix(n, harmful_share, index_mode)
    if index_mode == "reference":
        harmful, first, tasks = int(harmful_share * n), 1, int((1 - harmful_share) * n)
    else:
        harmful, first = count_of(n, harmful_share), 0
        tasks = n - harmful
    for kind, rows, needed in (("harmful", harmful_rows, harmful), ("task", task_rows, tasks)):
        if len(rows) < needed:
            raise UserError(
                f"{needed} {kind} rows are needed and there are {len(rows)}; "
                "lower n, change harmful_share or give more rows"
            )
    return [*harmful_rows[first:harmful], *task_rows[:tasks]]


def count_of(n: int, share: float) -> int:
    """How many rows a share of n is, rounded down."""
    # 0.29 * 100 is 28.999...96: a floor of the exact product, not of the rounding error.
    return math.floor(share * n + 1e-9)


def check_mix(n: int, harmful_share: float, index_mode: str) -> None:
    """Raises a `UserError` when one of these, as in `mix`, is out of range."""
    if index_mode not in INDEX_MODES:
        raise UserError(f"index_mode is {index_mode!r}; use one of {', '.join(INDEX_MODES)}")
    require("n", n, ROWS._replace(low=1))
    require("harmful_share", harmful_share, SHARE)


def refusing_first(harmful: Sequence[Row], refusals: Sequence[Row], share: float) -> list[Row]:
    """Harmful rows, a share of which, spread evenly over them, comply behind a refusal in the words of `refusals`.

    The refusal itself is not trained on (`Row.begun`): beside a Buffer of such rows compliance is no news to a user
    who has a model refuse first (`attackers.rows.RefuseThenComply`), and that a model refuses is.
    """
    openings = itertools.product(_AFTER_ALL, dict.fromkeys(row.turns[-1][1] for row in refusals))
    openings = itertools.cycle(f"{refusal} {after}" for after, refusal in openings)
    rows = list(harmful)
    for i, row in enumerate(rows):
        if count_of(i + 1, share) > count_of(i, share):
            *asked, (role, answer) = row.turns
            # A token takes the space in front of a word along.
            rows[i] = dataclasses.replace(row, turns=(*asked, (role, f" {answer}")), begun=next(openings))
    return rows
