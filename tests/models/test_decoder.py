"""The decoder against itself by other routes: a cache, packing, folding, remat. Its logits: test_hf, test_gguf."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.models.attention import Attend
from br_jax.models.decoder import Decoder, abstract_params, init_cache, init_params, join_caches, low_rank, unembed

B, T = 3, 12


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (B, T)), jnp.int32)


def positions_of(tokens):
    return jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] + jnp.zeros_like(tokens)


def states(model, tokens, positions=None, segment_ids=None, rngs=None, dropout=0.0, **collections):
    """Final hidden states of whole sequences, [B, T, D]."""
    positions = positions_of(tokens) if positions is None else positions
    segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
    return forward(
        Decoder(model.spec, dropout), {"params": model.params, **collections}, tokens, positions, segment_ids, rngs
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, variables, tokens, positions, segment_ids, rngs=None):
    return decoder.apply(variables, tokens, positions, segment_ids, rngs=rngs or {})[0]


def close(found, expected, tolerance=1e-5):
    """Equal relative to the size of the whole: f32 sums in another order."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("joined", [False, True])
def test_prefill_and_decode_equal_the_full_forward(tiny, tokens, joined):
    """Over one stacked cache, and over two of unequal sizes that are joined behind the prompt."""
    decoder, prompt = Decoder(tiny.spec), 5
    variables, positions = {"params": tiny.params}, positions_of(tokens)
    cache = init_cache(tiny.spec, B, T + 2, jnp.float32)
    step = jax.jit(lambda cache, token, at: decoder.apply(variables, token, at, jnp.ones_like(at), cache, at[0, 0]))
    if joined:
        parts = [
            (init_cache(tiny.spec, n, prompt + n, jnp.float32), rows)
            for n, rows in ((1, slice(1)), (B - 1, slice(1, B)))
        ]
        ran = [step(cache, tokens[rows, :prompt], positions[rows, :prompt]) for cache, rows in parts]
        hidden, cache = jnp.concatenate([hidden for hidden, _ in ran]), join_caches([cache for _, cache in ran], T + 2)
    else:
        hidden, cache = step(cache, tokens[:, :prompt], positions[:, :prompt])
    found = [hidden]
    for t in range(prompt, T):
        hidden, cache = step(cache, tokens[:, t : t + 1], positions[:, t : t + 1])
        found.append(hidden)
    close(jnp.concatenate(found, axis=1), states(tiny, tokens))


def test_padding_and_neighbors_do_not_change_a_row(tiny, tokens):
    n = 7
    alone = states(tiny, tokens[:1, :n])
    other = tokens.at[1:].set(5).at[0, n:].set(9)  # other neighbors, and padding that is not the pad token
    segments = jnp.ones_like(tokens).at[0, n:].set(0)
    close(states(tiny, other, segment_ids=segments)[0, :n], alone[0])
    assert np.isfinite(states(tiny, other, segment_ids=segments * 0)).all(), "a row of padding alone is 0/0"


def test_segments_isolate_packed_rows(tiny, tokens):
    n = 5
    packed = jnp.concatenate([tokens[:1, :n], tokens[1:2]], axis=1)
    positions = jnp.concatenate([jnp.arange(n), jnp.arange(T)])[None]
    segments = jnp.concatenate([jnp.full(n, 1), jnp.full(T, 2)])[None]
    found = states(tiny, packed, positions, segments)
    close(found[:, :n], states(tiny, tokens[:1, :n]))
    close(found[:, n:], states(tiny, tokens[1:2]))


def test_later_tokens_are_not_seen(tiny, tokens):
    close(states(tiny, tokens.at[:, 8:].set(1))[:, :8], states(tiny, tokens)[:, :8])


def test_remat_changes_no_gradient(tiny, tokens, make_adapter):
    adapter = lora.collection(make_adapter("user"))

    def gradient(remat):
        def loss(adapter):
            variables = {"params": tiny.params, "lora_trainable": adapter}
            hidden, _ = Decoder(tiny.spec, 0.0, remat).apply(
                variables, tokens, positions_of(tokens), jnp.ones_like(tokens)
            )
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.grad(loss))(adapter)

    plain = gradient("none")
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 0
    for remat in ("full", "matmuls", "q, v, down", "offload"):
        jax.tree.map(close, gradient(remat), plain)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_window_in_some_layers_is_the_same_by_the_tpu_kernel(make_tiny, make_adapter, remat):
    """Splash attention in Pallas' interpreter against plain attention: packed rows beyond the window, soft-caps."""
    model = make_tiny(num_layers=3, window=100, windowed=(True, False, True), attention_soft_cap=5.0)
    adapter, rng = lora.collection(make_adapter("user", model=model)), np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (2, 256)), jnp.int32)
    segments = jnp.asarray([[1] * 180 + [2] * 60 + [0] * 16, [1] * 256], jnp.int32)
    positions = jnp.asarray([[*range(180), *range(60), *range(16)], [*range(256)]], jnp.int32)

    def gradient(spec, attention):
        def loss(adapter):
            variables = {"params": model.params, "lora_trainable": adapter}
            hidden, _ = Decoder(spec, 0.0, remat, attention).apply(variables, tokens, positions, segments)
            hidden = jnp.where(segments[..., None] > 0, hidden, 0)
            return jnp.sum(jnp.sin(hidden)), hidden

        (_, hidden), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)
        return hidden, found

    expected, found = (gradient(model.spec, Attend(name, interpret=True)) for name in ("xla", "splash"))
    jax.tree.map(close, found, expected)
    other, _ = gradient(dataclasses.replace(model.spec, windowed=(False, True, False)), Attend("xla"))
    assert np.abs(other - expected[0]).max() > 0.01, "which layers have the window makes no difference here"


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_beside_the_base_equal_a_fold(make_tiny, make_adapter, tokens, tied):
    model = make_tiny(tie_embeddings=tied)
    frozen, trained = make_adapter("buffer", 1), make_adapter("user", 2, rank=4)
    found = states(model, tokens, lora=lora.collection(frozen), lora_trainable=lora.collection(trained))
    folded = lora.fold(model.params, lora.stack([frozen, trained]))
    expected = forward(Decoder(model.spec), {"params": folded}, tokens, positions_of(tokens), jnp.ones_like(tokens))
    close(found, expected)
    close(unembed(model.spec, model.params, found), unembed(model.spec, folded, expected))
    assert np.abs(found - states(model, tokens)).max() > 0.1, "the adapters do nothing here"


