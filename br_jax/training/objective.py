"""What a step of training descends: the answer loss of its rows, or what a defence descends in its place.

A defence is a frozen dataclass of `Objective`: its fields are settings, a part of the step's program. It may ask for
more rows than the stage's own (`streams`), for adapters that it looks at (`aside`) and for state that goes from step to
step and into checkpoints (`begin`). What it gives back is a loss to report and the gradient that the optimizer takes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from br_jax.models.decoder import Decoder
from br_jax.training.loss import batch_loss

_STREAM = 0x57A  # folded into the key of dropout for rows that are not the stage's own


class Step(NamedTuple):
    """One step of training, as an objective sees it."""

    decoder: Decoder  # as it trains: dropout, remat and attention are its own
    accumulation: int  # micro-batches that a batch is taken in
    loss_chunk: int  # answer tokens that a device turns into logits at a time
    trainable: dict  # variable collections, the only ones with a gradient
    frozen: dict  # the base's and attached adapters' collections
    rows: dict  # the batch, see `data.batches`
    scale: Float[Array, "*U"] | float  # of the trainable adapter; [U] of several side by side
    key: Array | None = None  # dropout acts when there is one
    streams: Mapping[str, dict] = MappingProxyType({})  # a batch of each of the objective's
    # The adapters that the objective looks at: collections as of `lora.collection`, whose scale is in b.
    aside: Mapping[str, dict] = MappingProxyType({})
    number: Int[Array, ""] | int = 0  # of the step, from 0
    progress: Float[Array, ""] | float = 0.0  # share of the run that is done before it

    def gradient(self, trainable: dict | None = None, rows: dict | None = None, loss: Callable | None = None):
        """(mean loss over answer tokens, by their weights, and its gradients) at weights and on a batch.

        The batch is taken in micro-batches; the mean is over the answer tokens of the whole batch, whatever the split,
        and a batch without any has loss 0 and gradient 0.

        Args:
            trainable: the weights; default: the step's.
            rows: the batch; default: the step's own.
            loss: of (step, variables, a part of the batch, key), summed over the part by its weights; default:
                `answers`, the cross-entropy at answer tokens.
        """
        trainable, loss, seed = self.trainable if trainable is None else trainable, loss or answers, self.key
        if rows is not None and seed is not None:  # masks that are not those of the stage's own rows
            seed = jax.random.fold_in(seed, _STREAM)
        rows = self.rows if rows is None else rows

        def summed(trainable, part, key):
            return loss(self, self.variables(trainable), part, key)

        def add(carry, xs):
            index, part = xs
            part_key = None if seed is None else jax.random.fold_in(seed, index)
            return jax.tree.map(jnp.add, carry, jax.value_and_grad(summed)(trainable, part, part_key)), None

        parts = self.accumulation
        if parts == 1:
            total, grads = jax.value_and_grad(summed)(trainable, rows, seed)
        else:
            micro = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
            zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
            (total, grads), _ = jax.lax.scan(add, zero, (jnp.arange(parts), micro))
        inverse = 1 / jnp.maximum(jnp.sum(rows["weights"]), 1)
        return total * inverse, jax.tree.map(lambda g: g * inverse, grads)

    @property
    def head(self) -> tuple:
        """What `training.loss` takes behind the weights: chunk, soft cap and precision."""
        return self.loss_chunk, self.decoder.spec.logit_soft_cap, self.decoder.matmul_precision

    def variables(self, trainable: dict) -> dict:
        """The decoder's collections with weights as the trainable ones; the adapter's scale goes into its (small) b."""
        if "lora_trainable" not in trainable:
            return {**self.frozen, **trainable}
        scale = jnp.reshape(self.scale, (1, *jnp.shape(self.scale), 1, 1))
        adapter = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * scale if path[-1].key == "b" else leaf, trainable["lora_trainable"]
        )
        return {**self.frozen, **trainable, "lora_trainable": adapter}


def answers(step: Step, variables: dict, rows: dict, key) -> Float[Array, ""]:
    """The loss of a stage: the summed cross-entropy at answer tokens, by their weights."""
    return batch_loss(step.decoder, variables, rows, step.loss_chunk, key)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The answer loss of the stage's rows; a subclass is a defence's."""

    def begin(self, trainable: dict) -> dict[str, Any]:
        """The state before the first step: a pytree whose leaves are named as the weights', or scalars."""
        return {}

    def gradient(self, step: Step, state: dict[str, Any]) -> tuple[Float[Array, ""], dict, dict[str, Any]]:
        """(loss to report, gradient of the trainable collections, state for the next step)."""
        return *step.gradient(), state

    def end(self, trainable: dict, state: dict[str, Any]) -> dict:
        """The weights that the run gives, of those after the last step."""
        return trainable
