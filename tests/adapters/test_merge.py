"""QR merge against the paper's formula, dense and in float64."""

import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta

from br_jax.adapters import merge
from br_jax.adapters.diagnostics import merge_report
from br_jax.adapters.lora import Adapter, init
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.core.errors import UserError

LAYERS, FAN_IN, FAN_OUT = 2, 96, 80
PATH = "layers/attn/q"


def adapter(a, b, scale=1.0, role="user", path=PATH):
    pair = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}
    return Adapter({path: pair}, jnp.float32(scale), (role,))


def random_adapter(rng, rank, scale=2.0, role="user", fan_in=FAN_IN, fan_out=FAN_OUT, path=PATH):
    a = rng.normal(size=(LAYERS, fan_in, rank)) / np.sqrt(fan_in)
    return adapter(a, 0.02 * rng.normal(size=(LAYERS, rank, fan_out)), scale, role, path)


def dense_merge(user, reinforce, strength, scale=0.5, tau=0.01):
    """The formula scale (W_U + (I - a Q Q^T) W_R) on (A [r, in], B [out, r], s) of each, and the rank it keeps."""
    (a_u, b_u, s_u), (a_r, b_r, s_r) = user, reinforce
    eigenvalues, vectors = np.linalg.eigh(a_u @ a_u.T)
    # an eigenvalue that is exactly 0 comes out of eigh as +-1e-17: "above 0" must not mean that
    kept = eigenvalues > max(tau, 1e-10) * eigenvalues.max()
    effective = b_u if kept.all() else b_u @ vectors[:, kept]
    left, sigma, _ = np.linalg.svd(effective, full_matrices=False)
    real = sigma > 1e-5 * sigma.max(initial=0)
    # thin QR as the paper says it; where B is rank-deficient QR would invent columns, so then the true span
    q = np.linalg.qr(effective)[0] if real.all() else left[:, real]
    w_u, w_r = s_u * b_u @ a_u, s_r * b_r @ a_r
    return scale * (w_u + (np.eye(len(w_r)) - strength * q @ q.T) @ w_r), kept.sum()


def assert_merges_as_dense(user, reinforce, strength, scale=0.5, tau=0.01, factor=1.0):
    """Returns the merged adapter and the ranks that were kept."""
    config = MergeConfig(strength, scale, tau, factor)
    merged, report, ranks = qr_merge(user, reinforce, config), merge_report(user, reinforce, config), set()
    for path, found in delta(merged).items():
        for layer in range(len(found)):
            sides = [
                [*(np.float64(side.weights[path][name][layer]).T for name in "ab"), float(side.scale) * weight]
                for side, weight in ((user, 1), (reinforce, factor))
            ]
            expected, kept = dense_merge(*sides, strength, scale, tau)
            # 1e-5: f32 keeps 6e-8 an operation, and these well-separated spectra amplify it less than 100 times
            assert np.linalg.norm(found[layer].T - expected) <= 1e-5 * np.linalg.norm(expected), (path, layer)
            assert report["matrices"][path]["kept_rank"][layer] == kept
            ranks.add(int(kept))
    return merged, ranks


@pytest.mark.parametrize(("rank_u", "rank_r"), [(1, 1), (64, 3)])
def test_matches_the_dense_formula(rank_u, rank_r):
    rng = np.random.default_rng(rank_u * 100 + rank_r)
    user = random_adapter(rng, rank_u, scale=2.0)
    reinforce = random_adapter(rng, rank_r, scale=0.7, role="reinforce")
    for strength, scale, factor in [(0.0, 0.5, 1.0), (0.1, 0.5, 1.0), (1.0, 0.5, 1.0), (0.5, 1.0, 0.25)]:
        merged, _ = assert_merges_as_dense(user, reinforce, strength, scale, factor=factor)
        assert merged.weights[PATH]["a"].shape == (LAYERS, FAN_IN, rank_u + rank_r)
        assert merged.roles == ("reinforce", "user") and float(merged.scale) == 1.0


def degenerate_users():
    """Users whose factors are not of full rank, by name."""
    rng = np.random.default_rng(7)

    def low_rank(rows, columns, rank):
        return rng.normal(size=(LAYERS, rows, rank)) @ rng.normal(size=(LAYERS, rank, columns)) / 10

    def orthonormal(rows, columns=8):
        return np.linalg.qr(rng.normal(size=(LAYERS, rows, columns)))[0]

    a, b = rng.normal(size=(LAYERS, FAN_IN, 8)), rng.normal(size=(LAYERS, 8, FAN_OUT))
    two_levels = orthonormal(FAN_IN) * np.array([1, 1, 1, 1, 0.03, 0.03, 0.03, 0.03])
    turn = orthonormal(8)
    return {
        "B with zero columns": (a, b * np.array([1, 0, 1, 0, 0, 1, 1, 0])[:, None]),
        "A and B rank-deficient": (low_rank(FAN_IN, 8, 5), low_rank(8, FAN_OUT, 2)),
        "equal singular values": (orthonormal(FAN_IN), orthonormal(FAN_OUT).swapaxes(1, 2)),
        "equal singular values, two levels": (two_levels @ turn, b),
        "B = 0 in one layer": (a, b * np.array([0, 1])[:, None, None]),
        "A = 0": (0 * a, b),
        "tiny B": (a, 1e-12 * b),
    }


@pytest.mark.parametrize("name", degenerate_users())
def test_degenerate_users(name):
    user = adapter(*degenerate_users()[name])
    reinforce = random_adapter(np.random.default_rng(8), 6, role="reinforce")
    for strength in (0.0, 0.1, 1.0):
        for tau in (0.01, 0.0):
            assert_merges_as_dense(user, reinforce, strength, tau=tau)


