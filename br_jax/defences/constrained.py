"""Constrained SFT: the first tokens of an answer are held near the aligned model."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.training.loss import answer_loss, hidden_states, token_losses
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class ConstrainedSft(Defence, Objective):
    """Descends -(2 / beta_t) log sigmoid(beta_t log(p(x_t) / p_aligned(x_t))), with a large beta for early tokens.

    Its gradient is the answer loss' with each token's weight times 2 sigmoid(-beta_t log(p / p_aligned)): one at the
    start, and less for what has become likelier than in the aligned model.
    """

    label = "constrained SFT"
    badge = Badge("Qi et al. 2025 (Safety alignment should be made more than a few tokens deep), arXiv 2406.05946",
                  "faithful")  # fmt: skip

    first: float = number(0.5, 0.0, 1e3, open_low=True)  # beta of an answer's first token
    early: float = number(2.0, 0.0, 1e3, open_low=True)  # of the second to fifth
    late: float = number(0.1, 0.0, 1e3, open_low=True)  # of all others

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        return case.train(name, objective=self)

    def gradient(self, step: Step, state: dict) -> tuple:
        """See `Objective.gradient`."""
        return *step.gradient(loss=self._loss), state

    def _loss(self, step: Step, variables: dict, rows: dict, key) -> Array:
        given = rows["targets"], rows["weights"], *step.head
        ours, base = (hidden_states(step.decoder, *of) for of in ((variables, rows, key), (step.frozen, rows)))
        # log(p / p_aligned) of each token
        ratio = token_losses(step.frozen["params"], base, *given) - token_losses(variables["params"], ours, *given)
        place = answer_places(rows["weights"])
        beta = jnp.where(place == 0, self.first, jnp.where(place < 5, self.early, self.late))
        value = jnp.sum(rows["weights"] * (-2 / beta) * jax.nn.log_sigmoid(beta * ratio))
        weights = rows["weights"] * 2 * jax.nn.sigmoid(-beta * ratio)
        through = answer_loss(variables["params"], ours, rows["targets"], weights, *step.head)
        return through + jax.lax.stop_gradient(value - through)


def answer_places(weights: Float[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its answer are before each answer token, and no matter what elsewhere."""
    answer = weights > 0
    index = jnp.arange(weights.shape[1])[None]
    before = jnp.pad(answer, ((0, 0), (1, 0)))[:, :-1]
    return index - jax.lax.cummax(jnp.where(answer & ~before, index, 0), axis=1)
