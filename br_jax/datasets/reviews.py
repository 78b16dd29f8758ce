"""The movie-review task: sentiment of real review sentences, posed with the paper's SST-2 instruction.

The file is `movieReviewSnippets_GroundTruth.txt` of the vaderSentiment 3.2.1 source distribution (MIT): one
sentence a line with its id and the mean of 20 human ratings from -4 to 4.

References:
    Hutto and Gilbert, VADER: a parsimonious rule-based model for sentiment analysis, ICWSM 2014.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from br_jax.data.rows import Row
from br_jax.data.splits import rank
from br_jax.data.text import clean, decode, text_key
from br_jax.errors import UserError

INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
LABELS = ("positive", "negative")
THRESHOLD = 0.5  # a rating nearer to 0 is no clear opinion

Reviews = tuple[list[Row], list[Row], list[Row]]


def load_reviews(path: str | Path, *, seed: int = 0, test: int = 872, validation: int = 200) -> Reviews:
    """Reads and splits the reviews; see `split_reviews`.

    Args:
        path: the ratings file.
        seed: another seed makes another split.
        test: test rows, half of them of each label.
        validation: validation rows, likewise.

    Returns:
        (train, validation, test) rows.

    Raises:
        UserError: when the file cannot be read, a line is malformed, or there are too few sentences.
    """
    records = ({"id": f"{path}:{number}", **record} for number, record in parse_reviews(Path(path)))
    return split_reviews(records, seed=seed, test=test, validation=validation, source=str(path))


def split_reviews(
    records: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    test: int = 872,
    validation: int = 200,
    source: str = "the reviews",
) -> Reviews:
    """Splits rated sentences.

    Which split a sentence falls into depends on its text and the seed alone, not on its place in the file.

    Args:
        records: "sentence", "rating" as text and "id", as `parse_reviews` and the builder `reviews` give them.
        seed: another seed makes another split.
        test: test rows, half of them of each label.
        validation: validation rows, likewise.
        source: what a message calls the records.

    Returns:
        (train, validation, test) rows, in an order given by the seed; train has all that is left. A
        sentence is in one split only, whatever its case, spacing and punctuation.

    Raises:
        UserError: when there are too few sentences.
    """
    ranked = {label: [] for label in LABELS}
    for label, row in _distinct(records):
        ranked[label].append((rank(row.input, seed), row))
    train, held_out, tested = [], [], []
    for label, pairs in ranked.items():
        pairs.sort(key=lambda pair: pair[0])
        half_test, half = test // 2, test // 2 + validation // 2
        if len(pairs) <= half:
            raise UserError(
                f"{source}: {len(pairs)} {label} sentences, and more than {half} are needed for {test} "
                f"test and {validation} validation rows; fetch the whole file"
            )
        tested += pairs[:half_test]
        held_out += pairs[half_test:half]
        train += pairs[half:]
    parts = (sorted(part, key=lambda pair: pair[0]) for part in (train, held_out, tested))
    return tuple([row for _, row in part] for part in parts)


def _distinct(records: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Row]]:
    """Yields (label, row) once for each sentence; one with two opinions is left out."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for record in records:
        rating, sentence = float(record["rating"]), record["sentence"]
        if abs(rating) > THRESHOLD:
            label = LABELS[0] if rating > 0 else LABELS[1]
            turns = (("user", INSTRUCTION), ("assistant", label))
            row = Row(turns, input=sentence, tag="task", origin=record["id"])
            found.setdefault(text_key(sentence), []).append((label, row))
    for copies in found.values():
        if len({label for label, _ in copies}) == 1:
            yield min(copies, key=lambda copy: copy[1].input)


def parse_reviews(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, {"sentence": cleaned, "rating": as the file writes it}); no blank sentences.

    Raises:
        UserError: when the file cannot be read or a line is malformed.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot read the reviews ({error.strerror}); fetch the file or correct its path"
        ) from error
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        _, *fields = decode(line).split("\t", maxsplit=2)
        try:
            float(fields[0])
            record = {"sentence": clean(fields[1]), "rating": fields[0]}
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{path}:{number}: not an id, a rating and a sentence between tabs; fetch the file anew"
            ) from error
        if record["sentence"]:
            yield number, record
