"""Gradients along safety, planes through a model and what a merge can change, against dense matrices and directly."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiles
from oracles import delta

from br_jax import analysis
from br_jax.adapters import lora
from br_jax.adapters.diagnostics import inner_product
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.core.errors import UserError
from br_jax.data.batches import encode_rows, make_batches, normalize_per_example
from br_jax.training.loss import batch_loss
from br_jax.training.run import train_adapter


def mean_loss(model, rows, weigh=lambda examples: examples):
    """Params -> the mean loss of rows in one batch."""
    examples = weigh(encode_rows(rows, model.tokenizer, model.template, 40)[0])
    batch = jax.tree.map(jnp.asarray, make_batches(examples, batch_size=16, seed=0, buckets=(40,))[0])
    return jax.jit(lambda p: batch_loss(model.decoder, {"params": p}, batch, 64) / batch["weights"].sum())


def test_gradients_of_each_matrix_and_layer_are_the_direct_ones(tiny, make_adapter, rows):
    """Alone and beside a Buffer that has one matrix less."""
    safety, buffer = make_adapter("reinforce", seed=2, rank=2), make_adapter("buffer", seed=1)
    buffer = buffer.replace(weights={path: pair for path, pair in buffer.weights.items() if "gate" not in path})
    gradient = jax.jit(jax.grad(mean_loss(tiny, rows, normalize_per_example)))
    for held, params in ((None, tiny.params), ({"buffer": buffer}, lora.fold(tiny.params, buffer))):
        found = analysis.safety_gradients(tiny, safety, rows, held, max_length=40, batch_size=5)
        norms = analysis.gradient_norms(tiny, safety.weights, rows, held, max_length=40, batch_size=5)
        grads, lengths = gradient(params), analysis.lengths(safety)
        for path, dense in delta(safety).items():
            _, part, name = path.split("/")
            kernel = np.asarray(grads["layers"][part][name]["kernel"], np.float64)
            np.testing.assert_allclose(norms[path], np.linalg.norm(kernel, axis=(1, 2)), rtol=1e-5)
            expected = -(kernel * dense).sum((1, 2))
            np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
            np.testing.assert_allclose(lengths[path], np.linalg.norm(dense, axis=(1, 2)), rtol=1e-5)
        whole = np.sqrt(sum(length**2 for length in lengths.values()))
        np.testing.assert_allclose(analysis.by_layer(found, safety), sum(found.values()) / whole, rtol=1e-5)


def test_a_step_towards_refusals_has_a_score_above_0(tiny, rows, quick):
    safety = train_adapter("safety", "reinforce", tiny, rows[:4], quick(steps=20))
    assert analysis.by_layer(analysis.safety_gradients(tiny, safety, rows[:4], max_length=40), safety).sum() > 0


def test_the_plane_of_two_adapters_and_a_direction_of_the_same_length_at_a_right_angle(tiny, make_adapter, rows):
    buffer, loss = make_adapter("buffer"), mean_loss(tiny, rows)
    other, third = (analysis.orthogonal_to(buffer, jax.random.key(seed)) for seed in (1, 2))
    square = inner_product(buffer, buffer)
    assert inner_product(other, other) == pytest.approx(square, rel=1e-4)
    assert abs(inner_product(other, buffer)) < 1e-3 * square and abs(inner_product(other, third)) < 0.2 * square
    with Compiles() as compiles:
        grid = analysis.loss_grid(tiny, rows, (buffer, other), (0.0, 0.5), (-1.0, 0.0), max_length=40)
    assert compiles.names.count("jit(_loss)") <= 1 and len(np.unique(grid)) == 4
    moved = lora.stack([lora.scaled(buffer, 0.5), lora.scaled(other, -1.0)])
    assert grid[1, 0] == pytest.approx(float(loss(lora.fold(tiny.params, moved))), rel=1e-5)
    assert grid[0, 1] == pytest.approx(float(loss(tiny.params)), rel=1e-5)


def test_a_filter_is_as_long_as_the_kernel_s(tiny, rows):
    noise, second = (analysis.filter_normalised(tiny.params, jax.random.key(seed)) for seed in (0, 1))
    kernel, drawn = (np.asarray(tree["layers"]["mlp"]["up"]["kernel"]) for tree in (tiny.params, noise))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(kernel, axis=1), rtol=1e-5)
    assert not np.asarray(noise["embed"]["embedding"]).any()
    other = np.asarray(noise["layers"]["mlp"]["gate"]["kernel"])
    assert abs(np.corrcoef(drawn.ravel()[:500], other.ravel()[:500])[0, 1]) < 0.2
    grid = analysis.loss_grid(tiny, rows, (noise, second), (0.0, 0.3), (0.3,), max_length=40)
    moved = jax.tree.map(lambda w, x, y: w + 0.3 * x + 0.3 * y, tiny.params, noise, second)
    assert grid[1, 0] == pytest.approx(float(mean_loss(tiny, rows)(moved)), rel=1e-4)


def test_how_much_of_reinforce_lies_in_the_user_s_spaces(make_adapter):
    user, reinforce = make_adapter("user"), make_adapter("reinforce", seed=1, rank=2)
    found, u, r = analysis.overlaps(user, reinforce, tau=0.0), delta(user), delta(reinforce)
    for path, layer in ((name, i) for name in found for i in range(len(u[name]))):
        left, sizes, right = np.linalg.svd(u[path][layer], full_matrices=False)
        kept = sizes > 1e-6 * sizes[0]
        p, q, change = left[:, kept], right[kept].T, r[path][layer]
        length, each = np.linalg.norm(change), found[path]
        assert each.outputs[layer] == pytest.approx(np.linalg.norm(change @ q @ q.T) / length, rel=1e-4)
        assert each.inputs[layer] == pytest.approx(np.linalg.norm(p @ p.T @ change) / length, rel=1e-4)
        assert each.chance[layer] == pytest.approx(np.sqrt(kept.sum() / change.shape[1]))


def test_what_a_can_change(make_adapter):
    user, reinforce = make_adapter("user"), make_adapter("reinforce", seed=1)
    merge = MergeConfig(scale=1.0, reinforce_scale=0.3)
    plain, apart = (delta(qr_merge(user, reinforce, dataclasses.replace(merge, a=a))) for a in (0.0, 1.0))
    moved, whole, own = (
        np.sqrt(sum((x**2).sum() for x in each.values()))
        for each in ({path: plain[path] - apart[path] for path in plain}, plain, delta(user))
    )
    expected = {"of_merged": moved / whole, "of_user": moved / own}
    assert analysis.reach(user, reinforce, merge) == pytest.approx(expected, rel=1e-4)


def test_without_rows_to_look_at(config, tmp_path):
    config.user.probes = 0
    with pytest.raises(UserError, match=r"user\.probes is 0"):
        analysis.write_analyses(config, tmp_path / "w", 3, 2, looks=2)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_page_has_every_model_and_what_was_followed(config, calls, tmp_path):
    config.user.train.update(steps=3, warmup_ratio=0.0, learning_rate=1e-2)
    text = pathlib.Path(
        analysis.write_analyses(config, tmp_path / "w", 3, 2, looks=2, command="the command")
    ).read_text()
    with np.load(tmp_path / "w" / "analysis.npz") as kept:
        arrays = dict(kept)
    models = ["aligned", "aligned + Buffer", "SFT", "user, Buffer on", "user, Buffer out", "ours"]
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    assert all([kind, model] in lines for kind in ("harmful", "task") for model in models)
    assert "3 harmful rows, 3 task rows" in text and "the command" in text
    assert "safety_in_training" in text
    followed = [name for name in arrays if name.startswith("safety gradient in training")]
    assert len(followed) == 6  # of two kinds of row: SFT, the user with Buffer on and out
    for name in followed:
        assert arrays[name][:, 0].tolist() == [0, 2, 3]
        model = "aligned + Buffer" if name.endswith("on") else "aligned"
        kind = name.split(", ")[1]
        # Both begin at a LoRA that adds nothing, and move from there.
        np.testing.assert_allclose(arrays[name][0, 1:], arrays[f"safety gradient, {kind}, {model}"], rtol=1e-5)
        assert not np.allclose(arrays[name][0, 1:], arrays[name][-1, 1:], rtol=1e-3)
