"""How much of one adapter is in another: against dense matrices in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import Similarity, components, similarity, similarity_of_change
from br_jax.core.errors import UserError


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
