"""Bounds of a spec: every number that a file may say is refused in one line where no model has it."""

import dataclasses
import re
import types
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.models.spec import ModelSpec, RopeScaling

SIZES = {"vocab_size": 9, "embed_dim": 8, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
WHOLE = {
    ModelSpec: SIZES | {"ffw_dim": 8},
    RopeScaling: {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192},
}


def fields_of(*kinds):
    """(class, field, kind, whether None may be) of the fields that are annotated with one of these kinds."""
    return [
        pytest.param(owner, field.name, kind, type(None) in said, id=f"{owner.__name__}.{field.name}")
        for owner in WHOLE
        for field in dataclasses.fields(owner)
        for said in [typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)]
        for kind in kinds
        if kind in said
    ]


@pytest.mark.parametrize(("owner", "name", "kind", "optional"), fields_of(int, float))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_number_of_a_model_is_impossible(data, owner, name, kind, optional):
    """Whatever fields there are: a new one without a bound fails here."""
    outside = st.integers(max_value=0) | st.integers(10**13) | st.sampled_from([10**15, 10**400, True, False])
    outside |= st.floats(max_value=0) | st.floats(1e13) | st.just(float("nan")) | st.text() | st.lists(st.just(2))
    if kind is int:
        outside |= st.floats(1.5, 3.5)  # 2.0 and 3.0 as well: a size is no float
    if not optional:
        outside |= st.none()
    value = data.draw(outside)
    with pytest.raises(UserError, match=rf"^(rope_scaling: )?{name} is .*: it must be a (whole )?number") as caught:
        owner(**WHOLE[owner] | {name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("owner", "name", "kind", "optional"), fields_of(bool))
@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_switch_is_true_or_false(owner, name, kind, optional, value):
    with pytest.raises(UserError, match=f"{name} is {value!r}: it must be True or False"):
        owner(**WHOLE[owner] | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_kv_heads 2 does not divide num_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"biases": ("q", "x")}, "biases ['x'] are none of"),
        ({"activation": "relu"}, "activation 'relu': silu or gelu_tanh"),
        ({"windowed": (True, False)}, "windowed says 2 layers of 2, window None"),
        ({"windowed": ("no", "yes"), "window": 3}, "windowed is ('no', 'yes'): it must be True or False"),
        ({"biases": None}, "'NoneType' object is not iterable"),
        ({"rope_scaling": "yarn"}, "must be a mapping, not str"),
        ({"rope_scaling": {"kind": "yarn"}}, "unexpected keyword argument 'kind'"),
        ({"rope_scaling": WHOLE[RopeScaling] | {"low_freq_factor": 4.0}}, "high_freq_factor is 4.0: it must be above"),
        ({"num_layers": 10**9}, "num_layers is 1000000000: it must be a whole number from 1 to 1,000"),
    ],
)
def test_what_does_not_go_together_is_said(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ModelSpec(**WHOLE[ModelSpec] | changes)
