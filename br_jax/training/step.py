"""The one train step: every stage, plain SFT and pre-training are this function on different pytrees.

A state is {"trainable", "opt_state", "step", "key"}. `trainable` and `frozen` are dicts of variable collections
("params", "lora", "lora_trainable"): a stage differs from another only in which collection lies in which dict.
Only `trainable` is differentiated, so the frozen half has neither gradients nor optimizer slots.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from br_jax.models.attention import Attend
from br_jax.models.decoder import Decoder
from br_jax.models.spec import ModelSpec
from br_jax.sharding import platform, shardings
from br_jax.training.config import TrainConfig
from br_jax.training.loss import LossSettings, batch_loss


def make_decoder(spec: ModelSpec, config: TrainConfig, mesh: Mesh) -> Decoder:
    """The decoder as a stage trains it, on that mesh's platform."""
    return Decoder(spec, config.dropout, config.remat, Attend(config.attention, platform(mesh)))


def learning_rate_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to 0; as transformers' `get_cosine_schedule_with_warmup` (step 0 has rate 0)."""
    warmup = -int(-steps * config.warmup_ratio // 1)
    cosine = optax.cosine_decay_schedule(config.learning_rate, max(1, steps - warmup))
    if not warmup:
        return cosine
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, warmup), cosine], [warmup])


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8) after clipping by global norm, on the schedule above."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(learning_rate_schedule(config, steps), weight_decay=config.weight_decay),
    )


def init_state(trainable: dict, optimizer: optax.GradientTransformation, seed: int) -> dict:
    """A fresh state; `key` is raw key data, so that a checkpoint can hold it."""
    return {
        "trainable": trainable,
        "opt_state": optimizer.init(trainable),
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)),
    }


def scaled(trainable: dict, scale: float) -> dict:
    """The trainable collections as the decoder wants them: the adapter's scale goes into its (small) b."""
    if "lora_trainable" not in trainable:
        return trainable
    lora = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, trainable["lora_trainable"]
    )
    return {**trainable, "lora_trainable": lora}


def make_gradient(decoder: Decoder, config: TrainConfig, scale: float) -> Callable:
    """(trainable, frozen, batch, key or None) -> (mean loss over answer tokens, gradients, answer tokens).

    The batch is taken in `config.accumulation` micro-batches; the mean is over the answer tokens of the whole batch,
    whatever the split, and a batch without any has loss 0 and gradient 0.
    """

    settings = LossSettings(config.loss_chunk, decoder.spec.logit_soft_cap)

    def summed(trainable, frozen, batch, key):
        return batch_loss(decoder, {**frozen, **scaled(trainable, scale)}, batch, settings, key)

    def gradient(trainable, frozen, batch, key):
        parts = config.accumulation
        micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)

        def add(carry, xs):
            index, part = xs
            part_key = None if key is None else jax.random.fold_in(key, index)
            new = jax.value_and_grad(summed)(trainable, frozen, part, part_key)
            return jax.tree.map(jnp.add, carry, new), None

        if parts == 1:
            loss, grads = jax.value_and_grad(summed)(trainable, frozen, batch, key)
        else:
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
            (loss, grads), _ = jax.lax.scan(add, zero, (jnp.arange(parts), micro))
        count = jnp.sum(batch["weights"])
        inverse = 1 / jnp.maximum(count, 1)
        return loss * inverse, jax.tree.map(lambda g: g * inverse, grads), count

    return gradient


def make_step(decoder: Decoder, optimizer, schedule: optax.Schedule, config: TrainConfig, scale: float) -> Callable:
    """The pure step: (state, frozen, batch) -> (state, metrics); metrics are scalars, of the whole batch."""
    gradient = make_gradient(decoder, config, scale)

    def step(state, frozen, batch):
        key = None
        if config.dropout > 0:
            key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
        loss, grads, count = gradient(state["trainable"], frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count of steps
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["trainable"])
            learning_rate = jnp.asarray(schedule(state["step"]), jnp.float32)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": learning_rate,
            "answer_tokens": count,
            "tokens": jnp.sum(batch["segment_ids"] > 0),
        }
        state = {
            "trainable": optax.apply_updates(state["trainable"], updates),
            "opt_state": opt_state,
            "step": state["step"] + 1,
            "key": state["key"],
        }
        return state, metrics

    return step


def make_probe(decoder: Decoder, config: TrainConfig, scale: float) -> Callable:
    """(trainable, frozen, batch) -> (loss, global norm of the trainable gradient): what saturation looks at."""
    gradient = make_gradient(decoder, config, scale)

    def probe(trainable, frozen, batch):
        loss, grads, _ = gradient(trainable, frozen, batch, None)
        return loss, optax.tree.norm(grads)

    return probe


class Compiled:
    """A function compiled ahead of time, once for each batch length, every argument with an explicit sharding.

    Calling it with a length it has seen never compiles; `count` says how often it did.
    """

    def __init__(self, function: Callable, mesh, *, keeps_state: bool):
        self._mesh = mesh
        self._jit_options = {"donate_argnums": 0} if keeps_state else {}
        self._keeps_state = keeps_state
        self._function = function
        self._executables = {}

    @property
    def count(self) -> int:
        """Number of compilations so far."""
        return len(self._executables)

    def warm(self, state, frozen, batch) -> None:
        """Compiles for this batch's shape unless that was done."""
        shape = batch["tokens"].shape
        if shape in self._executables:
            return
        places = tuple(shardings(tree, self._mesh) for tree in (state, frozen, batch))
        out = {"out_shardings": (places[0], None)} if self._keeps_state else {}
        jitted = jax.jit(self._function, in_shardings=places, **out, **self._jit_options)
        with jax.set_mesh(self._mesh):
            self._executables[shape] = jitted.lower(state, frozen, batch).compile()

    def __call__(self, state, frozen, batch):
        self.warm(state, frozen, batch)
        return self._executables[batch["tokens"].shape](state, frozen, batch)
