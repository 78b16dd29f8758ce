"""The answer loss against float64 numpy, for every chunk size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.data.batches import encode, make_batches
from br_jax.models.decoder import Decoder, unembed
from br_jax.training.loss import answer_loss, batch_loss

B, T, D, V = 3, 7, 6, 11


def log_softmax(logits):
    logits = np.float64(logits)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def numpy_loss(logits, targets, weights):
    picked = np.take_along_axis(log_softmax(logits), np.asarray(targets)[..., None], axis=-1)[..., 0]
    return -(np.float64(weights) * picked).sum()


@pytest.fixture(params=["tied", "head"])
def case(request):
    rng = np.random.default_rng(0)
    f32 = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"embed": {"embedding": f32(V, D)}} | ({"head": {"kernel": f32(D, V)}} if request.param == "head" else {})
    weights = rng.integers(0, 2, (B, T)) * rng.uniform(0.5, 2, (B, T))
    weights[0], weights[1] = rng.uniform(0.5, 2, T), 0  # a row that is all answer, and one without any
    targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    return params, 3 * f32(B, T, D), targets, jnp.asarray(weights, jnp.float32)


def logits_of(params, hidden):
    return hidden @ (params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T)


def test_every_chunk_size_gives_numpy_s_sum(case):
    params, hidden, targets, weights = case
    matrix = params["head"]["kernel"] if "head" in params else params["embed"]["embedding"].T
    expected = numpy_loss(np.float64(hidden) @ np.float64(matrix), targets, weights)
    for chunk in range(1, T + 2):
        # f32 against f64 over at most 21 terms
        found = answer_loss(params, hidden, targets, weights, chunk)
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_that_of_plain_jax(case):
    params, hidden, targets, weights = case

    def plain(params, hidden):
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits_of(params, hidden)), targets[..., None], axis=-1)
        return -jnp.sum(weights * picked[..., 0])

    expected = jax.grad(plain, (0, 1))(params, hidden)
    found = jax.jit(jax.grad(lambda p, h: answer_loss(p, h, targets, weights, 2), (0, 1)))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_the_soft_cap_is_its_formula(case):
    params, hidden, targets, weights = case

    def plain(params, hidden):
        logits = 3.0 * jnp.tanh(logits_of(params, hidden) / 3.0)
        lse = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (lse - picked))

    expected = jax.value_and_grad(plain, (0, 1))(params, hidden)
    found = jax.value_and_grad(lambda p, h: answer_loss(p, h, targets, weights, 4, 3.0), (0, 1))(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


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


def test_the_answer_and_its_eos_are_what_counts(tiny, rows):
    """One row, from text to loss: -sum log p(byte | before it) over the answer's bytes and <eos>."""
    row = rows[5]
    (_, question), (_, answer) = row.turns
    ids = [
        *question.encode(),
        tiny.tokenizer.convert_tokens_to_ids("<sep>"),
        *answer.encode(),
        tiny.tokenizer.eos_token_id,
    ]
    tokens = jnp.asarray([ids], jnp.int32)
    hidden, _ = jax.jit(Decoder(tiny.spec).apply)(
        {"params": tiny.params}, tokens, jnp.arange(len(ids))[None], jnp.ones_like(tokens)
    )
    steps = log_softmax(unembed(tiny.spec, tiny.params, hidden)[0])
    first = len(question.encode()) + 1
    expected = -sum(steps[i - 1, ids[i]] for i in range(first, len(ids)))
    example = encode(row, tiny.tokenizer, tiny.template, 64)
    batch = jax.tree.map(jnp.asarray, make_batches([example], batch_size=2, seed=0, buckets=(40,))[0])
    assert float(batch["weights"].sum()) == len(answer.encode()) + 1
    found = jax.jit(lambda batch: batch_loss(Decoder(tiny.spec), {"params": tiny.params}, batch, 8))(batch)
    assert float(found) == pytest.approx(expected, rel=1e-5)
