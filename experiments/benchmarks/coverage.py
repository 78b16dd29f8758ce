"""How often the 95 % intervals of `scoring.statistics` hold the truth: phrasings and seeds with effects that are known.

python experiments/benchmarks/coverage.py
"""

import functools
import itertools

import numpy as np
from scipy import integrate, optimize, special, stats
from tabulate import tabulate

from br_jax.scoring.statistics import Sample, difference, estimate

GROUPS, PROMPTS = 120, 400  # of a seed
RATES = (0.02, 0.1, 0.5)
SPREADS = ((1.0, 0.3), (1.5, 0.3))  # of the log-odds over phrasings, and over seeds


@functools.cache
def level(rate: float, spread: float) -> float:
    """The log-odds that normal effects of this spread turn into a mean rate."""

    def mean(middle: float) -> float:
        return integrate.quad(lambda z: special.expit(middle + spread * z) * stats.norm.pdf(z), -8, 8)[0]

    return optimize.brentq(lambda middle: mean(middle) - rate, -20, 20)


def draw(rate: float, spreads: tuple[float, float], seeds: int, rng: np.random.Generator, models: int = 1) -> list:
    """Samples of models that answer the same prompts: half of what phrasings do they have in common, seeds nothing."""
    of_groups, of_seeds = spreads
    between = of_groups / 2  # of a phrasing with a seed: an interaction
    middle = level(rate, float(np.sqrt(of_groups**2 + of_seeds**2 + between**2)))
    common, samples = rng.normal(0, of_groups / np.sqrt(2), GROUPS), []
    asked = [np.r_[np.repeat(np.arange(GROUPS), PROMPTS // GROUPS), rng.permutation(GROUPS)[: PROMPTS % GROUPS]]
             for _ in range(seeds)]  # fmt: skip
    for _ in range(models):
        own = common + rng.normal(0, of_groups / np.sqrt(2), GROUPS)
        odds = [middle + own + rng.normal(0, of_seeds) + rng.normal(0, between, GROUPS) for _ in range(seeds)]
        outcomes = [rng.random(PROMPTS) < special.expit(each[groups]) for each, groups in zip(odds, asked, strict=True)]
        each = [
            Sample.of(x, groups.tolist(), seed) for seed, (x, groups) in enumerate(zip(outcomes, asked, strict=True))
        ]
        samples.append(Sample.join(each))
    return samples


def coverage(rate: float, spreads: tuple[float, float], seeds: int, draws: int, seed: int = 0) -> list[float]:
    """The share of draws whose interval holds the truth and its mean half-width, of a score and of a difference."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        first, second = draw(rate, spreads, seeds, rng, models=2)
        score, gap = estimate(first), difference(first, second)
        found.append([score.low <= rate <= score.high, (score.high - score.low) / 2])
        found[-1] += [gap.low <= 0 <= gap.high, (gap.high - gap.low) / 2]
    return np.mean(found, axis=0).tolist()


def main(draws: int = 2000) -> None:
    """Prints a table: coverage in percent, half-widths in points."""
    lines = []
    for seeds, spreads, rate in itertools.product((3, 5), SPREADS, RATES):
        numbers = (f"{100 * share:.1f}" for share in coverage(rate, spreads, seeds, draws))
        lines.append([seeds, *spreads, f"{100 * rate:g}", *numbers])
    header = ["seeds", "spread: phrasings", "seeds", "rate", "score: held", "half", "difference: held", "half"]
    print(tabulate(lines, header, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
