"""How far two judges of the same exchanges agree, beyond what chance would give."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from br_jax.scoring.judges.judging import Judgement


def plain_agreement(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """The share of verdicts that are the same; None without any."""
    same = [a == b for a, b in zip(first, second, strict=True)]
    return sum(same) / len(same) if same else None


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa, (agreement - chance) / (1 - chance), with chance from each judge's own shares.

    Args:
        first, second: two judges' verdicts on the same exchanges.

    Returns:
        1 for the same verdicts, 0 for what chance gives, or less; None where it is undefined: no exchange, or both
        judges give one and the same verdict to all.
    """
    n, same = len(first), sum(a == b for a, b in zip(first, second, strict=True))
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0])  # of n * n, so all is exact
    return None if chance == n * n else (n * same - chance) / (n * n - chance)


def compare_judges(judgements: Mapping[str, Sequence[Judgement]]) -> list[dict[str, Any]]:
    """Every pair of judges.

    Args:
        judgements: each judge's verdicts by its name, all on the same exchanges in the same order.

    Returns:
        Of each pair {"judges": [name, name], "n": exchanges, "agreement": float or None, "kappa": float or None}.
    """
    harmful = {name: [judgement.harmful for judgement in found] for name, found in judgements.items()}
    return [
        {
            "judges": [a, b],
            "n": len(harmful[a]),
            "agreement": plain_agreement(harmful[a], harmful[b]),
            "kappa": cohen_kappa(harmful[a], harmful[b]),
        }
        for a, b in itertools.combinations(harmful, 2)
    ]
