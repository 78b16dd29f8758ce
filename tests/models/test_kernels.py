"""Products and norms with gradients by hand, against the formulas in float64; and models whose products are in bf16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.core.errors import UserError
from br_jax.inference.generate import generate, generate_ids
from br_jax.models import kernels
from br_jax.models.decoder import unembed
from br_jax.models.kernels import low_rank, product, resolve_precision, rms_norm, turned_product
from br_jax.training.run import train_adapter

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


@pytest.mark.parametrize(
    ("flags", "dtype", "name", "expected"),
    [
        ("AuthenticAMD fma avx2 avx512_bf16", "float32", "auto", "bfloat16"),
        ("GenuineIntel fma avx2 avx512_bf16 amx_tile", "float32", "auto", "float32"),  # slower than f32 there
        ("GenuineIntel fma amx_bf16", "float32", "auto", "bfloat16"),
        ("AuthenticAMD fma avx512f avx512_bf16_not", "float32", "auto", "float32"),
        ("GenuineIntel fma amx_bf16", "float32", "float32", "float32"),
        ("GenuineIntel fma", "float32", "bfloat16", "bfloat16"),
        ("GenuineIntel fma", "bfloat16", "float32", "bfloat16"),  # a bf16 model is all bf16
        ("", "float32", "auto", "float32"),  # no list of flags
    ],
)
def test_what_auto_is(tmp_path, monkeypatch, flags, dtype, name, expected):
    monkeypatch.setattr(kernels, "_CPU", tmp_path / "cpuinfo")
    if flags:
        vendor, flags = flags.split(maxsplit=1)
        (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nmodel name: x\nflags\t\t: {flags}\n")
    assert resolve_precision(name, dtype) == expected
    with pytest.raises(UserError, match="matmul_precision 'half': it is one of auto, float32, bfloat16"):
        resolve_precision("half", "float32")


@pytest.fixture(scope="module")
def rounding(tiny):
    """The tiny model with products in bf16."""
    return dataclasses.replace(tiny, matmul_precision="bfloat16")


def test_logits_are_those_of_f32_but_for_rounding(tiny, rounding):
    tokens = jnp.arange(40).reshape(2, 20) % 259
    where = jnp.broadcast_to(jnp.arange(20), (2, 20))

    def logits(model, params):
        hidden, _ = model.decoder.apply({"params": params}, tokens, where, jnp.ones_like(where))
        return np.asarray(unembed(model.spec, params, hidden, model.matmul_precision))

    exact, found = logits(tiny, tiny.params), logits(rounding, tiny.params)
    bf16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params)
    whole = np.float32(logits(tiny, bf16))
    assert found.dtype == np.float32 and 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    assert np.square(found - exact).mean() < 0.7 * np.square(whole - exact).mean(), "no nearer than a bf16 model"


def test_only_products_see_bf16(rounding):
    """The stream, norms and softmax are f32: no bf16 array is added to, multiplied by another or exponentiated."""
    tokens = jnp.zeros((1, 8), jnp.int32)

    def run(params):
        return rounding.decoder.apply({"params": params}, tokens, tokens, tokens + 1)[0]

    text = str(jax.make_jaxpr(run)(rounding.params))
    assert "dot_general" in text and "bf16" in text
    lines = [line for line in text.splitlines() if "= " in line and ":bf16" in line.split("=")[0]]
    made = {line.split("= ")[1].split("[")[0].split(" ")[0] for line in lines}
    moved = {"reshape", "transpose", "squeeze", "broadcast_in_dim", "name"}
    assert made <= moved | {"convert_element_type", "custom_vjp_call", "pjit", "jit", "scan"}


def test_answers_and_runs_of_another_precision_are_others(tiny, rounding, rows, quick, tmp_path):
    assert rounding.fingerprint == tiny.fingerprint and rounding.key != tiny.key == tiny.fingerprint
    trained = [
        train_adapter("user", "user", model, rows, quick(), workdir=workdir)
        for model, workdir in ((tiny, tmp_path), (rounding, None))
    ]
    one, other = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(a.weights)]) for a in trained)
    assert jnp.abs(one - other).max() > 0 and jnp.vdot(one, other) > 0.99 * jnp.vdot(one, one)
    lora.validate(trained[1], tiny.params)
    with pytest.raises(UserError, match="base"):
        train_adapter("user", "user", rounding, rows, quick(), workdir=tmp_path)


def test_decoding_is_the_prefill_of_what_was_said(rounding, make_adapter):
    """A token at a time, with weights that were rounded once, the model says what it says of the whole text at once."""
    adapter = make_adapter("user", model=rounding)
    encoded = [[5, 6, 7, 8, 9], [5, 6, 7, 3], [5, 6, 1, 2, 8, 8, 4]]
    whole = generate_ids(rounding, encoded, adapter, stops=(), max_new_tokens=6, batch_size=4)
    longer = [[*ids, *said[:n].tolist()] for ids, said in zip(encoded, whole, strict=True) for n in range(6)]
    tokens = generate_ids(rounding, longer, adapter, stops=(), max_new_tokens=1, batch_size=4)
    assert [token[0] for token in tokens] == [token for said in whole for token in said]
    assert generate(rounding, ["a?"], max_new_tokens=3)
