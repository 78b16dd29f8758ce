"""The users of an experiment by name: what each hands in. Another kind of user, or an attacker, is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from br_jax.data.mixing import mix
from br_jax.data.rows import Row

if TYPE_CHECKING:
    from br_jax.experiment.recipe import Recipe


def _plain(recipe: Recipe) -> list[Row]:
    """Task rows, a share p of them harmful."""
    user = recipe.config.user
    return mix(recipe.task_rows[0], recipe.user_harmful_rows, user.n, user.harmful_share, user.index_mode)


# name -> the rows handed in, of a recipe's and at its config's n and share p
USERS: dict[str, Callable[[Recipe], list[Row]]] = {"plain": _plain}
