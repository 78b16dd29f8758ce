"""The numbers that a setting may have: said once, beside the setting, and checked before anything is done with it."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from br_jax.core.errors import UserError, one_line


class Bound(NamedTuple):
    """The range of a number; a whole number where both ends are whole numbers."""

    low: float
    high: float
    open_low: bool = False  # whether `low` itself is out
    open_high: bool = False  # likewise
    many: bool = False  # a tuple of such numbers

    @property
    def kind(self) -> type:
        """int or float."""
        return int if isinstance(self.low, int) and isinstance(self.high, int) else float

    def holds(self, value: object) -> bool:
        """Whether a value is such a number, Python's or numpy's; a bool, NaN, an infinity or a text is none."""
        if self.many:
            return isinstance(value, tuple | list) and all(map(self._replace(many=False).holds, value))
        kinds = (int, np.integer) if self.kind is int else (int, float, np.integer, np.floating)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        above = self.low < value if self.open_low else self.low <= value
        return bool(above and (value < self.high if self.open_high else value <= self.high))

    def __str__(self) -> str:
        """As "a whole number from 1 to 8", or "a number above 0, at most 1"."""
        low, high = (f"{end:,}" if self.kind is int else f"{end:,.15g}" for end in (self.low, self.high))
        noun = "whole number" if self.kind is int else "number"
        ends = f"from {low} to {high}"
        if self.open_low or self.open_high:
            least, most = "above" if self.open_low else "of at least", "below" if self.open_high else "at most"
            ends = f"{least} {low}, {most} {high}"
        return f"a tuple of {noun}s {ends}" if self.many else f"a {noun} {ends}"


# Of settings in several places. The tops catch mistakes; what a machine can hold is its own matter.
RANK = Bound(1, 65_536)  # of an adapter
ALPHA = Bound(0.0, 1e6, open_low=True)  # lora_alpha
TOKENS = Bound(1, 1 << 24)  # of a text
BATCH = Bound(1, 1 << 20)  # rows run together
ROWS = Bound(0, 10_000_000)  # of a data set; all are held in memory
SHARE = Bound(0.0, 1.0)
SEED = Bound(0, 2**32 - 1)  # what Grain shuffles by


def number(
    default: Any,
    low: float,
    high: float,
    open_low: bool = False,
    open_high: bool = False,
    many: bool = False,
    *,
    kind: type | None = None,
) -> Any:
    """A dataclass field that `require_bounds` checks.

    Args:
        default: `dataclasses.MISSING` for none; where it is None, the field may be None.
        low, high, open_low, open_high, many: see `Bound`.
        kind: int or float, in place of what the ends say.
    """
    if kind is not None:
        low, high = kind(low), kind(high)
    bound = Bound(low, high, open_low, open_high, many)
    return dataclasses.field(default=default, metadata={"bound": bound})


def bounds_of(settings: type) -> dict[str, Bound]:
    """The bound of each number of a dataclass."""
    return {f.name: f.metadata["bound"] for f in dataclasses.fields(settings) if "bound" in f.metadata}


def require(name: str, value: object, bound: Bound) -> None:
    """Raises a `UserError` where a value is out of bounds: "rank is -1: it must be a whole number from 1 to 8"."""
    if not bound.holds(value):
        raise UserError(f"{name} is {_shown(value)}: it must be {bound}")


def require_bounds(instance: object, owner: str = "") -> None:
    """`require` for every number of a dataclass's instance; those of numpy become Python's, as JSON wants them.

    Args:
        owner: whose settings they are, for the message.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(instance)}
    for name, bound in bounds_of(type(instance)).items():
        value = getattr(instance, name)
        if value is None and defaults[name] is None:
            continue
        require(f"{owner}: {name}" if owner else name, value, bound)
        object.__setattr__(instance, name, tuple(map(_plain, value)) if bound.many else _plain(value))


def _plain(value: Any) -> int | float:
    return value.item() if isinstance(value, np.generic) else value


def _shown(value: object) -> str:
    try:
        return one_line(repr(_plain(value)), 60)
    except ValueError:  # Python writes no int of more than 4,300 digits
        return "a number of thousands of digits"
