"""Scores and differences of scores, with 95 % intervals that know which prompts are alike and which trainings are one.

The prompts of a score come in groups (the phrasings of a question, the kinds of a benign prompt), which all seeds
share, and the answers of a seed come from one training. Neither 400 answers to ten phrasings nor 1,200 answers of three
trainings are as many trials. Variances are therefore clustered by group and by seed (A. C. Cameron, J. Gelbach and
D. Miller, JBES 29, 2011; E. Miller, Adding Error Bars to Evals, arXiv 2411.00640), their degrees of freedom are
F. E. Satterthwaite's, though never fewer than the seeds alone give, and a share has E. B. Wilson's interval at its
effective number of prompts (E. L. Korn and B. I. Graubard, Survey Methodology 24, 1998). How often they hold the truth:
experiments/benchmarks/coverage.py.
"""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """What each prompt gave, in [0, 1]: of several seeds one behind the other."""

    values: Sequence[float]
    groups: Sequence[Hashable]  # of each: what it has in common with others, also of other seeds
    seeds: Sequence[int]  # of each: which training answered it

    @classmethod
    def of(cls, values: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0) -> "Sample":
        """Of one seed; without groups each prompt is alone in its own."""
        return cls([*map(float, values)], range(len(values)) if groups is None else [*groups], [seed] * len(values))

    @classmethod
    def join(cls, samples: Sequence["Sample"]) -> "Sample":
        """Those of several seeds together."""
        return cls(*([value for part in parts for value in part] for parts in zip(*samples, strict=True)))


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, as shares, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int  # prompts, of all seeds together
    groups: int
    by_seed: Mapping[int, float]
    variance: float  # of the mean, clustered
    freedom: float  # degrees of freedom of the variance

    @property
    def design_effect(self) -> float:
        """How many times the variance of as many prompts that have nothing in common; NaN where all agree."""
        spread = self.mean * (1 - self.mean)
        return self.variance * self.n / spread if spread > 0 else math.nan

    @property
    def visible(self) -> float:
        """MDE: the smallest true difference from 0 that such a design finds four times of five (two-sided, 5 %)."""
        return (_t(0.975, self.freedom) + _t(0.8, self.freedom)) * math.sqrt(self.variance)

    def needed(self, limit: float) -> tuple[int, int] | None:
        """About how many (groups, seeds) would put the whole interval on this side of a limit; None on it."""
        if (distance := abs(limit - self.mean)) < 1e-3:
            return None
        more = max(1.0, ((self.high if limit > self.mean else self.low) - self.mean) ** 2 / distance**2)
        return math.ceil(more * self.groups), math.ceil(more * len(self.by_seed))

    def to_json(self) -> dict[str, float | int]:
        """The score of one seed: what is printed of it, and its counts."""
        of_one = {"n": self.n, "score": self.mean, "low": self.low, "high": self.high, "groups": self.groups}
        return {"k": round(self.mean * self.n)} | of_one


def estimate(sample: Sample) -> Estimate | None:
    """The mean of a sample with its interval; None of an empty one."""
    if not (n := len(sample.values)):
        return None
    values, seeds = np.asarray(sample.values, float), np.asarray(sample.seeds)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a score's outcomes must be in [0, 1]")
    mean, groups = float(values.mean()), len(set(sample.groups))
    by_seed = {int(seed): float(values[seeds == seed].mean()) for seed in dict.fromkeys(sample.seeds)}
    variance, freedom = _clustered([(1.0, sample)])
    return Estimate(mean, *_wilson(mean, n, variance, freedom), n, groups, by_seed, variance, freedom)


