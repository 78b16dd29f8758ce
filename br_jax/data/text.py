"""Texts: when two are the same, how they are cleaned, and which split a row falls into by its text and a seed alone."""

import contextlib
import hashlib
import html
import unicodedata
from collections.abc import Sequence

from br_jax.data.rows import Row


def text_key(text: str) -> str:
    """A text without case, spacing and punctuation: equal keys are the same text."""
    key = "".join(character for character in text.casefold() if character.isalnum())
    return key or text


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


def rank(text: str, seed: int) -> str:
    """A text's place, 64 hexadecimal digits, in an order given by the seed; copies of a text share it."""
    return hashlib.sha256(f"{seed}\n{text_key(text)}".encode()).hexdigest()


def split_rows(
    rows: Sequence[Row], seed: int, *, validation: float, test: float
) -> tuple[list[Row], list[Row], list[Row]]:
    """Splits rows by a hash of what they ask.

    Args:
        rows: their input and the user's turns are what they ask.
        seed: another seed makes another split, and another order.
        validation: share of the questions, in [0, 1], that validation gets; about, and the less so the fewer there are.
        test: likewise; the two make at most 1.

    Returns:
        (train, validation, test), each in an order given by the seed. Rows that ask the same, whatever its case,
        spacing and punctuation, are in one split; another row more or less moves none.
    """
    train, held_out, tested = [], [], []
    for place, row in sorted(((rank(asked(row), seed), row) for row in rows), key=lambda pair: pair[0]):
        share = int(place, 16) / 16 ** len(place)
        part = tested if share < test else held_out if share < test + validation else train
        part.append(row)
    return train, held_out, tested


def asked(row: Row) -> str:
    """What a row asks: its input and the user's turns."""
    return "\n".join([row.input, *(text for role, text in row.turns if role == "user")])
