"""The best adapter of a lower rank against dense SVDs in float64."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta

from br_jax.adapters.compress import best_rank
from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError

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


@pytest.mark.parametrize("rank", [1, 8, 12, 50])
def test_the_best_approximation_and_its_error(rank):
    full = adapter(np.random.default_rng(rank))
    found, report = best_rank(full, rank)
    assert float(found.scale) == 1 and found.roles == full.roles
    lost, whole = 0, 0
    for path, dense in delta(full).items():
        u, sigma, v = np.linalg.svd(dense, full_matrices=False)
        expected = (u[..., :rank] * sigma[:, None, :rank]) @ v[:, :rank]
        # 1e-5: f32 keeps 6e-8 an operation, and the gaps between these singular values amplify it less than 100 times
        np.testing.assert_allclose(delta(found)[path], expected, atol=1e-5 * sigma.max())
        tail, norm = ((sigma[:, part] ** 2).sum(-1) for part in (slice(rank, None), slice(None)))
        np.testing.assert_allclose(report["matrices"][path], np.sqrt(tail / norm), rtol=1e-4, atol=1e-6)
        lost, whole = lost + tail.sum(), whole + norm.sum()
        a, b = (np.float64(found.weights[path][name]) for name in "ab")
        width = min(rank, 12, *SIZES[path])
        assert a.shape[-1] == width
        roots = np.stack([np.diag(each[:width]) for each in sigma])  # both sides have the singular values' roots
        for gram in (a.transpose(0, 2, 1) @ a, b @ b.transpose(0, 2, 1)):
            np.testing.assert_allclose(gram, roots, atol=1e-5 * sigma.max())
    assert report["rank"] == rank and json.loads(json.dumps(report)) == report
    np.testing.assert_allclose(report["relative_error"], np.sqrt(lost / whole), rtol=1e-4, atol=1e-12)
    assert (report["relative_error"] == 0) == (rank >= 12)


def test_a_deficient_delta_is_found_whole_at_its_rank():
    rng = np.random.default_rng(2)
    low = adapter(rng, rank=3)
    mixed = {}
    for path, pair in low.weights.items():
        # a @ m @ pinv(m) @ b: rank 3 in factors of rank 12
        m = rng.normal(size=(3, 12))
        a, b = np.float64(pair["a"]) @ m, np.linalg.pinv(m) @ np.float64(pair["b"])
        mixed[path] = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    found, report = best_rank(low.replace(weights=mixed), 3)
    for path, expected in delta(low).items():
        np.testing.assert_allclose(delta(found)[path], expected, atol=1e-5 * np.abs(expected).max())
    assert report["relative_error"] < 1e-5


def test_the_errors_of_zeros_and_of_a_tiny_adapter():
    some = adapter(np.random.default_rng(3))
    one_layer = {path: {**pair, "b": pair["b"].at[1].set(0)} for path, pair in some.weights.items()}
    found, report = best_rank(some.replace(weights=one_layer), 2)
    for path, change in delta(found).items():
        assert not change[1].any() and change[0].any()
        assert report["matrices"][path][1] == 0 and report["matrices"][path][0] > 0
    found, report = best_rank(some.replace(scale=jnp.float32(0)), 2)
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.weights)) and report["relative_error"] == 0
    _, report = best_rank(some.replace(scale=jnp.float32(1e-24)), 2)  # squares below what f32 can hold
    _, expected = best_rank(some, 2)
    np.testing.assert_allclose(report["relative_error"], expected["relative_error"], rtol=1e-4)


def test_no_dense_matrix_is_made():
    sizes = {"layers/mlp/up": (300_000, 200_000)}  # dense: 240 GB a layer
    found, report = best_rank(adapter(np.random.default_rng(5), rank=2, sizes=sizes), 1)
    assert found.weights["layers/mlp/up"]["a"].shape == (LAYERS, 300_000, 1)
    assert 0 < report["relative_error"] < 1


def test_what_cannot_be_compressed():
    full = adapter(np.random.default_rng(6))
    with pytest.raises(UserError, match="rank is 0: it must be a whole number from 1"):
        best_rank(full, 0)
    with pytest.raises(UserError, match=r"scale.*NaN"):
        best_rank(full.replace(scale=jnp.float32(jnp.nan)), 2)
