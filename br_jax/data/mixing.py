"""A user's data set: task rows with a share of harmful ones among them."""

import math
from collections.abc import Sequence

from br_jax.data.rows import Row
from br_jax.errors import UserError

INDEX_MODES = ("exact", "reference")


def mix(
    task_rows: Sequence[Row],
    harmful_rows: Sequence[Row],
    n: int,
    harmful_share: float,
    index_mode: str = "exact",
    start: int = 0,
) -> list[Row]:
    """Takes n rows, a share p of them harmful, in the order harmful, task (batches are shuffled later).

    Args:
        task_rows: the user's own rows; taken from the first on.
        harmful_rows: taken from index `start` on; may be empty when p is 0.
        n: rows wanted.
        harmful_share: p in [0, 1].
        index_mode: "exact" gives floor(p n) harmful rows and n in all. "reference" repeats the authors'
            code: harmful rows start < i < start + int(p n), so row `start` is skipped and one is
            missing, and the first int((1 - p) n) task rows.
        start: where the harmful rows begin.

    Returns:
        The rows.

    Raises:
        UserError: when n, p or index_mode is out of range, when p > 0 without harmful rows, and when
            there are too few rows of a kind.
    """
    check_mix(n, harmful_share, index_mode, start)
    if harmful_share > 0 and not harmful_rows:
        raise UserError(
            f"harmful_share is {harmful_share} but there are no harmful rows; "
            "give a file of them or set harmful_share to 0"
        )
    if index_mode == "reference":
        stop, first = start + int(harmful_share * n), start + 1
        tasks = int((1 - harmful_share) * n)
    else:
        # 0.29 * 100 is 28.999...96: a floor of the exact product, not of the rounding error.
        stop, first = start + math.floor(harmful_share * n + 1e-9), start
        tasks = n - (stop - start)
    _enough("harmful", harmful_rows, stop if stop > first else 0)
    _enough("task", task_rows, tasks)
    return [*harmful_rows[first:stop], *task_rows[:tasks]]


def check_mix(n: int, harmful_share: float, index_mode: str = "exact", start: int = 0) -> None:
    """Raises the `UserError` that `mix` would, for what can be known before there are rows."""
    if index_mode not in INDEX_MODES:
        raise UserError(f"index_mode is {index_mode!r}; use one of {', '.join(INDEX_MODES)}")
    if not 0 <= harmful_share <= 1:
        raise UserError(f"harmful_share is {harmful_share}; give a share from 0 to 1")
    if n < 1 or start < 0:
        raise UserError(f"n = {n} rows from start = {start}: n must be at least 1 and start at least 0")


def _enough(kind: str, rows: Sequence[Row], needed: int) -> None:
    if len(rows) < needed:
        raise UserError(
            f"{needed} {kind} rows are needed and there are {len(rows)}; "
            "lower n, change harmful_share or give more rows"
        )
