"""Low-rank figures, the best lower rank, and how much of one adapter is in another: against dense float64."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta
from scipy.linalg import subspace_angles

from br_jax.adapters import diagnostics, lora
from br_jax.adapters.diagnostics import Similarity, best_rank, components, similarity, similarity_of_change
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig
from br_jax.core.errors import UserError

PATH = "layers/mlp/down"


def figures(a_user, b_user, a_reinforce, b_reinforce, user_scale=1.0, reinforce_scale=1.0, tau=0.01):
    """One layer's report, from [in, r] and [r, out] factors."""

    def side(a, b, scale):
        pair = {"a": jnp.asarray(a[None], jnp.float32), "b": jnp.asarray(b[None], jnp.float32)}
        return Adapter({PATH: pair}, jnp.float32(scale), ("user",))

    sides = side(a_user, b_user, user_scale), side(a_reinforce, b_reinforce, reinforce_scale)
    report = diagnostics.merge_report(*sides, MergeConfig(tau=tau))["matrices"][PATH]
    return {name: values[0] for name, values in report.items()}


def factors(seed, rank, fan_in=40, fan_out=48):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(fan_in, rank)), rng.normal(size=(rank, fan_out))


@pytest.mark.parametrize(("rank_u", "rank_r"), [(1, 1), (9, 3)])
def test_figures_of_full_rank_adapters(rank_u, rank_r):
    (a_u, b_u), (a_r, b_r) = factors(0, rank_u), factors(1, rank_r)
    found = figures(a_u, b_u, a_r, b_r, user_scale=2.0, reinforce_scale=0.5)
    w_u, w_r = 2.0 * a_u @ b_u, 0.5 * a_r @ b_r
    sigma_u, sigma_r = (np.linalg.svd(w, compute_uv=False) for w in (w_u, w_r))
    for role, sigma, rank in (("user", sigma_u, rank_u), ("reinforce", sigma_r, rank_r)):
        np.testing.assert_allclose(found[f"singular_values_{role}"], sigma[:rank], rtol=1e-5)
        np.testing.assert_allclose(found[f"stable_rank_{role}"], (sigma**2).sum() / sigma[0] ** 2, rtol=1e-5)
    q = np.linalg.qr(b_u.T)[0]
    share = np.linalg.norm(q @ (q.T @ w_r.T)) / np.linalg.norm(w_r)
    np.testing.assert_allclose(found["removed_share"], share, rtol=1e-5)
    angles = np.rad2deg(np.sort(subspace_angles(b_u.T, b_r.T)))
    np.testing.assert_allclose(found["principal_angles"], angles, rtol=1e-4)
    assert found["kept_rank"] == rank_u


def test_angles_that_are_small_or_of_rank_deficient_spans():
    a, b = factors(2, 5)
    rng = np.random.default_rng(3)
    turned = (b + 1e-4 * rng.normal(size=b.shape)).astype(np.float32)
    found = figures(a, b, a, turned)["principal_angles"]
    expected = np.rad2deg(np.sort(subspace_angles(b.astype(np.float32).astype(np.float64).T, turned.T)))
    assert expected.max() < 0.03  # degrees: where an arccos in f32 knows nothing
    np.testing.assert_allclose(found, expected, rtol=0.02)
    rng = np.random.default_rng(4)
    a = rng.normal(size=(40, 6))
    three = rng.normal(size=(3, 48))
    two = three[:2] + np.array([[0.02], [0.3]]) * rng.normal(size=(2, 48))  # about 1 and 15 degrees away
    b_u, b_r = rng.normal(size=(6, 3)) @ three, rng.normal(size=(6, 2)) @ two
    expected = np.rad2deg(np.sort(subspace_angles(three.T, two.T)))
    for first, second in [(b_u, b_r), (b_r, b_u)]:
        found = figures(a, first, a, second)["principal_angles"]
        assert len(found) == 2
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_norms_and_cosines_are_those_of_dense_deltas():
    sizes = {name: (40, 48) for name in ("q", "v", "up")}
    one = adapter(np.random.default_rng(0), 3, 2.0, {name: sizes[name] for name in ("q", "up")})
    other = adapter(np.random.default_rng(7), 3, -0.5, {name: sizes[name] for name in ("q", "v")})
    dense, others = delta(one), delta(other)
    found = diagnostics.geometry({"user": one, "reinforce": other, "none": one.replace(scale=jnp.float32(0))})
    norms = [np.sqrt(sum((w**2).sum() for w in side.values())) for side in (dense, others)]
    assert found["norms"] == pytest.approx({"user": norms[0], "reinforce": norms[1], "none": 0.0}, rel=1e-5)
    cosine = (dense["q"] * others["q"]).sum() / math.prod(norms)
    expected = {"user, reinforce": cosine, "user, none": 0.0, "reinforce, none": 0.0}
    assert found["cosines"] == pytest.approx(expected, rel=1e-4, abs=1e-7)


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


@pytest.mark.parametrize("rank", [8, 50])
def test_the_best_approximation_and_its_error(rank):
    full = adapter(np.random.default_rng(rank))
    for wrong, where, message in ((0, full, "rank is 0"), (2, full.replace(scale=jnp.float32(jnp.nan)), "scale.*NaN")):
        with pytest.raises(UserError, match=message):
            best_rank(where, wrong)
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


