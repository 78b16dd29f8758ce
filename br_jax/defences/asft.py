"""AsFT: the user's delta is held to the alignment direction."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.direction import inner, onto
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class AsFT(Defence, Objective):
    """Adds weight * sum ||A (B - B C)||_F^2, C = V V^T / ||V||_F, over all matrices, without alpha / r."""

    label = "AsFT"
    badge = Badge("Yang et al. 2025, arXiv 2506.08473", "variant", "the direction is align's adapter, of low rank")
    needs = ("direction",)

    weight: float = number(10.0, 0.0, 1e6)

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, objective=self, aux={"direction": case.direction()})

    def gradient(self, step: Step, state: dict[str, Any]) -> tuple:
        """See `Objective.gradient`."""
        loss, grads = step.gradient()
        pull = jax.grad(off_direction)(step.trainable["lora_trainable"], step.aux["direction"])
        pulled = jax.tree.map(lambda g, p: g + self.weight * p, grads["lora_trainable"], pull)
        return loss, {**grads, "lora_trainable": pulled}, state


def off_direction(adapter: dict, direction: dict) -> jax.Array:
    """The sum of ||A (B - B C)||_F^2 over the matrices of two collections, see `lora.collection`."""
    flat, v = (traverse_util.flatten_dict(tree, sep="/") for tree in (adapter, direction))
    total = jnp.float32(0)
    for path in sorted({key.rsplit("/", 1)[0] for key in flat}):
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        if f"{path}/a" in v:
            b = b - onto(b, {name: v[f"{path}/{name}"] for name in "ab"})
        total += jnp.sum(inner(a, b, b))
    return total
