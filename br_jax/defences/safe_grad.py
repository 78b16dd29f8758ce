"""SafeGrad: a step of the user's loses what goes against alignment."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.training.loss import answer_loss, hidden_states
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class SafeGrad(Defence, Objective):
    """Projects the user's gradient onto the plane across the alignment gradient, where the two are at odds.

    The alignment loss is KL(aligned base || model) at the answer tokens of refusals.
    """

    label = "SafeGrad"
    badge = Badge("Yi et al. 2025, arXiv 2508.07172", "variant", "read in its abstract; KL at answer tokens only")
    needs = ("refusals",)

    weight: float = number(1.0, 0.0, 1e3)  # of the alignment gradient that is added

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, objective=self, streams={"refusals": case.refusals})

    def gradient(self, step: Step, state: dict) -> tuple:
        """See `Objective.gradient`."""
        loss, grads = step.gradient()
        _, safe = step.gradient(rows=step.streams["refusals"], loss=distance_to_base)
        return loss, jax.tree.map(lambda g, s: g + self.weight * s, across(grads, safe), safe), state


def across(grads: dict, safe: dict) -> dict:
    """A gradient without its part against another one, where it has one."""
    along = optax.tree.vdot(grads, safe) / jnp.maximum(optax.tree.norm(safe, squared=True), 1e-20)
    return jax.tree.map(lambda g, s: g - jnp.minimum(along, 0.0) * s, grads, safe)


def distance_to_base(step: Step, variables: dict, rows: dict, key) -> jax.Array:
    """KL(what is frozen || the model), summed over answer tokens by their weights."""
    theirs = jax.lax.stop_gradient(hidden_states(step.decoder, step.frozen, rows))
    ours = hidden_states(step.decoder, variables, rows, key)
    return answer_loss(variables["params"], ours, theirs, rows["weights"], *step.head)
