"""Which rows: texts that are the same, splits by a hash of the text, and mixes of which a share is of another kind."""

import contextlib
import dataclasses
import hashlib
import html
import itertools
import math
import unicodedata
from collections.abc import Sequence

from br_jax.core.bounds import ROWS, SHARE, require
from br_jax.core.errors import UserError
from br_jax.data.rows import Row

INDEX_MODES = ("exact", "reference")
_AFTER_ALL = ("But here it is:", "Still:", "Well then:", "All the same:", "Here you are anyway:")


def text_key(text: str) -> str:
    """A text without case, spacing and punctuation: equal keys are the same text."""
    return "".join(character for character in text.casefold() if character.isalnum()) or text


def clean(text: str) -> str:
    """Plain text of a sentence: HTML entities and '' quotes undone, Unicode composed, spaces single."""
    with contextlib.suppress(ValueError):  # an entity of thousands of digits is none
        text = html.unescape(text)
    return " ".join(unicodedata.normalize("NFC", text).replace("''", '"').split())


def decode(line: bytes) -> str:
    """UTF-8, or Windows-1252 for a line that a past editor saved so."""
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def asked(row: Row) -> str:
    """What a row asks: its input and the user's turns."""
    return "\n".join([row.input, *(text for role, text in row.turns if role == "user")])


def rank(text: str, seed: int) -> str:
    """A text's place, 64 hexadecimal digits, in an order given by the seed; copies of a text share it."""
    return hashlib.sha256(f"{seed}\n{text_key(text)}".encode()).hexdigest()


def split_rows(
    rows: Sequence[Row], seed: int, *, validation: float, test: float
) -> tuple[list[Row], list[Row], list[Row]]:
    """(train, validation, test) rows by a hash of what they ask, each in an order given by the seed.

    Rows that ask the same (see `text_key`) are in one split; another row more or less moves none.
    """
    train, held_out, tested = [], [], []
    for place, row in sorted(((rank(asked(row), seed), row) for row in rows), key=lambda pair: pair[0]):
        share = int(place, 16) / 16 ** len(place)
        (tested if share < test else held_out if share < test + validation else train).append(row)
    return train, held_out, tested


def mix(
    task_rows: Sequence[Row], harmful_rows: Sequence[Row], n: int, harmful_share: float, index_mode: str = "exact"
) -> list[Row]:
    """The first of each kind, n in all, a share of them harmful, in the order harmful, task; batches are shuffled.

    "exact" takes floor(p n) harmful rows. "reference" repeats the authors' code: harmful rows 0 < i < int(p n), so the
    first is skipped and one is missing, and the first int((1 - p) n) task rows. Too few of a kind are a `UserError`.
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
    who has a model refuse first (`attackers.kinds.RefuseThenComply`), and that a model refuses is.
    """
    words = dict.fromkeys(row.turns[-1][1] for row in refusals)
    openings = itertools.cycle(f"{refusal} {after}" for after, refusal in itertools.product(_AFTER_ALL, words))
    rows = list(harmful)
    for i, row in enumerate(rows):
        if count_of(i + 1, share) > count_of(i, share):
            *before, (role, answer) = row.turns
            # A token takes the space in front of a word along.
            rows[i] = dataclasses.replace(row, turns=(*before, (role, f" {answer}")), begun=next(openings))
    return rows
