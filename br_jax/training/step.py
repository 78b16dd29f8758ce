"""A training stage put together, once: every stage, plain SFT and pre-training are one step on different pytrees.

A state is {"trainable", "opt_state", "step", "key", "objective"}. `trainable` and `frozen` are dicts of variable
collections ("params", "lora", "lora_trainable"): a stage differs from another only in which collection lies in which
dict, and in what it descends (`objective`). Only `trainable` is differentiated, so the frozen half has neither
gradients nor optimizer slots; "aside" in it are adapters that only the objective looks at.

`train_step` and `probe` are jitted with the `Stage` as a static argument, and all that differs from user to user is an
argument: one process traces and compiles them once for each shape of a batch, however many users come.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import constrain_tree, platform
from br_jax.models.decoder import Decoder
from br_jax.models.masks import Attend
from br_jax.training.config import TrainConfig
from br_jax.training.objective import Objective, Step


class Stage(NamedTuple):
    """What the programs of a stage are made of; equal stages share them."""

    decoder: Decoder  # as it trains: dropout, remat and attention are its own
    accumulation: int  # micro-batches that a batch is taken in
    loss_chunk: int  # answer tokens that a device turns into logits at a time
    objective: Objective = Objective()

    @classmethod
    def of(cls, decoder: Decoder, config: TrainConfig, mesh: Mesh, objective: Objective | None = None) -> "Stage":
        """The stage of a model's decoder and a config, on a mesh's platform."""
        attention = Attend(config.attention, platform(mesh))
        training = decoder.clone(dropout=config.dropout, remat=config.remat, attention=attention)
        return cls(training, config.accumulation, config.loss_chunk, objective or Objective())


class Hyper(NamedTuple):
    """Numbers of a step that are arguments of its program, f32[] each; see `TrainConfig`."""

    learning_rate: Float[Array, ""] | float  # of this very step, see `learning_rates`
    weight_decay: Float[Array, ""] | float
    clip_norm: Float[Array, ""] | float
    scale: Float[Array, ""] | float  # of the trainable adapter
    progress: Float[Array, ""] | float = np.float32(0)  # share of the run that is done before the step

    @classmethod
    def of(cls, config: TrainConfig) -> "Hyper":
        """Those of a config, before its first step."""
        return cls(*map(np.float32, (0.0, config.weight_decay, config.clip_norm, config.alpha / config.rank)))


def learning_rates(config: TrainConfig, steps: int) -> Float[np.ndarray, " steps"]:
    """f32 rate of each step: linear warm-up, then cosine to 0, as transformers' `get_cosine_schedule_with_warmup`.

    In each cycle anew. In numpy, as a run's length must not become a part of any program.
    """

    def share(steps: int) -> np.ndarray:
        step, warmup = np.arange(steps), -int(-steps * config.warmup_ratio // 1)
        progress = (step - warmup) / max(1, steps - warmup)
        return np.where(step < warmup, step / max(1, warmup), 0.5 * (1 + np.cos(np.pi * progress)))

    shares = [share(len(part)) for part in cycles(config, steps)]
    return (config.learning_rate * np.concatenate(shares)).astype(np.float32)


def cycles(config: TrainConfig, steps: int) -> list[range]:
    """The steps of each cycle of a run; where they do not divide, the first cycles are longer by one."""
    return [range(part[0], part[-1] + 1) for part in np.array_split(np.arange(steps), min(config.cycles, steps))]


@functools.partial(jax.jit, donate_argnums=0)
def restarted(opt_state: optax.OptState) -> optax.OptState:
    """The optimizer's state before its first step: AdamW's is all zeros."""
    return constrain_tree(jax.tree.map(jnp.zeros_like, opt_state))


def frozen_collections(params: dict, frozen: Mapping[str, Adapter], how: str) -> dict:
    """The frozen half of a step: the base and the attached adapters, stacked beside it or folded into a copy."""
    if not frozen:
        return {"params": params}
    joined = lora.stack(frozen)
    if how == "fold":
        return {"params": lora.fold(params, joined)}
    return {"params": params, "lora": lora.collection(joined)}


def trainable_adapter(adapter: Adapter) -> dict:
    """The trainable half of a step; the adapter's scale is an argument of the step and stays out of it."""
    return {"lora_trainable": lora.collection(adapter.replace(scale=jnp.float32(1)))}


def init_state(trainable: dict, seed: int, objective: Objective | None = None) -> dict:
    """A fresh state; `key` is raw key data, so that a checkpoint can hold it."""
    return {
        "trainable": trainable,
        "opt_state": _start_of(trainable),
        "step": jnp.zeros((), jnp.int32),
        "key": jax.random.key_data(jax.random.fold_in(jax.random.key(seed), 1)),
        "objective": (objective or Objective()).begin(trainable),
    }


@jax.jit
def _start_of(trainable: dict) -> optax.OptState:
    return optimizer(Hyper(0.0, 0.0, 0.0, 0.0)).init(trainable)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(stage: Stage, state: dict, frozen: dict, batch: dict, hyper: Hyper) -> tuple[dict, dict[str, Any]]:
    """One optimizer step: AdamW (0.9, 0.999, 1e-8) after clipping by global norm; metrics are scalars of the batch."""
    key = None
    if stage.decoder.dropout > 0:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])
    step = _step(stage, state["trainable"], frozen, batch, hyper.scale, key)
    step = step._replace(number=state["step"], progress=hyper.progress)
    loss, grads, kept = stage.objective.gradient(step, state["objective"])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count of steps
        updates, opt_state = optimizer(hyper).update(grads, state["opt_state"], state["trainable"])
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": hyper.learning_rate,
        "answer_tokens": jnp.sum(batch["weights"] > 0),
        "tokens": jnp.sum(batch["segment_ids"] != 0),
    }
    trainable, number = optax.apply_updates(state["trainable"], updates), state["step"] + 1
    after = {**state, "trainable": trainable, "opt_state": opt_state, "step": number, "objective": kept}
    return constrain_tree(after), metrics


@functools.partial(jax.jit, static_argnums=0)
def probe(stage: Stage, trainable: dict, frozen: dict, batch: dict, scale) -> tuple[Array, Array]:
    """(loss, global norm of the trainable gradient): what saturation looks at."""
    loss, grads = _step(stage, trainable, frozen, batch, scale).gradient()
    return loss, optax.tree.norm(grads)


def _step(stage: Stage, trainable: dict, frozen: dict, batch: dict, scale, key=None) -> Step:
    rows = {name: values for name, values in batch.items() if name != "streams"}
    frozen, aside = {name: tree for name, tree in frozen.items() if name != "aside"}, frozen.get("aside", {})
    streams = batch.get("streams", {})
    return Step(*stage[:3], trainable, frozen, rows, scale, key, streams=streams, aside=aside)


def optimizer(hyper: Hyper) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, 1e-8) after clipping by global norm."""
    return optax.chain(
        optax.clip_by_global_norm(hyper.clip_norm),
        optax.adamw(lambda count: hyper.learning_rate, weight_decay=hyper.weight_decay),
    )