def test_more_rank_than_the_matrix_has_and_none():
    rng = np.random.default_rng(9)
    user = adapter(rng.normal(size=(LAYERS, 5, 8)), rng.normal(size=(LAYERS, 8, FAN_OUT)))
    assert_merges_as_dense(user, random_adapter(rng, 4, role="reinforce", fan_in=5), 1.0)
    user, reinforce = random_adapter(rng, 16, fan_out=6), random_adapter(rng, 4, role="reinforce", fan_out=6)
    merged = qr_merge(user, reinforce, MergeConfig(a=1.0))
    # the user's columns span the whole output space: nothing of the reinforce adapter may be left
    expected = 0.5 * delta(user)[PATH]
    np.testing.assert_allclose(delta(merged)[PATH], expected, atol=2e-6 * np.abs(expected).max())
    removed = merge_report(user, reinforce, MergeConfig())["matrices"][PATH]["removed_share"]
    np.testing.assert_allclose(removed, 1.0, rtol=1e-5)
    # an untrained user leaves reinforce as it is
    user = adapter(rng.normal(size=(LAYERS, FAN_IN, 8)), np.zeros((LAYERS, 8, FAN_OUT)))
    reinforce = random_adapter(rng, 8, scale=1.0, role="reinforce")
    merged = qr_merge(user, reinforce, MergeConfig(a=1.0, scale=1.0))
    np.testing.assert_array_equal(merged.weights[PATH]["b"][:, 8:], reinforce.weights[PATH]["b"])
    figures = merge_report(user, reinforce, MergeConfig())["matrices"][PATH]
    assert figures["removed_share"] == figures["stable_rank_user"] == [0.0, 0.0]  # a share of nothing is 0, not 0 / 0
    assert figures["principal_angles"] == [[], []]


def test_matrices_of_one_side_only_and_one_compilation_for_all_settings(caplog, compiles):
    rng = np.random.default_rng(12)
    shared = random_adapter(rng, 8), random_adapter(rng, 8, role="reinforce")
    alone = random_adapter(rng, 3, path="layers/attn/v"), random_adapter(rng, 5, path="layers/mlp/up")
    user, reinforce = (s.replace(weights=s.weights | a.weights) for s, a in zip(shared, alone, strict=True))
    with caplog.at_level(logging.WARNING):
        merged = qr_merge(user, reinforce)
    assert sorted(merged.weights) == [PATH, "layers/attn/v"]
    np.testing.assert_allclose(delta(merged)["layers/attn/v"], 0.5 * delta(user)["layers/attn/v"], rtol=1e-5, atol=1e-9)
    report = merge_report(user, reinforce, MergeConfig())
    assert report["ignored"] == ["layers/mlp/up"] and "layers/mlp/up" in caplog.text
    assert report["user_only"] == ["layers/attn/v"] and list(report["matrices"]) == [PATH]
    del compiles[:]
    for strength, scale, tau in [(0, 1, 0), (1, 0.25, 0.5), (np.float64(0.3), 0.5, 0.01)]:
        qr_merge(user, reinforce, MergeConfig(a=strength, scale=scale, tau=tau))
    assert not compiles


def test_refuses_what_must_not_be_merged():
    rng = np.random.default_rng(13)
    user, reinforce = random_adapter(rng, 2), random_adapter(rng, 2, role="reinforce")
    cases = [
        ({"roles": ("buffer", "user")}, {}, r"holds a buffer \(roles buffer\+user\)"),
        ({}, {"roles": ("buffer",)}, "holds a buffer"),
        ({"scale": jnp.float32(np.nan)}, {}, "NaN"),
        ({}, {"weights": {"layers/attn/v": reinforce.weights[PATH]}}, "no matrix in common"),
        ({}, {"weights": random_adapter(rng, 2, fan_out=12).weights}, "disagree.*80.*12"),
    ]
    for of_user, of_reinforce, message in cases:
        with pytest.raises(UserError, match=message):
            qr_merge(user.replace(**of_user), reinforce.replace(**of_reinforce))
    for name, value in (("a", 1.1), ("a", np.nan), ("tau", 1.0), ("scale", np.inf), ("reinforce_scale", -1.0)):
        with pytest.raises(UserError, match=f"merge: {name} is {value}: it must be"):
            MergeConfig(**{name: value})


def test_no_dense_matrix_is_made():
    width, rank = 2048, 4
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    side = {"a": shape(1, width, rank), "b": shape(1, rank, width)}
    compiled = merge._apart_from.lower({"q": (side, side)}, 0.1, 0.01).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * width * width / 8


@pytest.mark.slow
def test_the_blas_of_lapack_is_loaded_before_it_is_limited(key):
    """In another process, which also draws the same adapter as this one does."""
    script = """
import br_jax.adapters.merge, jax, jax.numpy as jnp
from br_jax.adapters.lora import init
from threadpoolctl import threadpool_info
before = {pool["filepath"] for pool in threadpool_info()}
jnp.linalg.qr(jnp.ones((8, 2)))
print({pool["filepath"] for pool in threadpool_info()} - before)
print(float(init(jax.random.key(0), {"layers/attn/q": (1, 8, 8)}, 4, 8, "user").weights["layers/attn/q"]["a"].sum()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded, drawn = done.stdout.split("\n", 1)
    assert loaded == "set()"
    assert float(drawn) == float(init(key, {PATH: (1, 8, 8)}, 4, 8, "user").weights[PATH]["a"].sum())
