"""One train step on made-up tokens, ready to be timed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from br_jax.adapters import lora
from br_jax.models.model import Model
from br_jax.sharding import make_mesh, place
from br_jax.training.config import TrainConfig
from br_jax.training.run import frozen_collections
from br_jax.training.step import Compiled, init_state, learning_rate_schedule, make_decoder, make_optimizer, make_step


def make_round(model: Model, config: TrainConfig, *, buffer: bool, answer: int = 4) -> Callable[[], dict]:
    """A function that takes one step of the user stage and returns its metrics.

    Args:
        model: the base.
        config: batch size, length, LoRA and `frozen` are taken from it; rows fill `max_length`.
        buffer: whether a (random) Buffer is attached.
        answer: answer tokens a row, at its end.
    """
    mesh, key = make_mesh(), jax.random.key(0)
    shapes = lora.target_shapes(model.params, config.targets)
    adapter = lora.init(key, shapes, config.rank, config.alpha, "user")
    noise = lora.init(jax.random.key(1), shapes, config.rank, config.alpha, "buffer")
    noise = noise.replace(weights={p: {"a": w["a"], "b": w["b"] + 1e-3} for p, w in noise.weights.items()})
    optimizer = make_optimizer(config, 1000)
    step = make_step(
        make_decoder(model.spec, config, mesh), optimizer, learning_rate_schedule(config, 1000), config, 1.0
    )
    trainable = {"lora_trainable": lora.collection(adapter.replace(scale=jnp.float32(1)))}
    frozen = place(frozen_collections(model.params, {"buffer": noise} if buffer else {}, config.frozen), mesh)
    shape = (config.batch_size, config.max_length)
    places = np.broadcast_to(np.arange(config.max_length, dtype=np.int32), shape).copy()
    tokens = np.random.default_rng(0).integers(0, model.spec.vocab_size, shape, dtype=np.int32)
    batch = {"tokens": tokens, "targets": tokens, "positions": places, "segment_ids": np.ones(shape, np.int32)}
    batch["weights"] = (places >= config.max_length - answer).astype(np.float32)
    batch, compiled = place(batch, mesh), Compiled(step, mesh, keeps_state=True)
    state = place(init_state(trainable, optimizer, config.seed), mesh)

    def take_step() -> dict:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics

    return take_step
