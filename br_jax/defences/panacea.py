"""Panacea: the user's adapter learns beside a perturbation that would undo harm, which is added at the end."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class Panacea(Defence, Objective):
    """Takes lambda (grad min(L_H(w + e), cap) - h) from the user's gradient; h = grad L_H(w), e = rho h / ||h||."""

    label = "Panacea"
    badge = Badge("Wang et al. 2025, arXiv 2501.18100", "faithful")
    needs = ("harmful",)

    rho: float = number(1.0, 0.0, 1e3)
    weight: float = number(1e-4, 0.0, 1e3)  # lambda
    cap: float = number(5.0, 0.0, 1e3)  # of the harmful loss
    rows: int = number(999, 1, 10**6)  # harmful ones, at most

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, objective=self, streams={"harmful": case.harmful[: self.rows]})

    def begin(self, trainable: dict) -> dict:
        """The last perturbation."""
        return {"perturbation": jax.tree.map(jnp.zeros_like, trainable)}

    def gradient(self, step: Step, state: dict) -> tuple:
        """See `Objective.gradient`."""
        harmful = step.streams["harmful"]
        _, h = step.gradient(rows=harmful)
        size = self.rho / (optax.tree.norm(h) + 1e-7)
        e = jax.tree.map(lambda x: size * x, h)
        raised, there = step.gradient(jax.tree.map(jnp.add, step.trainable, e), harmful)
        inside = jnp.where(raised < self.cap, 1.0, 0.0)
        loss, grads = step.gradient()
        grads = jax.tree.map(lambda g, x, y: g - self.weight * (inside * x - y), grads, there, h)
        return loss, grads, {"perturbation": e}

    def end(self, trainable: dict, state: dict) -> dict:
        """The weights with the last perturbation."""
        return jax.tree.map(jnp.add, trainable, state["perturbation"])
