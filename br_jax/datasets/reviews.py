"""The movie-review task: sentiment of real review sentences, posed with the paper's SST-2 instruction.

The file is `movieReviewSnippets_GroundTruth.txt` of the vaderSentiment 3.2.1 source distribution (MIT): one
sentence a line with its id and the mean of 20 human ratings from -4 to 4.

References:
    Hutto and Gilbert, VADER: a parsimonious rule-based model for sentiment analysis, ICWSM 2014.
"""

from collections.abc import Iterator
from pathlib import Path

from br_jax.core.errors import UserError
from br_jax.core.io import read_bytes
from br_jax.data.rows import Row
from br_jax.data.text import clean, decode, rank, text_key
from br_jax.datasets.paper import SST2_INSTRUCTION

LABELS = ("positive", "negative")
THRESHOLD = 0.5  # a rating nearer to 0 is no clear opinion


def load_reviews(
    path: str | Path, *, seed: int = 0, test: int = 872, validation: int = 200
) -> tuple[list[Row], list[Row], list[Row]]:
    """Reads the ratings file and splits the reviews; half of the test and validation rows are of each label.

    Which split a sentence falls into depends on its text and the seed alone, not on its place in the file.

    Returns:
        (train, validation, test) rows, in an order given by the seed; train has all that is left. A
        sentence is in one split only, whatever its case, spacing and punctuation.

    Raises:
        UserError: when the file cannot be read, a line is malformed, or there are too few sentences.
    """
    # A sentence counts once, whatever its case, spacing and punctuation; one with two opinions is left out.
    copies: dict[str, list[Row]] = {}
    for row in _read(str(path)):
        copies.setdefault(text_key(row.input), []).append(row)
    distinct = [min(rows, key=lambda row: row.input) for rows in copies.values() if len({r.turns for r in rows}) == 1]
    half_test, half = test // 2, test // 2 + validation // 2
    parts = [], [], []  # of (rank, row)
    for label in LABELS:
        pairs = [(rank(row.input, seed), row) for row in distinct if row.turns[1][1] == label]
        pairs.sort(key=lambda pair: pair[0])
        if len(pairs) <= half:
            raise UserError(
                f"{path}: {len(pairs)} {label} sentences, and more than {half} are needed for {test} "
                f"test and {validation} validation rows; fetch the whole file"
            )
        for part, some in zip(parts, (pairs[half:], pairs[half_test:half], pairs[:half_test]), strict=True):
            part += some
    return tuple([row for _, row in sorted(part, key=lambda pair: pair[0])] for part in parts)


def _read(path: str) -> Iterator[Row]:
    """Yields a row of each sentence of a clear opinion."""
    for number, line in enumerate(read_bytes(path, cure="fetch the file anew").splitlines(), start=1):
        if not line.strip():
            continue
        _, *fields = decode(line).split("\t", maxsplit=2)
        try:
            rating, sentence = float(fields[0]), clean(fields[1])
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}:{number}: not an id, a rating and a sentence between tabs; fetch the file anew"
            ) from error
        if sentence and abs(rating) > THRESHOLD:
            turns = ("user", SST2_INSTRUCTION), ("assistant", LABELS[0] if rating > 0 else LABELS[1])
            yield Row(turns, input=sentence, tag="task", origin=f"{path}:{number}")
