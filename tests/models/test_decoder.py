"""The decoder against itself by other routes: packing, folding, remat. Logits and cache: test_families, test_gguf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.models.decoder import Decoder, unembed

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
    variables = {"params": model.params, **collections}
    return forward(Decoder(model.spec, dropout), variables, tokens, positions, segment_ids, rngs)


@functools.partial(jax.jit, static_argnums=0)
def forward(decoder, variables, tokens, positions, segment_ids, rngs=None):
    return decoder.apply(variables, tokens, positions, segment_ids, rngs=rngs or {})[0]


def close(found, expected, tolerance=1e-5):
    """Equal relative to the size of the whole: f32 sums in another order."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_segments_and_padding_isolate_packed_rows(tiny, tokens):
    """Two rows side by side in one, other neighbors, and padding that is not the pad token."""
    expected, n = states(tiny, tokens), 5
    packed = jnp.concatenate([tokens[:1, :n], tokens[1:2, : T - n - 1], tokens[2:, :1]], axis=1)
    packed = jnp.concatenate([packed, tokens[1:].at[:].set(5)])
    places = jnp.asarray([[*range(n), *range(T - n - 1), 0], *[[*range(T)]] * 2])
    segments = jnp.asarray([[1] * n + [2] * (T - n - 1) + [0], *[[0] * T] * 2])
    found = states(tiny, packed, places, segments)
    close(found[0, :n], expected[0, :n])
    close(found[0, n:-1], expected[1, : T - n - 1])
    assert np.isfinite(found).all(), "a row of padding alone is 0/0"


def test_remat_changes_no_gradient(tiny, tokens, make_adapter):
    adapter = lora.collection(make_adapter("user"))

    def gradient(remat):
        def loss(adapter):
            variables, decoder = {"params": tiny.params, "lora_trainable": adapter}, Decoder(tiny.spec, 0.0, remat)
            return jnp.sum(jnp.sin(decoder.apply(variables, tokens, positions_of(tokens), jnp.ones_like(tokens))[0]))

        return jax.jit(jax.grad(loss))(adapter)

    plain = gradient("none")
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain)) > 0
    for remat in ("full", "q, v, down", "offload"):
        jax.tree.map(close, gradient(remat), plain)


def test_dropout_acts_on_the_trainable_adapter_and_with_a_key_only(tiny, tokens, make_adapter):
    adapter, same = lora.collection(make_adapter("user")), np.testing.assert_array_equal

    def run(key=None, dropout=0.5, **collections):
        return states(tiny, tokens, dropout=dropout, rngs=key and {"dropout": jax.random.key(key)}, **collections)

    plain, dropped = run(lora_trainable=adapter), run(1, lora_trainable=adapter)
    same(plain, run(dropout=0.0, lora_trainable=adapter))
    same(dropped, run(1, lora_trainable=adapter))
    assert min(np.abs(dropped - plain).max(), np.abs(dropped - run(2, lora_trainable=adapter)).max()) > 0.01
    same(run(1, lora=adapter), run(lora=adapter))
    silent = jax.tree.map(jnp.zeros_like, adapter)
    same(run(1, lora_trainable=silent), run(lora_trainable=silent))


def test_no_activation_of_a_bf16_layer_is_f32_but_statistics(make_tiny, make_adapter, tokens):
    """No matmul with a weight takes or gives f32, so a f32 adapter costs no f32 arithmetic."""
    model = make_tiny(jnp.bfloat16)
    adapter = lora.collection(make_adapter("user"))
    run = jax.jit(lambda adapter: states(model, tokens, lora=adapter, lora_trainable=adapter))
    statistic = "batching_dims = [0, 1] x [0, 1], contracting_dims = [2] x [2]"  # of a norm: x . x for each token
    matmuls = [line for line in run.lower(adapter).as_text().splitlines() if "dot_general" in line]
    matmuls = [line for line in matmuls if statistic not in line]
    wide = [line for line in matmuls if "xf32>" in line.split("->")[0].rsplit(":", 1)[-1]]
    assert matmuls and not wide, wide
    hidden = jax.eval_shape(run, adapter)
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(functools.partial(unembed, model.spec), model.params, hidden).dtype == jnp.float32
