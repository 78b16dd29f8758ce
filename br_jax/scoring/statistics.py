"""Scores with their 95 % intervals, and tests of whether two of them differ; SciPy does the arithmetic."""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


def wilson(k: int, n: int) -> tuple[float, float]:
    """The 95 % interval of k successes in n trials (E. B. Wilson, JASA 22, 1927); of no trials, (0, 1)."""
    from scipy.stats import binomtest  # here, for it takes a second to import

    if n == 0:
        return 0.0, 1.0
    interval = binomtest(k, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Score:
    """k of n prompts; the share (None when nothing was counted) and its 95 % interval follow and are never NaN."""

    k: int
    n: int

    def __post_init__(self):
        if not 0 <= self.k <= self.n:  # refused where they arise, not in the report
            raise ValueError(f"k = {self.k} successes of n = {self.n} trials: need 0 <= k <= n")

    @property
    def score(self) -> float | None:
        return self.k / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.k, self.n)

    def to_json(self) -> dict[str, float | int | None]:
        return {"k": self.k, "n": self.n, "score": self.score} | dict(zip(("low", "high"), self.interval, strict=True))


@dataclass(frozen=True)
class Mean:
    """Mean of scores in [0, 1] that are more than right or wrong; the interval follows and is never NaN."""

    n: int
    mean: float  # 0 of none
    deviation: float  # of the sample; 0 of fewer than two

    def __post_init__(self):
        if not (self.n >= 0 and 0 <= self.mean <= 1 and 0 <= self.deviation <= 1):
            raise ValueError(f"{self!r}: need n >= 0, and mean and deviation in [0, 1]")

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Mean":
        mean = min(1.0, max(0.0, statistics.fmean(scores))) if scores else 0.0
        return cls(len(scores), mean, statistics.stdev(scores) if len(scores) > 1 else 0.0)

    @property
    def score(self) -> float | None:
        return self.mean if self.n else None

    @property
    def interval(self) -> tuple[float, float]:
        """Student's t, kept within [0, 1]; of scores that are all equal Wilson's, as t would claim to be certain."""
        if self.deviation == 0:
            k = self.mean * self.n
            return wilson(math.floor(k), self.n)[0], wilson(math.ceil(k), self.n)[1]
        half = _t_half(self.deviation, self.n)
        return max(0.0, self.mean - half), min(1.0, self.mean + half)

    def to_json(self) -> dict[str, float | int | None]:
        ends = dict(zip(("low", "high"), self.interval, strict=True))
        return {"n": self.n, "score": self.score, "deviation": self.deviation} | ends


def read_score(value: Mapping[str, Any] | None) -> Score | Mean:
    """Reads `to_json`'s dict of either kind, but for the interval, which follows; None ("not measured") is 0 of 0."""
    if value and "k" not in value:
        return Mean(int(value["n"]), float(value["score"] or 0.0), float(value["deviation"]))
    return Score(int(value["k"]), int(value["n"])) if value else Score(0, 0)


def difference(a: Score | Mean, b: Score | Mean) -> tuple[float, float, float] | None:
    """(a - b, low, high) with the 95 % interval of independent samples; None when either was not measured.

    R. G. Newcombe, Statistics in Medicine 17 (1998) 873, method 10: it needs two estimates with their intervals, so
    means may be among them. Models share their prompts, so it is on the wide side.
    """
    if a.score is None or b.score is None:
        return None
    (a_low, a_high), (b_low, b_high) = a.interval, b.interval
    gap = a.score - b.score
    below, above = math.hypot(a.score - a_low, b_high - b.score), math.hypot(a_high - a.score, b.score - b_low)
    return gap, gap - below, gap + above


def t_interval(
    values: Sequence[float], bounds: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float | None, float | None]:
    """(mean, low, high) of a few runs, one value a seed, with Student's 95 % interval clipped to what can be.

    low and high are None of one value; of equal values they are the mean.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return mean, None, None
    half = _t_half(statistics.stdev(values), len(values))
    return mean, max(bounds[0], mean - half), min(bounds[1], mean + half)


def _t_half(deviation: float, n: int) -> float:
    """Half of the width of Student's 95 % interval."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def mcnemar(pairs: Iterable[tuple[bool, bool]]) -> tuple[int, int, float]:
    """McNemar's exact test: how many prompts only the first of each pair counts, only the second, two-sided p-value."""
    from scipy.stats import binomtest

    counts = Counter((bool(first), bool(second)) for first, second in pairs)
    first, second = counts[True, False], counts[False, True]
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's kappa of two judges, (agreement - chance) / (1 - chance) by their shares; None where it is undefined."""
    n, same = len(first), sum(a == b for a, b in zip(first, second, strict=True))
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0])  # of n * n, so all is exact
    return None if chance == n * n else (n * same - chance) / (n * n - chance)


def is_finite(value: Any) -> bool:
    """Whether a value read from JSON is a number that a table or figure can show."""
    return isinstance(value, int | float) and math.isfinite(value)