def difference(first: Sample, second: Sample) -> Estimate | None:
    """First minus second, of the seeds that both have; None where they share none.

    The interval is R. G. Newcombe's, by squares of the distances to both scores' own ends, less what the two have in
    common (G. Y. Zou and A. Donner, Statistics in Medicine 27, 2008): the same prompts, phrasings and seeds.
    """
    shared = {*first.seeds} & {*second.seeds}
    first, second = (_of_seeds(sample, shared) for sample in (first, second))
    one, other = estimate(first), estimate(second)
    if one is None or other is None:
        return None
    variance, freedom = _clustered([(1.0, first), (-1.0, second)])
    groups, n = min(one.groups, other.groups), min(one.n, other.n)
    # The ends as of many prompts and seeds, and the distances longer by Student's t: ends of few lie so unevenly that
    # what both share, which is most of them, would no longer cancel.
    (a_low, a_high), (b_low, b_high) = (_wilson(x.mean, x.n, x.variance, math.inf) for x in (one, other))
    z = _t(0.975, math.inf)
    both, longer = math.sqrt(one.variance * other.variance), _t(0.975, freedom) / z
    least = (z / n) ** 2  # where no prompt differs, as much as Wilson's interval of 0 of n has
    in_common = (one.variance + other.variance - max(variance, least)) / (2 * both) if 0 < both < math.inf else 0.0
    in_common = min(1.0, max(-1.0, in_common))
    gap = one.mean - other.mean

    def reach(of_one: float, of_other: float) -> float:
        return longer * math.sqrt(max(0.0, of_one**2 + of_other**2 - 2 * in_common * of_one * of_other))

    low = gap - reach(one.mean - a_low, b_high - other.mean)
    high = gap + reach(a_high - one.mean, other.mean - b_low)
    by_seed = {seed: one.by_seed[seed] - other.by_seed[seed] for seed in one.by_seed}
    return Estimate(gap, max(-1.0, low), min(1.0, high), n, groups, by_seed, variance, freedom)


def _wilson(mean: float, n: int, variance: float, freedom: float) -> tuple[float, float]:
    """Wilson's interval, with Student's t for z, of as many prompts as would have this variance were they unrelated."""
    if math.isinf(variance):  # all of one group: nothing is known of others
        return 0.0, 1.0
    effect = max(1.0, variance * n / (mean * (1 - mean))) if 0 < mean < 1 else 1.0
    per = _t(0.975, freedom) ** 2 * effect / n
    middle = (mean + per / 2) / (1 + per)
    half = math.sqrt(per * (mean * (1 - mean) + per / 4)) / (1 + per)
    return min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half))


def _of_seeds(sample: Sample, seeds: set[int]) -> Sample:
    chosen = [line for line in zip(*sample, strict=True) if line[2] in seeds]
    return Sample(*(map(list, zip(*chosen, strict=True)))) if chosen else Sample([], [], [])


def _clustered(parts: Sequence[tuple[float, Sample]]) -> tuple[float, float]:
    """The variance of a sum of means, each times its sign, by group and by seed, and its degrees of freedom.

    The variance by groups, which holds what prompts do, with what seeds add to what groups and seeds do together; or
    that of the seeds' means alone, where that makes the wider interval.
    """
    residuals, groups, seeds = [], [], []
    for sign, (values, of_groups, of_seeds) in parts:
        values = np.asarray(values, float)
        residuals.append(sign * (values - values.mean()) / len(values))
        groups.extend(of_groups)
        seeds.extend(of_seeds)
    residuals = np.concatenate(residuals)
    codes = {each: place for place, each in enumerate(dict.fromkeys(groups))}
    by_group = np.array([codes[each] for each in groups])
    seeds, by_seed = np.unique(np.asarray(seeds), return_inverse=True)
    f, s = len(codes), len(seeds)

    def squares(codes: np.ndarray) -> float:
        return float((np.bincount(codes, residuals) ** 2).sum())

    if f == 1:
        return (math.inf, 1.0) if s == 1 else (squares(by_seed) * s / (s - 1), s - 1.0)
    of_groups = squares(by_group) * f / (f - 1)
    if s == 1:
        return of_groups, f - 1.0
    of_seeds = squares(by_seed) * s / (s - 1)
    together = squares(by_group * s + by_seed) * f * s / ((f - 1) * (s - 1))
    variance = of_groups + max(0.0, of_seeds - together)
    if variance < 1e-24:  # all alike, but for rounding
        return 0.0, f - 1.0
    freedom = max(s - 1.0, variance**2 / (of_groups**2 / (f - 1) + of_seeds**2 / (s - 1)))
    wider = _t(0.975, s - 1) * math.sqrt(of_seeds) > _t(0.975, freedom) * math.sqrt(variance)
    return (of_seeds, s - 1.0) if wider else (variance, freedom)


def _t(share: float, freedom: float) -> float:
    from scipy.stats import t  # here, for it takes a second to import

    return float(t.ppf(share, freedom))


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two judges, (agreement - chance) / (1 - chance) by their shares; None where it is undefined."""
    n, same = len(first), sum(a == b for a, b in zip(first, second, strict=True))
    counts = Counter(first), Counter(second)
    chance = sum(counts[0][verdict] * counts[1][verdict] for verdict in counts[0])  # of n * n, so all is exact
    return None if chance == n * n else (n * same - chance) / (n * n - chance)


def is_finite(value: Any) -> bool:
    """Whether a value read from JSON is a number that a table or figure can show."""
    return isinstance(value, int | float) and math.isfinite(value)
