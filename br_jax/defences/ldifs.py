"""LDIFS: what the layers give is held to what they gave before the user's rows."""

import dataclasses

import jax
import jax.numpy as jnp

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.models.masks import SHARED
from br_jax.training.loss import answer_loss
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class Ldifs(Defence, Objective):
    """Adds rho / 2 ||mlp_l(w) - mlp_l(w_0)||^2 for every layer l, as long as it is below a limit.

    The square is a mean over the tokens of a micro-batch, of which each asks for itself whether it is below the limit.
    """

    label = "LDIFS"
    badge = Badge("Mukhoti et al. 2024, arXiv 2308.13320", "simplified",
                  "the square is a mean over tokens; the reference model is without dropout")  # fmt: skip

    rho: float = number(0.01, 0.0, 1e6)
    limit: float = number(0.1, 0.0, 1e6)  # of a layer's term
    clip_norm: float = number(5.0, 0.0, 1e30, open_low=True)

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, objective=self, config=dataclasses.replace(case.config, clip_norm=self.clip_norm))

    def gradient(self, step: Step, state: dict) -> tuple:
        """See `Objective.gradient`."""
        return *step.gradient(loss=self._loss), state

    def _loss(self, step: Step, variables: dict, rows: dict, key) -> jax.Array:
        hidden, ours = _outputs(step, variables, rows, key)
        _, theirs = _outputs(step, step.frozen, rows, None)
        loss = answer_loss(variables["params"], hidden, rows["targets"], rows["weights"], *step.head)
        segments = rows["segment_ids"]  # what segments of a packed row share counts for each of them
        real = jnp.where(segments == SHARED, segments.max(1, keepdims=True), jnp.sign(segments)).astype(jnp.float32)
        off = jnp.sum((ours - jax.lax.stop_gradient(theirs)).astype(jnp.float32) ** 2, axis=-1)  # [L, B, T]
        terms = self.rho / 2 * jnp.sum(off * real[None], axis=(1, 2)) / jnp.maximum(jnp.sum(real), 1)
        penalty = jnp.sum(rows["weights"]) * jnp.sum(jnp.where(terms < self.limit, terms, 0.0))
        return loss + (penalty - jax.lax.stop_gradient(penalty))  # what is reported is the loss of answers alone


def _outputs(step: Step, variables: dict, rows: dict, key) -> tuple[jax.Array, jax.Array]:
    """(final hidden states, what each layer's MLP gives [L, B, T, D])."""
    rngs = {} if key is None else {"dropout": key}
    given = rows["tokens"], rows["positions"], rows["segment_ids"]
    (hidden, _), sown = step.decoder.apply(variables, *given, rngs=rngs, mutable=["outputs"])
    return hidden, sown["outputs"]["layers"]["mlp"]["out"][0]
