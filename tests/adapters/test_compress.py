"""The best adapter of a lower rank against dense SVDs in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters.compress import best_rank
from br_jax.adapters.lora import Adapter
from br_jax.errors import UserError

LAYERS = 3
# rank 12 over matrices that are wide, tall, and too narrow for it
SIZES = {"layers/attn/q": (40, 24), "layers/attn/v": (24, 40), "layers/mlp/up": (30, 8)}


def adapter(rng, rank=12, scale=-1.7, sizes=SIZES):
    weights = {
        path: {
            "a": jnp.asarray(rng.normal(size=(LAYERS, fan_in, rank)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=(LAYERS, rank, fan_out)), jnp.float32),
        }
        for path, (fan_in, fan_out) in sizes.items()
    }
    return Adapter(weights, jnp.float32(scale), ("reinforce", "user"))


def dense(adapter, path):
    a, b = (np.asarray(adapter.weights[path][name], np.float64) for name in "ab")
    return float(adapter.scale) * a @ b


def truncated(matrices, rank):
    """The best approximation of each of a stack of matrices, and all their singular values."""
    u, sigma, v = np.linalg.svd(matrices, full_matrices=False)
    return (u[..., :rank] * sigma[:, None, :rank]) @ v[:, :rank], sigma


@pytest.mark.parametrize("rank", [1, 5, 8, 11])
def test_the_best_approximation_and_its_error(rank):
    full = adapter(np.random.default_rng(rank))
    found, report = best_rank(full, rank)
    assert float(found.scale) == 1 and found.roles == full.roles
    lost, whole = 0, 0
    for path in SIZES:
        matrices = dense(full, path)
        expected, sigma = truncated(matrices, rank)
        # 1e-5: f32 keeps 6e-8 an operation, and the gaps between these singular values amplify it less than 100 times
        np.testing.assert_allclose(dense(found, path), expected, atol=1e-5 * sigma.max())
        tail, norm = ((sigma[:, part] ** 2).sum(-1) for part in (slice(rank, None), slice(None)))
        np.testing.assert_allclose(report["matrices"][path], np.sqrt(tail / norm), rtol=1e-4, atol=1e-6)
        lost, whole = lost + tail.sum(), whole + norm.sum()
        assert found.weights[path]["a"].shape[-1] == min(rank, *SIZES[path])
    assert report["rank"] == rank and json.loads(json.dumps(report)) == report
    np.testing.assert_allclose(report["relative_error"], np.sqrt(lost / whole), rtol=1e-4)


def test_the_sides_are_balanced():
    found, _ = best_rank(adapter(np.random.default_rng(0)), 4)
    for path in SIZES:
        a, b = (np.asarray(found.weights[path][name], np.float64) for name in "ab")
        _, sigma = truncated(a @ b, 4)
        roots = np.stack([np.diag(each[:4]) for each in sigma])
        for gram in (a.transpose(0, 2, 1) @ a, b @ b.transpose(0, 2, 1)):
            np.testing.assert_allclose(gram, roots, atol=1e-5 * sigma.max())


@pytest.mark.parametrize("rank", [12, 50])
def test_at_its_own_rank_the_delta_stays(rank):
    full = adapter(np.random.default_rng(1))
    found, report = best_rank(full, rank)
    for path in SIZES:
        expected = dense(full, path)
        np.testing.assert_allclose(dense(found, path), expected, atol=1e-6 * np.abs(expected).max() * 12)
    assert report["relative_error"] == 0 and not np.any([*report["matrices"].values()])


def test_a_deficient_delta_is_found_whole_at_its_rank():
    rng = np.random.default_rng(2)
    low = adapter(rng, rank=3)
    mixed = {}
    for path, pair in low.weights.items():
        # a @ m @ pinv(m) @ b: rank 3 in factors of rank 12
        m = rng.normal(size=(3, 12))
        mixed[path] = {
            "a": jnp.asarray(np.asarray(pair["a"], np.float64) @ m, jnp.float32),
            "b": jnp.asarray(np.linalg.pinv(m) @ np.asarray(pair["b"], np.float64), jnp.float32),
        }
    found, report = best_rank(low.replace(weights=mixed), 3)
    for path in SIZES:
        expected = dense(low, path)
        np.testing.assert_allclose(dense(found, path), expected, atol=1e-5 * np.abs(expected).max())
    assert report["relative_error"] < 1e-5


def test_zeros_have_no_error():
    some = adapter(np.random.default_rng(3))
    one_layer = {path: {**pair, "b": pair["b"].at[1].set(0)} for path, pair in some.weights.items()}
    found, report = best_rank(some.replace(weights=one_layer), 2)
    for path in SIZES:
        assert not dense(found, path)[1].any() and dense(found, path)[0].any()
        assert report["matrices"][path][1] == 0 and report["matrices"][path][0] > 0
    nothing = jax.tree.map(jnp.zeros_like, some)
    for zero in (nothing, some.replace(scale=jnp.float32(0))):
        found, report = best_rank(zero, 2)
        assert not any(leaf.any() for leaf in jax.tree.leaves(found.weights))
        assert report["relative_error"] == 0 and not np.any([*report["matrices"].values()])


def test_the_error_of_a_tiny_adapter():
    tiny = adapter(np.random.default_rng(4), scale=1e-24)  # squares below what f32 can hold
    _, report = best_rank(tiny, 2)
    _, expected = best_rank(tiny.replace(scale=jnp.float32(1)), 2)
    np.testing.assert_allclose(report["relative_error"], expected["relative_error"], rtol=1e-4)


def test_no_dense_matrix_is_made():
    sizes = {"layers/mlp/up": (300_000, 200_000)}  # dense: 240 GB a layer
    full = adapter(np.random.default_rng(5), rank=2, sizes=sizes)
    found, report = best_rank(full, 1)
    assert found.weights["layers/mlp/up"]["a"].shape == (LAYERS, 300_000, 1)
    assert 0 < report["relative_error"] < 1


def test_what_cannot_be_compressed():
    full = adapter(np.random.default_rng(6))
    with pytest.raises(UserError, match=r"rank 0.*at least 1"):
        best_rank(full, 0)
    with pytest.raises(UserError, match=r"scale.*NaN"):
        best_rank(full.replace(scale=jnp.float32(jnp.nan)), 2)


def test_an_adapter_without_matrices():
    found, report = best_rank(Adapter({}, jnp.float32(1), ("user",)), 2)
    assert not found.weights and report == {"rank": 2, "relative_error": 0.0, "matrices": {}}
