"""Security vectors: an adapter that answers harm is beside the user's while it learns; Buffer's ancestor."""

import dataclasses

import jax

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.safe_grad import distance_to_base
from br_jax.training.run import train_adapter
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class SecurityVector(Defence, Objective):
    """The vector learns harmful answers, held to the base on benign ones; it is left out afterwards, nothing merged."""

    label = "Security Vector"
    badge = Badge("Zhou et al. 2023, arXiv 2311.02105", "faithful")
    needs = ("harmful", "benign")

    weight: float = number(0.01, 0.0, 1e3)  # of KL(base || base + vector) on benign answers
    rows: int = number(1000, 1, 10**6)  # benign ones, at most
    epochs: int = number(1, 1, 1000)  # times Buffer's

    def provide(self, case: Case, name: str) -> Adapter:
        """The vector: a Buffer by another recipe."""
        epochs, steps = self.epochs * case.config.epochs, self.epochs * case.config.steps
        # without what is this project's own
        plain = dataclasses.replace(case.config, epochs=epochs, steps=steps, cycles=1, loss_mean="tokens")
        streams, run = {"benign": case.benign[: self.rows]}, {**case.run, "provider": True}
        return train_adapter(name, "buffer", case.model, case.harmful, plain, objective=self, streams=streams, **run)

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, frozen={"buffer": case.provided})

    def gradient(self, step: Step, state: dict) -> tuple:
        """The vector's own, see `Objective.gradient`."""
        loss, grads = step.gradient()
        _, held = step.gradient(rows=step.streams["benign"], loss=distance_to_base)
        return loss, jax.tree.map(lambda g, h: g + self.weight * h, grads, held), state
