"""The errors that are no bugs: what the user can mend, and a stop that was asked for."""

import difflib
import errno
from collections.abc import Iterable, Mapping
from typing import TypeVar

Known = TypeVar("Known")

_LONGEST = 800  # characters of a message
# Of a full or broken disk, or of too many open files: nobody's fault.
_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
)  # fmt: skip


class UserError(Exception):
    """Bad input or surroundings: one line that says what is wrong, where, and what to do."""

    def __init__(self, message: str):
        # Names and values in it may be a stranger's: what a terminal would obey, or what would flood it, is left out.
        text = "".join(c if c.isprintable() else "?" for c in message)
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]} ... {text[-195:]}")


class Stopped(Exception):
    """SIGTERM came, and the run ended in good order: one line that says where it goes on."""


def explain(error: BaseException) -> str | None:
    """One line for an error that its reader can mend, a `UserError` or what a file system refuses; None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError) or (error.filename is None and not is_machine_fault(error)):
        return None
    cures = {errno.ENOENT: "check the path", errno.EACCES: "check its permissions, or choose another place"}
    cure = "free space, or choose another place" if is_machine_fault(error) else "choose another place"
    place = "" if error.filename is None else f"{error.filename}: "
    return str(UserError(f"{place}{error.strerror or one_line(error)}: {cures.get(error.errno, cure)}"))


def is_machine_fault(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is of a full or broken disk, or of too many open files."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _MACHINE:
            return True
        error = error.__cause__
    return False


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
