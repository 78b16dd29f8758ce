"""Lisa: phases of alignment and of the user's rows by turns, each held near where the other one ended."""

import dataclasses

import jax
import jax.numpy as jnp

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class Lisa(Defence, Objective):
    """Bi-state optimization with a proximal term, rho / 2 ||w - anchor||^2."""

    label = "Lisa"
    badge = Badge(
        "Huang et al. 2024, arXiv 2405.18641",
        "simplified",
        "as long as the user's run: with fewer than 100 steps, one turn",
    )
    needs = ("refusals",)

    aligning: int = number(10, 1, 10**6)  # steps of a phase on refusals, which comes first
    fitting: int = number(90, 1, 10**6)  # steps of a phase on the user's rows
    rho: float = number(10.0, 0.0, 1e6)
    free: float = number(0.1, 0.0, 1.0)  # share of the run without the proximal term

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, objective=self, streams={"refusals": case.refusals})

    def begin(self, trainable: dict) -> dict:
        """The anchors: where each of the phases ended last."""
        return {phase: jax.tree.map(jnp.copy, trainable) for phase in ("aligning", "fitting")}

    def gradient(self, step: Step, state: dict) -> tuple:
        """See `Objective.gradient`."""
        place = step.number % (self.aligning + self.fitting)
        now = place < self.aligning
        ended = {"aligning": place == self.aligning, "fitting": (place == 0) & (step.number > 0)}
        anchors = {phase: _where(over, step.trainable, state[phase]) for phase, over in ended.items()}
        loss, grads = jax.lax.cond(now, lambda: step.gradient(rows=step.streams["refusals"]), step.gradient)
        rho = jnp.where(step.progress < self.free, 0.0, self.rho)
        anchor = _where(now, anchors["fitting"], anchors["aligning"])
        grads = jax.tree.map(lambda g, w, to: g + rho * (w - to), grads, step.trainable, anchor)
        return loss, grads, anchors


def _where(condition, these: dict, those: dict) -> dict:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, those)
