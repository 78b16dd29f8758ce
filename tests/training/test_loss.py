"""The answer loss against float64 numpy, for several chunk sizes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from br_jax.training.loss import answer_loss, token_losses

B, T, D, V = 3, 7, 6, 11


@pytest.fixture(params=["tied", "head"])
def case(request):
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"embed": {"embedding": f32(V, D)}} | ({"head": {"kernel": f32(D, V)}} if request.param == "head" else {})
    weights = rng.integers(0, 2, (B, T)) * rng.uniform(0.5, 2, (B, T))
    weights[0], weights[1] = rng.uniform(0.5, 2, T), 0  # a row that is all answer, and one without any
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return params, 3 * f32(B, T, D), targets, jnp.asarray(weights, jnp.float32)


def logits_of(params, hidden, cap=None):
    logits = hidden @ (params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_any_chunk_size_gives_numpy_s_sum(case):
    params, hidden, targets, weights = case
    matrix = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
    logits = log_softmax(np.float64(hidden) @ np.float64(matrix), axis=-1)
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], axis=-1)[..., 0]
    expected = -(np.float64(weights) * picked).sum()
    for chunk in (1, 3, T, T + 1):
        # f32 against f64 over at most 21 terms
        found = answer_loss(params, hidden, targets, weights, chunk)
        assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_value_and_gradient_are_those_of_plain_jax(case, cap):
    params, hidden, targets, weights = case

    def plain(params, hidden):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits_of(params, hidden, cap)), targets[..., None], axis=-1)
        return -jnp.sum(weights * picked[..., 0])

    expected = jax.value_and_grad(plain, (0, 1))(params, hidden)
    ours = jax.value_and_grad(lambda p, h: answer_loss(p, h, targets, weights, 2, cap), (0, 1))
    assert_close(jax.jit(ours)(params, hidden), expected)


def test_the_loss_of_each_token(case):
    params, hidden, targets, weights = case
    each = token_losses(params, hidden, targets, weights, 4)
    assert not np.asarray(each)[np.asarray(weights) == 0].any()
    alone = np.eye(B * T, dtype=np.float32).reshape(B * T, B, T) * (np.asarray(weights) > 0)
    expected = [answer_loss(params, hidden, targets, jnp.asarray(one), 4) for one in alone]
    np.testing.assert_allclose(each.reshape(-1), np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_distance_to_another_model_is_the_kl_divergence(case, cap):
    params, hidden, _, weights = case
    theirs = hidden[:, ::-1] * 0.7

    def plain(params, hidden):
        q, p = (jax.nn.log_softmax(logits_of(params, each, cap)) for each in (hidden, theirs))
        p = jax.lax.stop_gradient(p)
        return jnp.sum(weights * jnp.sum(jnp.exp(p) * (p - q), -1))

    expected = jax.value_and_grad(plain, (0, 1))(params, hidden)
    found = jax.value_and_grad(lambda p, h: answer_loss(p, h, theirs, weights, 2, cap), (0, 1))(params, hidden)
    assert_close(found, expected)
    assert float(answer_loss(params, theirs, theirs, weights, 2, cap)) == pytest.approx(0, abs=1e-5)


def test_the_unembedding_is_not_kept_for_every_chunk(case):
    params, hidden, targets, weights = case
    gradient = jax.jit(jax.grad(lambda h: answer_loss(params, h, targets, weights, 2)))
    shapes = set(re.findall(r"tensor<([0-9x]+)xf32>", gradient.lower(hidden).as_text()))
    assert shapes & {f"{V}x{D}", f"{D}x{V}"}
    assert not [shape for shape in shapes if shape.endswith((f"x{V}x{D}", f"x{D}x{V}"))]


def test_without_answers_loss_and_gradient_are_zero(case):
    params, hidden, targets, weights = case
    loss, grads = jax.value_and_grad(answer_loss, (0, 1))(params, hidden, targets, weights * 0, 3)
    assert float(loss) == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
