"""LoRA pytrees: PEFT's initialization, exact stacking and folding, surgery that leaves the rest alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta

from br_jax.adapters import lora
from br_jax.core.errors import UserError

LAYERS, WIDTH = 3, 24
Q, V, DOWN = "layers/attn/q", "layers/attn/v", "layers/mlp/down"
SHAPES = {Q: (LAYERS, WIDTH, 32), DOWN: (LAYERS, 40, WIDTH)}


@pytest.fixture
def base(params):
    """`params` with what no adapter changes."""
    layers = params["layers"] | {"attn_norm": {"scale": jnp.ones((LAYERS, WIDTH))}}
    return {"layers": layers, "embed": {"embedding": jnp.ones((7, WIDTH))}, "head": {"kernel": jnp.ones((WIDTH, 7))}}


@pytest.fixture
def make(params, trained):
    """make(seed, ...) -> a trained adapter of q and down, see `trained`."""
    return lambda seed, targets=("q", "down"), **settings: trained(params, targets=targets, seed=seed, **settings)


def assert_close(found, expected):
    # 1e-5: f32 keeps 6e-8 an operation, in sums of at most 40 products
    found = np.asarray(found, np.float64)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_init_is_peft_s(key):
    adapter = lora.init(key, {Q: (3, 64, 32)}, rank=16, alpha=32, role="user")
    pair = adapter.weights[Q]
    assert pair["a"].shape == (3, 64, 16) and pair["b"].shape == (3, 16, 32)
    assert pair["a"].dtype == pair["b"].dtype == adapter.scale.dtype == jnp.float32
    assert float(adapter.scale) == 2.0 and adapter.roles == ("user",)
    assert not pair["b"].any()
    # uniform in +-1/8: its bound is approached but not passed, its deviation is the bound / sqrt 3
    assert 0.12 < np.abs(pair["a"]).max() <= 0.125
    assert np.std(pair["a"]) == pytest.approx(0.125 / np.sqrt(3), rel=0.03)
    assert not np.array_equal(pair["a"][0], pair["a"][1])
    for rank, alpha in ((0, 8), (4, 0), (4, float("nan"))):
        with pytest.raises(UserError, match=r"user': (rank|alpha) is .*: it must be"):
            lora.init(key, SHAPES, rank, alpha, "user")
    # a draw depends on its own path only
    both = lora.init(key, SHAPES | {V: SHAPES[Q]}, 4, 8, "user").weights
    one = lora.init(key, {DOWN: SHAPES[DOWN]}, 4, 8, "user").weights
    assert list(one) == [DOWN]
    np.testing.assert_array_equal(both[DOWN]["a"], one[DOWN]["a"])
    assert not np.array_equal(both[Q]["a"], both[V]["a"])


def test_target_shapes_reads_abstract_trees(base):
    abstract = jax.eval_shape(lambda: base)
    assert lora.target_shapes(abstract, ("q", "down")) == SHAPES
    assert len(lora.target_shapes(abstract)) == 5
    with pytest.raises(UserError, match=r"'gat'.*near: gate"):
        lora.target_shapes(abstract, ("gat",))


def test_stack_is_the_exact_sum(make, key):
    first, second = make(1), make(2, rank=7, alpha=3, role="buffer")
    third = make(3, rank=2, alpha=1, targets=("v",))
    stacked = lora.stack([first, second, third])
    assert stacked.weights[Q]["a"].shape == (LAYERS, WIDTH, 11)
    assert stacked.roles == ("buffer", "user") and float(stacked.scale) == 1.0
    for path in SHAPES:
        assert_close(delta(stacked)[path], delta(first)[path] + delta(second)[path])
    assert_close(delta(stacked)[V], delta(third)[V])
    named = jax.jit(lora.stack)({"x": first, "y": second, "z": third})
    jax.tree.map(np.testing.assert_array_equal, named, stacked)
    assert lora.collection(lora.stack([])) == {}
    other = lora.init(key, {Q: (LAYERS, WIDTH, 99)}, 4, 8, "buffer")
    with pytest.raises(UserError, match=r"layers/attn/q.*user \(3, 24, 32\).*buffer \(3, 24, 99\)"):
        lora.stack([first, other])


def test_fold_adds_in_f32_rounds_once_and_leaves_all_else_the_same_objects(base, make):
    base, adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base), lora.scaled(make(9), 0.02)
    folded = lora.fold(base, adapter)
    changed = [
        path
        for (path, old), new in zip(jax.tree.leaves_with_path(base), jax.tree.leaves(folded), strict=True)
        if new is not old
    ]
    assert [jax.tree_util.keystr(path, simple=True, separator="/") for path in changed] == [
        "layers/attn/q/kernel",
        "layers/mlp/down/kernel",
    ]
    same = []
    for path, change in delta(adapter).items():
        _, part, name = path.split("/")
        before, after = (np.asarray(tree["layers"][part][name]["kernel"]) for tree in (base, folded))
        expected = (np.float32(before) + np.float32(change)).astype(jnp.bfloat16)
        # the compiler may fuse the multiply and the add, which moves a few of the values that lie at a tie
        assert (after == expected).mean() > 0.999
        same.append((after == before).ravel())
    share = lora.unchanged_share(base, folded, adapter)
    assert share == pytest.approx(np.concatenate(same).mean()) and 0.05 < share < 0.95
    assert lora.unchanged_share(base, base, adapter) == 1.0


def test_validate_names_what_is_wrong(base, make):
    adapter = make(11)
    lora.validate(adapter, base)
    q, down = adapter.weights[Q], adapter.weights[DOWN]
    cases = [
        ({"layers/attn/qq": q}, "'layers/attn/qq'.*near: layers/attn/q"),
        ({"head": q}, "'head' is no kernel"),
        ({"layers/mlp/up": down}, r"\(3, 40, 4\).*\(3, 24, 40\)"),
        ({Q: {"a": q["a"], "b": jnp.ones((3, 5, 32))}}, r"\(3, 5, 32\)"),
        ({Q: {**q, "b": jnp.full((3, 4, 32), jnp.inf)}}, "layers/attn/q/b"),
    ]
    for weights, message in cases:
        with pytest.raises(UserError, match=message):
            lora.validate(adapter.replace(weights=weights), base)