def dense(buffer, change):
    """The same from whole matrices, one pair of a Buffer's singular directions at a time."""
    sigmas, part, inner, square = [], [], 0.0, 0.0
    for path, matrices in delta(buffer).items():
        for layer, matrix in enumerate(matrices):
            u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
            other = change[path][layer] if path in change else np.zeros_like(matrix)
            pairs = [k for k in range(len(sigma)) if sigma[k] > 1e-6 * sigma[0]]
            for k in pairs:
                own = u[:, k] @ other @ v[k]
                others = [j for j in pairs if j != k]
                beside = [u[:, k] @ other @ v[j] for j in others] + [u[:, j] @ other @ v[k] for j in others]
                sigmas.append(sigma[k])
                part.append((own - np.sqrt(np.mean(np.square(beside)))) / sigma[k])
            inner, square = inner + (matrix * other).sum(), square + (other**2).sum()
    sigmas, part = np.array(sigmas), np.array(part)
    shares = [min(t, 1) * sigmas[part >= t].sum() / sigmas.sum() for t in part if t > 0]
    return Similarity(inner / np.sqrt((sigmas**2).sum() * square), max(shares, default=0.0))


@pytest.fixture
def adapters(make_adapter):
    """A Buffer and what others may be to it."""
    buffer, user = make_adapter("buffer", rank=4), make_adapter("user", seed=1, rank=3)
    some = {path: pair for path, pair in buffer.weights.items() if path.endswith(("q", "down"))}
    return {
        "itself": buffer,
        "a user's": user,
        "scaled": lora.scaled(buffer, 0.01),
        "turned around": lora.scaled(buffer, -2.0),
        "with a user's": lora.stack([lora.scaled(buffer, 0.4), user]),
        "some matrices": buffer.replace(weights=some),
        "half the rank": buffer.replace(
            weights={p: {"a": w["a"][..., :2], "b": w["b"][:, :2]} for p, w in buffer.weights.items()}
        ),
    }


def test_it_is_what_dense_matrices_say(adapters, tiny):
    reference = components(adapters["itself"])
    for name, adapter in adapters.items():
        expected = dense(adapters["itself"], delta(adapter))
        # the Buffer's directions and all products are f32
        np.testing.assert_allclose(similarity(reference, adapter), expected, rtol=0, atol=2e-5, err_msg=name)
        folded = similarity_of_change(reference, lora.fold(tiny.params, adapter), tiny.params)
        np.testing.assert_allclose(folded, expected, rtol=0, atol=2e-4, err_msg=name)  # of a base that rounds it


def test_factors_do_not_count(adapters):
    """The same delta from other factors, at another scale and a larger rank."""
    buffer = adapters["itself"]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    weights = {p: {"a": w["a"] @ turn * 8, "b": turn.T @ w["b"] / 2} for p, w in buffer.weights.items()}
    other = lora.pad_rank(buffer.replace(weights=weights, scale=buffer.scale / 4), 9)
    np.testing.assert_allclose(similarity(components(buffer), other), (1, 1), atol=1e-5)
    np.testing.assert_allclose(similarity(components(other), buffer), (1, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "scale"), [(1e-37, 1e37, 1), (1e30, 1, 1), (1, 1e-20, 1e20), (1e20, 1e20, 1e-38), (1e-38, 1, 1)]
)
def test_no_size_of_its_factors_hides_it(adapters, a, b, scale):
    """Products of such factors are 0, infinite or NaN in f32. In numpy, as files are read: jax takes 1e-39 for 0."""
    buffer = adapters["itself"]
    sides = jax.device_get(buffer.weights)
    weights = {p: {"a": w["a"] * np.float32(a), "b": w["b"] * np.float32(b)} for p, w in sides.items()}
    other = buffer.replace(weights=weights, scale=np.asarray(buffer.scale) * np.float32(scale))
    np.testing.assert_allclose(similarity(components(buffer), other), (1, min(a * b * scale, 1)), atol=1e-4)


def test_what_is_not_finite_or_cancels_is_refused(adapters, tiny, make_adapter):
    buffer, large = adapters["itself"], make_adapter("user", seed=1)
    for size in (1e6, 1e20):
        pair = [lora.scaled(large, size), lora.scaled(large, -size)]
        with pytest.raises(UserError, match="cancel each other"):
            similarity(components(buffer), lora.stack([*pair, buffer]))
    weights = jax.tree.map(lambda leaf: leaf.at[0, 0, 0].set(jnp.nan), buffer.weights)
    with pytest.raises(UserError, match="NaN or infinity"):
        similarity(components(buffer), buffer.replace(weights=weights))
    params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.inf), tiny.params)
    with pytest.raises(UserError, match="not finite"):
        similarity_of_change(components(buffer), params, tiny.params)


def test_nothing_is_like_nothing_and_what_only_the_other_has_hides_nothing(adapters, make_adapter):
    some, user, buffer = adapters["some matrices"], make_adapter("user", seed=2), adapters["itself"]
    zero, empty = lora.scaled(buffer, 0.0), buffer.replace(weights={})
    for one, other in itertools.product((zero, empty), (zero, empty, buffer)):
        assert similarity(components(one), other) == similarity(components(other), one) == (0, 0)
    more = {path: pair for path, pair in user.weights.items() if path not in some.weights}
    hidden = some.replace(weights={**some.weights, **jax.tree.map(lambda leaf: leaf * jnp.float32(100), more)})
    np.testing.assert_allclose(similarity(components(some), hidden), (1, 1), atol=1e-5)
