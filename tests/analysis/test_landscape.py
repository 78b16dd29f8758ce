"""Planes through a model: the points that can be had otherwise, and the directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiles

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import inner_product
from br_jax.analysis.landscape import filter_normalised, loss_grid, orthogonal_to
from br_jax.data.batches import encode_rows, make_batches
from br_jax.training.loss import batch_loss


def loss_of(model, rows, params):
    batch = make_batches(encode_rows(rows, model.tokenizer, model.template, 40)[0], batch_size=len(rows), seed=0,
                         buckets=(40,))[0]  # fmt: skip
    batch = jax.tree.map(jnp.asarray, batch)
    loss = jax.jit(batch_loss, static_argnums=(0, 3))(model.decoder, {"params": params}, batch, 64)
    return float(loss / batch["weights"].sum())


def test_the_plane_of_two_adapters(tiny, make_adapter, rows):
    buffer = make_adapter("buffer")
    other = orthogonal_to(buffer, jax.random.key(1))
    xs, ys = (0.0, 0.5), (-1.0, 0.0)
    with Compiles() as compiles:
        grid = loss_grid(tiny, rows, (buffer, other), xs, ys, max_length=40)
    assert compiles.names.count("jit(_with_adapters)") <= 1
    moved = lora.stack([lora.scaled(buffer, 0.5), lora.scaled(other, -1.0)])
    assert grid[1, 0] == pytest.approx(loss_of(tiny, rows, lora.fold(tiny.params, moved)), rel=1e-5)
    assert grid[0, 1] == pytest.approx(loss_of(tiny, rows, tiny.params), rel=1e-5)
    assert len(np.unique(grid)) == 4


def test_a_random_adapter_of_the_same_length_at_a_right_angle(make_adapter):
    buffer = make_adapter("buffer")
    other = orthogonal_to(buffer, jax.random.key(1))
    square = float(inner_product(buffer, buffer))
    assert float(inner_product(other, other)) == pytest.approx(square, rel=1e-4)
    assert abs(float(inner_product(other, buffer))) < 1e-3 * square
    third = orthogonal_to(buffer, jax.random.key(2))
    assert abs(float(inner_product(other, third))) < 0.2 * square


def test_a_filter_is_as_long_as_the_kernel_s(tiny, rows):
    noise = filter_normalised(tiny.params, jax.random.key(0))
    kernel, drawn = (np.asarray(tree["layers"]["mlp"]["up"]["kernel"]) for tree in (tiny.params, noise))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(kernel, axis=1), rtol=1e-5)
    assert not np.asarray(noise["embed"]["embedding"]).any()
    other = np.asarray(noise["layers"]["mlp"]["gate"]["kernel"])
    assert abs(np.corrcoef(drawn.ravel()[:500], other.ravel()[:500])[0, 1]) < 0.2
    second = filter_normalised(tiny.params, jax.random.key(1))
    grid = loss_grid(tiny, rows, (noise, second), (0.0, 0.3), (0.0, 0.3), max_length=40)
    moved = jax.tree.map(lambda w, x, y: w + 0.3 * x + 0.3 * y, tiny.params, noise, second)
    assert grid[0, 0] == pytest.approx(loss_of(tiny, rows, tiny.params), rel=1e-5)
    assert grid[1, 1] == pytest.approx(loss_of(tiny, rows, moved), rel=1e-4)
