"""LoRA pytrees: PEFT's initialization, exact stacking and folding, surgery that leaves the rest alone."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import delta

from br_jax.adapters import lora
from br_jax.errors import UserError

LAYERS, WIDTH, FFW = 2, 24, 40
SHAPES = {"layers/attn/q": (LAYERS, WIDTH, WIDTH), "layers/mlp/down": (LAYERS, FFW, WIDTH)}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    kernel = lambda i, o: {"kernel": jnp.asarray(rng.normal(size=(LAYERS, i, o)), dtype)}  # noqa: E731
    return {
        "embed": {"embedding": jnp.ones((7, WIDTH), dtype)},
        "layers": {
            "attn_norm": {"scale": jnp.ones((LAYERS, WIDTH), dtype)},
            "attn": {name: kernel(WIDTH, WIDTH) for name in "qkvo"},
            "mlp": {"gate": kernel(WIDTH, FFW), "up": kernel(WIDTH, FFW), "down": kernel(FFW, WIDTH)},
        },
        "head": {"kernel": jnp.ones((WIDTH, 7), dtype)},
    }


def trained(seed, rank=4, alpha=8.0, role="user", shapes=SHAPES, size=1.0):
    """An adapter whose b is not zero."""
    adapter = lora.init(jax.random.key(seed), shapes, rank, alpha, role)
    rng = np.random.default_rng(seed)
    weights = {
        path: {"a": pair["a"], "b": jnp.asarray(size * rng.normal(size=pair["b"].shape), jnp.float32)}
        for path, pair in adapter.weights.items()
    }
    return adapter.replace(weights=weights)


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def dense(adapter, path):
    pair = adapter.weights[path]
    return float(adapter.scale) * np.einsum("lir,lro->lio", np.float64(pair["a"]), np.float64(pair["b"]))


def test_init_is_peft_s(key):
    shapes = {"layers/attn/q": (3, 64, 32)}
    adapter = lora.init(key, shapes, rank=16, alpha=32, role="user")
    pair = adapter.weights["layers/attn/q"]
    assert pair["a"].shape == (3, 64, 16) and pair["b"].shape == (3, 16, 32)
    assert pair["a"].dtype == pair["b"].dtype == adapter.scale.dtype == jnp.float32
    assert float(adapter.scale) == 2.0 and adapter.roles == ("user",)
    assert not pair["b"].any()
    # uniform in +-1/8: its bound is approached but not passed, its deviation is the bound / sqrt 3
    assert 0.12 < np.abs(pair["a"]).max() <= 0.125
    assert np.std(pair["a"]) == pytest.approx(0.125 / np.sqrt(3), rel=0.03)
    assert not np.array_equal(pair["a"][0], pair["a"][1])


def test_a_draw_depends_on_its_own_path_only(key):
    both = lora.init(key, SHAPES, 4, 8, "user")
    one = lora.init(key, {"layers/mlp/down": SHAPES["layers/mlp/down"]}, 4, 8, "user")
    assert list(one.weights) == ["layers/mlp/down"]
    np.testing.assert_array_equal(both.weights["layers/mlp/down"]["a"], one.weights["layers/mlp/down"]["a"])
    square = {"layers/attn/q": (1, 8, 8), "layers/attn/v": (1, 8, 8)}
    twins = lora.init(key, square, 4, 8, "user").weights
    assert not np.array_equal(twins["layers/attn/q"]["a"], twins["layers/attn/v"]["a"])


def test_a_draw_is_the_same_in_another_process(key):
    code = (
        "import jax; from br_jax.adapters.lora import init\n"
        "print(float(init(jax.random.key(0), {'layers/attn/q': (1, 8, 8)}, 4, 8, 'user')"
        ".weights['layers/attn/q']['a'].sum()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = lora.init(key, {"layers/attn/q": (1, 8, 8)}, 4, 8, "user").weights["layers/attn/q"]["a"].sum()
    assert float(printed) == float(here)


@pytest.mark.parametrize(("rank", "alpha"), [(0, 8), (4, 0), (4, float("nan"))])
def test_init_refuses_bad_numbers(key, rank, alpha):
    with pytest.raises(UserError, match=r"rank"):
        lora.init(key, SHAPES, rank, alpha, "user")


def test_target_shapes_reads_abstract_trees():
    abstract = jax.eval_shape(make_params)
    assert lora.target_shapes(abstract, ("q", "down")) == SHAPES
    assert len(lora.target_shapes(abstract)) == 5
    with pytest.raises(UserError, match=r"'gat'.*near: gate"):
        lora.target_shapes(abstract, ("gat",))


def test_stack_is_the_exact_sum():
    first = trained(1, rank=4, alpha=8)
    second = trained(2, rank=7, alpha=3, role="buffer")
    third = trained(3, rank=2, alpha=1, role="user", shapes={"layers/attn/v": (LAYERS, WIDTH, WIDTH)})
    stacked = lora.stack([first, second, third])
    assert stacked.weights["layers/attn/q"]["a"].shape == (LAYERS, WIDTH, 11)
    assert stacked.roles == ("buffer", "user") and float(stacked.scale) == 1.0
    for path in SHAPES:
        expected = dense(first, path) + dense(second, path)
        assert relative_error(delta(stacked)[path], expected) <= 1e-5
    assert relative_error(delta(stacked)["layers/attn/v"], dense(third, "layers/attn/v")) <= 1e-5
    named = lora.stack({"x": first, "y": second, "z": third})
    jax.tree.map(np.testing.assert_array_equal, named, stacked)


def test_stack_of_none_is_empty_and_of_misfits_is_refused():
    assert lora.collection(lora.stack([])) == {}
    other = trained(1, shapes={"layers/attn/q": (LAYERS, WIDTH, 99)}, role="buffer")
    with pytest.raises(UserError, match=r"layers/attn/q.*user \(2, 24, 24\).*buffer \(2, 24, 99\)"):
        lora.stack([trained(0), other])


def test_applied_folded_and_stacked_agree():
    params = make_params()
    parts = [trained(4, rank=3), trained(5, rank=6, alpha=5)]
    stacked = lora.stack(parts)
    folded = lora.fold(params, stacked)
    one_by_one = lora.fold(lora.fold(params, parts[0]), parts[1])
    tree = lora.collection(stacked)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(5, WIDTH)), jnp.float32)
    for layer in range(LAYERS):
        kernel = params["layers"]["attn"]["q"]["kernel"][layer]
        pair = tree["layers"]["attn"]["q"]
        applied = x @ kernel + (x @ pair["a"][layer]) @ pair["b"][layer]
        exact = np.float64(x) @ (np.float64(kernel) + sum(dense(p, "layers/attn/q")[layer] for p in parts))
        assert relative_error(applied, exact) <= 1e-5
        assert relative_error(x @ folded["layers"]["attn"]["q"]["kernel"][layer], exact) <= 1e-5
        assert relative_error(x @ one_by_one["layers"]["attn"]["q"]["kernel"][layer], exact) <= 1e-5


def test_collection_mirrors_the_params():
    adapter = trained(7)
    tree, params = lora.collection(adapter), make_params()
    assert sorted(tree["layers"]) == ["attn", "mlp"] and sorted(tree["layers"]["mlp"]["down"]) == ["a", "b"]
    assert set(tree["layers"]["attn"]) <= set(params["layers"]["attn"])
    pair = adapter.weights["layers/mlp/down"]
    np.testing.assert_allclose(tree["layers"]["mlp"]["down"]["b"], 2.0 * pair["b"])
    assert tree["layers"]["mlp"]["down"]["a"] is pair["a"]


def test_fold_leaves_all_else_the_same_objects():
    params = make_params()
    before = jax.tree.map(np.array, params)
    folded = lora.fold(params, trained(8))
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    changed = []
    for (path, old), new in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(folded), strict=True):
        if new is not old:
            changed.append(jax.tree_util.keystr(path, simple=True, separator="/"))
            assert new.dtype == old.dtype and not np.array_equal(new, old)
    assert changed == ["layers/attn/q/kernel", "layers/mlp/down/kernel"]
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_fold_adds_in_f32_and_rounds_once():
    params = make_params(jnp.bfloat16)
    adapter = trained(9, size=0.02)
    folded = lora.fold(params, adapter)
    kernel = params["layers"]["attn"]["q"]["kernel"]
    change = np.asarray(delta(adapter)["layers/attn/q"])
    expected = (np.asarray(kernel, np.float32) + change).astype(jnp.bfloat16)
    found = np.asarray(folded["layers"]["attn"]["q"]["kernel"])
    # the compiler may fuse the multiply and the add, which moves a few of the values that lie at a tie
    assert (found == expected).mean() > 0.999
    share = lora.unchanged_share(params, folded, adapter)
    assert share["layers/attn/q"] == pytest.approx((expected == np.asarray(kernel)).mean(), abs=1e-3)
    assert 0.05 < share["layers/attn/q"] < 0.95
    assert lora.unchanged_share(params, params, adapter) == dict.fromkeys(SHAPES, 1.0)


def test_scaled_scales_the_delta_only():
    adapter = trained(10)
    half = lora.scaled(adapter, 0.5)
    assert relative_error(delta(half)["layers/attn/q"], 0.5 * dense(adapter, "layers/attn/q")) <= 1e-5
    assert half.weights is adapter.weights and half.scale.dtype == jnp.float32


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_detach_undoes_attach(data):
    names = data.draw(st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=5))
    name = data.draw(st.sampled_from(names))
    pieces = {n: lora.Adapter({}, np.float32(i), (n,)) for i, n in enumerate(names)}
    kept = dict(pieces)
    left = lora.detach(pieces, name)
    assert pieces == kept and list(pieces) == names  # the dict that came in is not written
    assert list(left) == [n for n in names if n != name]
    assert all(left[n] is pieces[n] for n in left)


def test_detach_names_the_near_ones():
    with pytest.raises(UserError, match=r"'bufer'.*near: buffer"):
        lora.detach({"buffer": trained(0), "user": trained(1)}, "bufer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"layers/attn/qq": w["layers/attn/q"]}, "'layers/attn/qq'.*near: layers/attn/q"),
        (lambda w: {"head": w["layers/attn/q"]}, "'head' is no kernel"),
        (lambda w: {"layers/mlp/up": w["layers/mlp/down"]}, r"\(2, 40, 4\).*\(2, 24, 40\)"),
        (
            lambda w: {"layers/attn/q": {"a": w["layers/attn/q"]["a"], "b": jnp.ones((2, 5, 24))}},
            r"\(2, 5, 24\)",
        ),
        (
            lambda w: {"layers/attn/q": {**w["layers/attn/q"], "b": jnp.full((2, 4, 24), jnp.inf)}},
            "layers/attn/q/b",
        ),
    ],
)
def test_validate_names_what_is_wrong(change, message):
    adapter, params = trained(11), make_params()
    lora.validate(adapter, params)
    bad = adapter.replace(weights=change(adapter.weights))
    with pytest.raises(UserError, match=message):
        lora.validate(bad, params)


def test_everything_can_be_traced():
    params, parts = make_params(), {"buffer": trained(12, role="buffer"), "user": trained(13)}

    @jax.jit
    def loss(user, buffer):
        tree = lora.collection(lora.stack({"buffer": buffer, "user": lora.scaled(user, 0.5)}))
        pair = tree["layers"]["attn"]["q"]
        return jnp.sum(params["layers"]["attn"]["q"]["kernel"] + pair["a"] @ pair["b"])

    gradient = jax.grad(loss)(parts["user"], parts["buffer"])
    assert gradient.roles == ("user",) and np.asarray(gradient.weights["layers/attn/q"]["b"]).any()
