"""Products and norms with gradients by hand, against the formulas in float64. Blocked attention: test_attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.models.kernels import low_rank, product, rms_norm, turned_product

RNG = np.random.default_rng(0)
X, A, B, DY = (RNG.normal(size=shape) for shape in ((2, 5, 7), (7, 3), (3, 6), (2, 5, 6)))


def check(dtype, function, arguments, cotangent, expected):
    """A function's result and gradients, within a few roundings of the compute dtype, and their dtypes."""
    found, pullback = jax.vjp(function, *arguments)
    gradients = pullback(cotangent)
    assert found.dtype == dtype and [g.dtype for g in gradients] == [x.dtype for x in arguments]
    for one, wanted in zip((found, *gradients), expected, strict=True):
        tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(wanted).max()
        np.testing.assert_allclose(np.float64(one), wanted, rtol=0, atol=tolerance)


def rounded(*values):
    """Values that bf16 holds, in f32 and in f64."""
    held = [jnp.asarray(value, jnp.bfloat16).astype(jnp.float32) for value in values]
    return held, [np.float64(value) for value in held]


def test_product_rounds_both_sides_and_sums_in_f32():
    (w, dy), (w64, dy64) = rounded(RNG.normal(size=(7, 6)), DY)
    (x,), (x64,) = rounded(X)
    expected = x64 @ w64, dy64 @ w64.T, np.einsum("btd,bto->do", x64, dy64)
    check(jnp.float32, lambda x, w: product(x, w, jnp.bfloat16), (x, w), dy, expected)
    lost = jnp.ones_like(x) + 1e-3  # beside 1 in bf16
    np.testing.assert_array_equal(product(lost, w, jnp.bfloat16), product(jnp.ones_like(x), w, jnp.bfloat16))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_turned_product_and_low_rank(dtype):
    """The adapter is f32, and so are its gradients."""
    x, dy, w = (jnp.asarray(value, dtype) for value in (X, DY, RNG.normal(size=(7, 6))))
    found, expected = turned_product(x, w.T), np.float64(x) @ np.float64(w)
    assert found.dtype == dtype and found.shape == (2, 5, 6)
    tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(np.float64(found), expected, rtol=0, atol=tolerance)
    a, b = (jnp.asarray(value, dtype).astype(jnp.float32) for value in (A, B))
    x64, a64, b64, dy64 = map(np.float64, (x, a, b, dy))
    of_a, of_b = np.einsum("btd,bto,ro->dr", x64, dy64, b64), np.einsum("btd,dr,bto->ro", x64, a64, dy64)
    check(
        dtype, lambda *args: low_rank(*args, dtype), (x, a, b), dy, (x64 @ a64 @ b64, dy64 @ b64.T @ a64.T, of_a, of_b)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm(dtype):
    """dx = r (dy - x r^2 mean(x dy)), where r = 1 / sqrt(mean(x^2) + eps)."""
    x, dy = (jnp.asarray(value, dtype) for value in (DY + 0.1, X[..., :6]))
    x64, dy64 = map(np.float64, (x, dy))
    r = 1 / np.sqrt((x64**2).mean(-1, keepdims=True) + 0.5)
    expected = x64 * r, r * (dy64 - x64 * r**2 * (x64 * dy64).mean(-1, keepdims=True))
    check(dtype, lambda x: rms_norm(x, 0.5), (x,), dy, expected)
