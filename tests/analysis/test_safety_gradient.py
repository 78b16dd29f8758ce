"""The gates' one backward pass against the gradient of the dense kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.analysis.safety_gradient import by_layer, gradient_norms, lengths, safety_gradients
from br_jax.data.batches import encode_rows, make_batches, normalize_per_example
from br_jax.training.loss import batch_loss


@pytest.fixture
def adapters(make_adapter):
    """A safety direction, and a Buffer that has one matrix less."""
    buffer = make_adapter("buffer", seed=1)
    return make_adapter("reinforce", seed=2, rank=2), buffer.replace(
        weights={path: pair for path, pair in buffer.weights.items() if "gate" not in path}
    )


@pytest.mark.parametrize("attached", [False, True])
def test_each_matrix_and_layer_is_the_direct_product(tiny, adapters, rows, attached):
    safety, buffer = adapters
    held = {"buffer": buffer} if attached else None
    found = safety_gradients(tiny, safety, rows, held, max_length=40, batch_size=5)
    examples = normalize_per_example(encode_rows(rows, tiny.tokenizer, tiny.template, 40)[0])
    batch = make_batches(examples, batch_size=16, seed=0, buckets=(40,))[0]
    batch = jax.tree.map(jnp.asarray, batch)
    params = lora.fold(tiny.params, buffer) if attached else tiny.params
    loss = lambda p: batch_loss(tiny.decoder, {"params": p}, batch, 64) / batch["weights"].sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(params)
    norms = gradient_norms(tiny, safety.weights, rows, held, max_length=40, batch_size=5)
    assert norms.keys() == safety.weights.keys()
    for path, pair in safety.weights.items():
        _, part, name = path.split("/")
        kernel = np.asarray(grads["layers"][part][name]["kernel"], np.float64)
        delta = float(safety.scale) * np.float64(pair["a"]) @ np.float64(pair["b"])
        np.testing.assert_allclose(norms[path], np.linalg.norm(kernel, axis=(1, 2)), rtol=1e-5)
        expected = -(kernel * delta).sum((1, 2))
        np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(lengths(safety)[path], np.sqrt((delta**2).sum((1, 2))), rtol=1e-5)
    score = by_layer(found, safety)
    whole = np.sqrt(sum(length**2 for length in lengths(safety).values()))
    np.testing.assert_allclose(score, sum(found.values()) / whole, rtol=1e-5)


def test_a_step_towards_refusals_has_a_score_above_0(tiny, rows, quick):
    from br_jax.training.run import train_adapter

    safety = train_adapter("safety", "reinforce", tiny, rows[:4], quick(steps=20))
    assert by_layer(safety_gradients(tiny, safety, rows[:4], max_length=40), safety).sum() > 0
