"""Whole training runs against transformers, PEFT and torch's AdamW: same rows, order and start."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.adapters.peft import MODULES, save_adapter
from br_jax.core.mesh import make_mesh
from br_jax.data.batches import encode_rows, make_batches
from br_jax.data.rows import Row
from br_jax.models.io.hf import write_hf
from br_jax.provider import load_model
from br_jax.training.config import TrainConfig
from br_jax.training.step import Hyper, Stage, init_state, learning_rates, train_step, trainable_adapter

torch = pytest.importorskip("torch", reason="the oracle of the optimizer")
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup  # noqa: E402

# peft asks transformers by a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

DATA = Path(os.environ.get("BR_JAX_DATA", "data"))
SMOLLM2, GSM8K = DATA / "SmolLM2-135M-Instruct.Q4_1.gguf", DATA / "gsm8k_train.jsonl"


def run_ours(model, batches, config, start, frozen):
    """(the trained pairs by path, metrics of every step), on one device."""
    stage = Stage.of(model.decoder, config, make_mesh(devices=jax.devices()[:1]))
    state = init_state(jax.tree.map(jnp.copy, trainable_adapter(start)), 0)
    metrics = []
    for batch, rate in zip(batches, learning_rates(config, len(batches)), strict=True):
        hyper = Hyper.of(config)._replace(learning_rate=rate)
        state, values = train_step(stage, state, frozen, jax.tree.map(jnp.asarray, batch), hyper)
        metrics.append({name: float(value) for name, value in values.items()})
    layers = jax.device_get(state["trainable"]["lora_trainable"]["layers"])
    return {path: layers[path.split("/")[1]][path.split("/")[2]] for path in start.weights}, metrics


def run_theirs(base, folder, batches, config, start):
    """The same from the base's folder, by transformers, PEFT and torch."""
    save_adapter(folder / "start", start, base_name="base")
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    network = PeftModel.from_pretrained(network, folder / "start", is_trainable=True)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, (0.9, 0.999), 1e-8, config.weight_decay)
    warmup = int(np.ceil(len(batches) * config.warmup_ratio))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))
    metrics = []
    for batch in batches:
        batch = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
        logits = network(input_ids=batch["tokens"].long(), attention_mask=(batch["segment_ids"] > 0).long()).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["targets"].flatten().long(), reduction="none"
        )
        loss = (loss * batch["weights"].flatten()).sum() / batch["weights"].sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        metrics.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate})
    state = network.state_dict()

    def stacked(path, matrix):
        key = "base_model.model.model.layers.{}.{}.lora_{}.default.weight"
        layers = range(network.config.num_hidden_layers)
        return np.stack([state[key.format(layer, MODULES[path], matrix.upper())].numpy().T for layer in layers])

    return {path: {matrix: stacked(path, matrix) for matrix in "ab"} for path in start.weights}, metrics


def assert_same_trajectory(ours, theirs, config, start, tolerance):
    """f32 on both sides: rounding grows along the steps, as each starts where the last has ended.

    The tolerance is of the trained matrices, for which Adam makes a small gradient's rounding as large as its step.
    """
    (trained, found), (expected_trained, expected) = ours, theirs
    at = lambda metrics, name: np.asarray([values[name] for values in metrics])  # noqa: E731
    loss, norm = at(expected, "loss"), at(expected, "grad_norm")
    np.testing.assert_allclose(at(found, "learning_rate"), at(expected, "learning_rate"), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(at(found, "loss"), loss, atol=1e-4, rtol=0)
    np.testing.assert_allclose(at(found, "grad_norm"), norm, atol=1e-4, rtol=0)
    assert loss[-3:].mean() < 0.9 * loss[:3].mean(), "nothing was learned here"
    assert norm.max() > config.clip_norm, "nothing was clipped here"
    for path, pair in expected_trained.items():
        for matrix, values in pair.items():
            distance = np.linalg.norm(trained[path][matrix] - values)
            moved = np.linalg.norm(values - np.asarray(start.weights[path][matrix]))
            assert distance <= tolerance * min(moved, np.linalg.norm(values)), f"{path}/{matrix} moved {moved}"


def compare(folder, model, base, rows, config, tolerance, buffer=None):
    """Trains on both sides, from the base's folder in theirs; Buffer is beside the base in ours, folded into theirs."""
    examples, _ = encode_rows(rows, model.tokenizer, model.template, config.max_length)
    order = {"batch_size": config.batch_size, "seed": 1, "steps": config.steps}
    batches = make_batches(examples, buckets=(config.max_length,), **order)
    start = lora.init(jax.random.key(2), lora.target_shapes(model.params), config.rank, config.alpha, "user")
    frozen, params = {"params": model.params}, model.params
    if buffer:
        frozen["lora"], params = lora.collection(buffer), lora.fold(model.params, buffer)
    if buffer or base is None:
        base = folder / "base"
        write_hf(base, model.spec, jax.device_get(params), model.tokenizer)
    ours = run_ours(model, batches, config, start, frozen)
    assert_same_trajectory(ours, run_theirs(base, folder, batches, config, start), config, start, tolerance)


@pytest.mark.parametrize(
    ("name", "buffer"),
    [("llama", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("qwen3 bias window", "gemma2"))],
)
def test_thirty_steps_are_those_of_pytorch_and_peft(tmp_path, make_family, make_adapter, rows, quick, name, buffer):
    _, base = make_family(name)
    model = load_model(base)
    config = quick(rank=4, alpha=6.0, warmup_ratio=0.05, weight_decay=0.01, clip_norm=1.0, steps=30)
    compare(tmp_path, model, base, rows, config, 1e-4, make_adapter("buffer", 1, model=model) if buffer else None)


@pytest.mark.slow
@pytest.mark.skipif(not (SMOLLM2.is_file() and GSM8K.is_file()), reason="put both into data/, or set BR_JAX_DATA")
def test_ten_steps_of_a_real_model_are_those_of_pytorch_and_peft(tmp_path):
    config = TrainConfig(rank=8, alpha=16.0, dropout=0.0, learning_rate=1e-3, steps=10, batch_size=4, max_length=128)
    lines = [json.loads(line) for line in GSM8K.read_text().splitlines()[:8]]
    rows = [Row((("user", line["question"]), ("assistant", line["answer"]))) for line in lines]
    compare(tmp_path, load_model(SMOLLM2), None, rows, config, 1e-3)
