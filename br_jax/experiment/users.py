"""The users of an experiment by name: what a user hands in. Another kind of user, or an attacker, is one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from br_jax.data.mixing import mix
from br_jax.data.rows import Row
from br_jax.errors import UserError, near_names

if TYPE_CHECKING:
    from br_jax.experiment.recipe import Recipe


class User(NamedTuple):
    """A kind of user.

    Attributes:
        label: for a reader.
        rows: what is handed in, of a recipe's rows and at its config's n and share p.
    """

    label: str
    rows: Callable[[Recipe], list[Row]]


def _mixed(recipe: Recipe) -> list[Row]:
    user = recipe.config.user
    return mix(recipe.task_rows[0], recipe.user_harmful_rows, user.n, user.harmful_share, user.index_mode)


USERS = {
    "plain": User("task rows, a share p of them harmful", _mixed),
}


def get_user(name: str) -> User:
    """The user of that name.

    Raises:
        UserError: when there is none; it names the near ones.
    """
    if name not in USERS:
        raise UserError(f"unknown user {name!r}; {near_names(name, USERS)}")
    return USERS[name]
