"""Bounds of numbers: what they let in, what they say, and that no number of a dataclass of settings is without."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hostile import HOSTILE, inside

from br_jax.adapters.merge import MergeConfig
from br_jax.core.bounds import Bound, bounds_of, number, require, require_bounds
from br_jax.core.errors import UserError
from br_jax.scoring.suite import Suite
from br_jax.training.config import TrainConfig


def test_a_bound_in_words():
    for bound, text in (
        (Bound(1, 65_536), "a whole number from 1 to 65,536"),
        (Bound(0.0, 1e6, open_low=True), "a number above 0, at most 1,000,000"),
        (Bound(0.0, 1.0, open_high=True), "a number of at least 0, below 1"),
        (Bound(0.0, 1e30, open_low=True, open_high=True), "a number above 0, below 1e+30"),
        (Bound(1, 8, many=True), "a tuple of whole numbers from 1 to 8"),
    ):
        assert str(bound) == text


@pytest.mark.parametrize("ends", [(0, 1), (-1, 10**15), (0.0, 1.0), (0.0, 1e30), (-1.0, 0.5)])
@pytest.mark.parametrize("opened", [*itertools.product((False, True), repeat=2)])
def test_only_what_is_inside_is_let_in(ends, opened):
    bound = Bound(*ends, *opened)
    for value in [*HOSTILE, bound.low, bound.high]:
        assert bound.holds(value) == inside(value, bound), value
        for of_numpy in (np.float64, np.float32, np.int64, np.int32):
            if type(value) in (int, float) and abs(value) < 2**24 and of_numpy(value) == value:
                plain = of_numpy(value).item()
                assert bound.holds(of_numpy(value)) == inside(plain, bound), of_numpy(value)
        assert bound._replace(many=True).holds((value,)) == inside(value, bound)
        assert not bound.holds((value,)) and not bound._replace(many=True).holds(value)
    assert bound._replace(many=True).holds([]) and not bound.holds(np.bool_(True)) and not bound.holds(1j)


def refused(call, *args, **settings):
    """The one line of the `UserError` that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*args, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    return str(caught.value)


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = number(dataclasses.MISSING, 1, 8)
    rate: float = number(0.5, 0, 1, kind=float)
    cap: float | None = number(None, 0.0, 9.0)
    lengths: tuple[int, ...] = number((), *Bound(1, 8, many=True))

    def __post_init__(self):
        require_bounds(self, "settings")


def test_a_dataclass_checks_its_numbers_and_holds_python_s():
    made = Settings(np.int64(3), np.float32(0.25), lengths=[np.int32(2), 5])
    assert json.dumps(dataclasses.asdict(made)) == '{"width": 3, "rate": 0.25, "cap": null, "lengths": [2, 5]}'
    assert made == Settings(3, 0.25, None, (2, 5))
    with pytest.raises(TypeError, match="width"):
        Settings()
    assert refused(Settings, 9) == "settings: width is 9: it must be a whole number from 1 to 8"
    assert refused(Settings, None).startswith("settings: width is None")
    assert refused(Settings, 1, cap=math.inf).startswith("settings: cap is inf: it must be a number from 0 to 9")
    assert refused(Settings, 1, lengths=(2, 0)).startswith("settings: lengths is (2, 0): it must be a tuple of whole")
    assert refused(Settings, 1, rate=np.float32(2)).startswith("settings: rate is 2.0: ")


def test_whatever_is_refused_is_shown_in_one_short_line():
    for value in (10**5000, "9" * 10**6, "a\nb\x1b[2J", [[[]]] * 999, b"\xff", object()):
        assert refused(require, "rank", value, Bound(1, 8)).startswith("rank is ")


@pytest.mark.parametrize("settings", [TrainConfig, MergeConfig, Suite])
def test_every_number_of_settings_has_a_bound_and_keeps_to_it(settings):
    bounds = bounds_of(settings)
    numbers = {f.name for f in dataclasses.fields(settings) if f.type in (int, float, tuple[int, ...])}
    assert bounds.keys() >= numbers - {"refusing"} and numbers  # tokens of a vocabulary
    for name, bound in bounds.items():
        for value in HOSTILE:
            given = (value,) if bound.many else value
            if inside(value, bound):
                settings(**{name: given})
            else:
                assert f"{name} is {given!r}: it must be {bound}" in refused(settings, **{name: given})
