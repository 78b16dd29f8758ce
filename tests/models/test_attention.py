"""Every implementation against plain attention in float64 numpy and against each other, forward and backward."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.core.mesh import make_mesh
from br_jax.data.batches import SHARED
from br_jax.models.attention import IMPLEMENTATIONS, Attend, Place, attend, resolve

H = 16
SCALE = 0.3


def packed(lengths, T, shared=0):
    """Positions and segments of rows that hold these lengths, one list a row, behind `shared` tokens; and padding."""
    positions, segments = np.zeros((len(lengths), T), np.int32), np.zeros((len(lengths), T), np.int32)
    positions[:, :shared], segments[:, :shared] = np.arange(shared), SHARED
    for row, parts in enumerate(lengths):
        start = shared
        for segment, n in enumerate(parts, 1):
            positions[row, start : start + n], segments[row, start : start + n] = shared + np.arange(n), segment
            start += n
    return Place(jnp.asarray(positions), jnp.asarray(segments))


def case(T, B=2, heads=4, kv_heads=2, H=H, shared=0):
    rng = np.random.default_rng(T)
    q, k, v, out = (jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (heads, kv_heads, kv_heads, heads))
    place = packed([[T // 3, T // 4, T // 5 - shared], [T - shared]][:B], T, shared)
    real = (place.segment_ids != 0)[..., None, None]
    return q, k, v, place, jnp.where(real, out, 0)  # what padding gives does not matter


def numpy_attention(q, k, v, place, soft_cap, window):
    """The textbook formula, a query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    positions, segments = np.asarray(place.positions), np.asarray(place.segment_ids)
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        if not segments[b, t]:
            continue
        ahead = positions[b, t] - positions[b]
        seen = np.isin(segments[b], (segments[b, t], SHARED)) & (ahead >= 0) & (ahead < (window or np.inf))
        scores = k[b, seen, n * k.shape[2] // q.shape[2]] @ q[b, t, n] * SCALE
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n * k.shape[2] // q.shape[2]]
    return out


def run(how, q, k, v, place, out):
    """Output and gradients of q, k, v for a random cotangent."""

    def total(q, k, v):
        found = attend(q, k, v, place, place, how._replace(scale=SCALE))
        return jnp.sum(found * out), found

    (_, found), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return jnp.where((place.segment_ids != 0)[..., None, None], found, 0), grads


@pytest.mark.parametrize(("window", "shared", "soft_cap"), [(None, 0, None), (1, 0, 5.0), (7, 3, 5.0)])
def test_plain_attention_is_the_formula(window, shared, soft_cap):
    q, k, v, place, out = case(24, shared=shared)
    found, _ = run(Attend("xla", soft_cap=soft_cap, window=window), q, k, v, place, out)
    np.testing.assert_allclose(found, numpy_attention(q, k, v, place, soft_cap, window), atol=1e-5)


def close(found, expected):
    """Outputs and gradients of `run`, but for the order of sums in f32."""
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


# A row of several blocks of 64 or 128, and one that they do not divide.
# Blocked attention's tiles are of 32: of a beginning that is shared, less than one, one, and more.
@pytest.mark.parametrize(
    ("T", "window", "soft_cap", "shared"),
    [(384, 100, 5.0, 0), (200, None, None, 0), (200, 100, None, 5), (200, None, None, 32), (200, 100, None, 70)],
)
def test_the_fast_ones_equal_plain_attention(T, window, soft_cap, shared):
    parts = case(T, shared=shared)
    expected = run(Attend("xla", soft_cap=soft_cap, window=window), *parts)
    for name in ("blocked", "splash") if T % 128 == 0 else ("blocked",):
        close(run(Attend(name, soft_cap=soft_cap, window=window), *parts), expected)


def test_blocked_makes_no_square():
    def largest(name, T=1024):
        text = jax.jit(run, static_argnums=0).lower(Attend(name), *case(T)).as_text()
        return max(math.prod(map(int, s.split("x"))) for s in re.findall(r"tensor<([0-9x]+)xf32>", text))

    assert largest("blocked") < 1024**2 <= largest("xla")


@pytest.mark.parametrize("rows", [2, 1])  # one row that all prompts share cannot be split
def test_splash_on_a_mesh_takes_each_device_s_rows_and_heads(rows):
    """Whether the caller has set the mesh, or the decoder knows it."""
    parts, mesh = case(128, B=rows), make_mesh(2, 1, 2, devices=jax.devices()[:4])
    expected = run(Attend("xla"), *parts)
    close(run(Attend("splash", mesh=mesh), *parts), expected)
    with jax.set_mesh(mesh):
        close(run(Attend("splash"), *parts), expected)


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "soft_cap", "head_dim", "name", "warns"),
    [
        ("cpu", 64, "float32", None, 64, "xla", False),
        ("cpu", 2048, "float32", None, 64, "blocked", False),
        ("tpu", 1024, "bfloat16", 50.0, 64, "splash", False),
        ("tpu", 400, "bfloat16", None, 64, "blocked", True),
        ("gpu", 80, "bfloat16", None, 64, "cudnn", False),
        ("gpu", 1024, "bfloat16", None, 60, "blocked", True),  # what cuDNN would refuse
        ("gpu", 1024, "bfloat16", None, 256, "blocked", True),
        ("gpu", 81, "bfloat16", None, 64, "xla", False),
    ],
)
def test_the_platform_chooses(platform, length, dtype, soft_cap, head_dim, name, warns, caplog):
    how = resolve(Attend(platform=platform, soft_cap=soft_cap, dtype=jnp.dtype(dtype)), length, head_dim)
    assert how.implementation == name and how.implementation in IMPLEMENTATIONS
    assert any(record.levelname == "WARNING" for record in caplog.records) == warns