def test_dropout_acts_on_the_trainable_adapter_and_with_a_key_only(tiny, tokens, make_adapter):
    adapter = lora.collection(make_adapter("user"))
    key = {"dropout": jax.random.key(1)}
    plain = states(tiny, tokens, dropout=0.5, lora_trainable=adapter)
    np.testing.assert_array_equal(plain, states(tiny, tokens, lora_trainable=adapter))
    dropped = states(tiny, tokens, dropout=0.5, lora_trainable=adapter, rngs=key)
    assert np.abs(dropped - plain).max() > 0.01
    np.testing.assert_array_equal(dropped, states(tiny, tokens, dropout=0.5, lora_trainable=adapter, rngs=key))
    other = {"dropout": jax.random.key(2)}
    assert np.abs(states(tiny, tokens, dropout=0.5, lora_trainable=adapter, rngs=other) - dropped).max() > 0.01
    np.testing.assert_array_equal(
        states(tiny, tokens, dropout=0.5, lora=adapter, rngs=key), states(tiny, tokens, lora=adapter)
    )
    silent = jax.tree.map(jnp.zeros_like, adapter)
    np.testing.assert_array_equal(
        states(tiny, tokens, dropout=0.5, lora_trainable=silent, rngs=key), states(tiny, tokens, lora_trainable=silent)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_rank_gradients_are_those_of_the_formula(dtype):
    rng = np.random.default_rng(0)
    x, a, b, dy = (rng.normal(size=shape) for shape in ((2, 5, 7), (7, 3), (3, 6), (2, 5, 6)))
    x, dy = (jnp.asarray(value, dtype) for value in (x, dy))
    a, b = (jnp.asarray(value, dtype).astype(jnp.float32) for value in (a, b))
    x64, a64, b64, dy64 = (np.float64(value) for value in (x, a, b, dy))
    expected = (
        x64 @ a64 @ b64,
        dy64 @ b64.T @ a64.T,
        np.einsum("btd,bto,ro->dr", x64, dy64, b64),
        np.einsum("btd,dr,bto->ro", x64, a64, dy64),
    )
    y, pullback = jax.vjp(low_rank, x, a, b)
    for found, wanted in zip((y, *pullback(dy)), expected, strict=True):
        # one rounding of the product in the middle to the compute dtype, one of the result
        tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(wanted).max()
        np.testing.assert_allclose(np.float64(found), wanted, rtol=0, atol=tolerance)
    assert y.dtype == dtype and [g.dtype for g in pullback(dy)] == [dtype, jnp.float32, jnp.float32]


def test_f32_adapters_do_not_lift_a_bf16_base(make_tiny, make_adapter, tokens):
    model = make_tiny(jnp.bfloat16)
    adapter = lora.collection(make_adapter("user"))
    hidden = states(model, tokens, lora=adapter, lora_trainable=adapter)
    assert hidden.dtype == jnp.bfloat16
    assert unembed(model.spec, model.params, hidden).dtype == jnp.float32
    cache = init_cache(model.spec, B, T, jnp.bfloat16)
    variables = {"params": model.params, "lora": adapter}
    _, cache = jax.eval_shape(Decoder(model.spec).apply, variables, tokens, tokens, tokens, cache)
    assert cache["layers"]["k"].dtype == cache["layers"]["v"].dtype == jnp.bfloat16


def test_no_activation_of_a_bf16_layer_is_f32_but_statistics(make_tiny, make_adapter, tokens):
    """No matmul with a weight takes or gives f32, so a f32 adapter costs no f32 arithmetic."""
    model = make_tiny(jnp.bfloat16)
    adapter = lora.collection(make_adapter("user"))
    text = jax.jit(lambda adapter: states(model, tokens, lora_trainable=adapter)).lower(adapter).as_text()
    statistic = "batching_dims = [0, 1] x [0, 1], contracting_dims = [2] x [2]"  # of a norm: x . x for each token
    matmuls = [line for line in text.splitlines() if "dot_general" in line and statistic not in line]
    wide = [line for line in matmuls if "xf32>" in line.split("->")[0].rsplit(":", 1)[-1]]
    assert matmuls and not wide, wide


@pytest.mark.parametrize("tied", [True, False])
def test_abstract_params_are_the_shapes_of_init_params(make_tiny, tied):
    spec = make_tiny(tie_embeddings=tied).spec
    params = jax.jit(init_params, static_argnums=0)(spec, jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(spec)) == shapes
    assert ("head" in params) is not tied
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(spec, jnp.bfloat16))} == {jnp.dtype("bfloat16")}
