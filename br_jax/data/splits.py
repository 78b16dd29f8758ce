"""Which split a row falls into: a matter of its text and a seed alone, not of its place in a file."""

import hashlib
from collections.abc import Sequence

from br_jax.data.rows import Row
from br_jax.data.text import text_key


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
