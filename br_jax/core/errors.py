"""The errors that are no bugs: what the user can mend, and a stop that was asked for."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

Known = TypeVar("Known")


_LONGEST = 800  # characters of a message


class UserError(Exception):
    """Bad input or surroundings: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # Names and values in it may be a stranger's: what a terminal would obey, or what would flood it, is left out.
        text = "".join(c if c.isprintable() else "?" for c in message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]} ... {text[-195:]}")


class Stopped(Exception):
    """SIGTERM came, and the run ended in good order: one line that says where it goes on."""


def near_names(name: str, names: Iterable[str]) -> str:
    """Phrases the end of an error message: the names close to a wrong one, or else all of them."""
    names = sorted(names)
    return f"near: {', '.join(difflib.get_close_matches(str(name), names) or names) or 'there are none'}"


def look_up(kind: str, name: str, known: Mapping[str, Known]) -> Known:
    """What has this name among those of its kind; a `UserError` that names the near ones when nothing has."""
    if name not in known:
        raise UserError(f"unknown {kind} {name!r}; {near_names(name, known)}")
    return known[name]


def one_line(text: object, most: int = 160) -> str:
    """What an error or a file says, short and in one line, for a message."""
    return " ".join(str(text).split())[:most] or type(text).__name__
