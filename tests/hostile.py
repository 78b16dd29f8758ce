"""Values that no setting should take on trust, and what of them is in bounds."""

import fractions
import math

HOSTILE = (math.nan, math.inf, -math.inf, -1, 0, 1e30, 1e300, 10**15, -(10**15), 0.5, True, "x", "")


def inside(value, bound):
    """Whether a value is in bounds, by exact fractions."""
    if type(value) not in ((int,) if bound.kind is int else (int, float)) or not math.isfinite(value):
        return False
    value, low, high = map(fractions.Fraction, (value, bound.low, bound.high))
    return low <= value <= high and not (bound.open_low and value == low) and not (bound.open_high and value == high)
