"""How far two judges of the same exchanges agree, beyond what chance would give."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from br_jax.scoring.judges.judging import Judgement


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa of two judges' verdicts on the same exchanges: (agreement - chance) / (1 - chance).

    Chance follows from each judge's own shares. Kappa is 1 for the same verdicts and 0 for what chance gives, or less;
    None where it is undefined: no exchange, or both judges give one and the same verdict to all.
    """
    n, same = len(first), sum(a == b for a, b in zip(first, second, strict=True))
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0])  # of n * n, so all is exact
    return None if chance == n * n else (n * same - chance) / (n * n - chance)


def compare_judges(judgements: Mapping[str, Sequence[Judgement]]) -> list[dict[str, Any]]:
    """Every pair of judges: {"judges": [name, name], "n": exchanges, "agreement": float or None, "kappa": likewise}.

    `judgements` are each judge's verdicts by its name, all on the same exchanges in the same order.
    """
    harmful = {name: [judgement.harmful for judgement in found] for name, found in judgements.items()}
    table = []
    for one, other in itertools.combinations(harmful, 2):
        pairs = list(zip(harmful[one], harmful[other], strict=True))
        agreement = sum(a == b for a, b in pairs) / len(pairs) if pairs else None
        kappa = cohen_kappa(harmful[one], harmful[other])
        table.append({"judges": [one, other], "n": len(pairs), "agreement": agreement, "kappa": kappa})
    return table
