"""The range of each number of a dataclass, said where the field is and checked when one is made."""

import dataclasses
from typing import Any, NamedTuple

from br_jax.errors import UserError, one_line


class Bound(NamedTuple):
    """What a number may be. NaN, infinity and `True` never are."""

    low: float
    high: float
    open_low: bool = False  # low itself is excluded
    open_high: bool = False
    kind: type = int  # whole numbers; or float, which whole ones are too
    optional: bool = False  # None may be, too

    def require(self, value: Any, what: str) -> None:
        """Refuses a value outside of the bound, in a `UserError` that begins with `what`."""
        if value is None and self.optional:
            return
        if type(value) in (int, self.kind):
            above = self.low < value if self.open_low else self.low <= value
            below = value < self.high if self.open_high else value <= self.high
            if above and below:
                return
        raise UserError(f"{what} is {one_line(repr(value))}: it must be {self}")

    def __str__(self) -> str:
        """E.g. "a whole number from 1 to 65536", "a number above 0, up to 1, or None"."""
        low = f"above {self.low}" if self.open_low else f"from {self.low}"
        high = f"below {self.high}" if self.open_high else f"up to {self.high}" if self.open_low else f"to {self.high}"
        kind = "a whole number" if self.kind is int else "a number"
        return f"{kind} {low}{', ' if self.open_low else ' '}{high}{', or None' if self.optional else ''}"


def number(default: Any, low: float, high: float, **how: Any) -> Any:
    """A dataclass field with a `Bound`, whose other settings are `how`; without default if it is `MISSING`."""
    return dataclasses.field(default=default, metadata={"bound": Bound(low, high, **how)})


def require_bounds(instance: Any, owner: str) -> None:
    """Checks every field that has a bound; the `UserError` begins with owner and field, e.g. "user: rank is -1"."""
    for field in dataclasses.fields(instance):
        if "bound" in field.metadata:
            field.metadata["bound"].require(getattr(instance, field.name), f"{owner}: {field.name}")
