"""CSULoRA, closest safe update: what of a delta lies off the alignment subspaces is damped."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from br_jax.adapters.diagnostics import effective_basis
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.direction import factors


@dataclasses.dataclass(frozen=True)
class CsuLora(Defence):
    """After plain SFT: of each matrix' delta D, with P and Q onto alignment's input and output spaces,

    P D Q stays, and each other part X (P D (1 - Q) and (1 - P) D Q together, (1 - P) D (1 - Q)) becomes
    X / (1 + penalty ||X||^2 / ||D||^2): the closed form of min ||Y - D||^2 + sum penalty_X ||Y_X||^2.
    """

    label = "CSULoRA"
    badge = Badge(
        "Danilov et al. 2026, arXiv 2605.30640", "variant", "read in its abstract: the penalty's form is ours"
    )
    needs = ("direction",)

    penalty: float = number(10.0, 0.0, 1e6)

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        weights, direction = dict(user.weights), case.direction()
        for path in sorted(user.weights.keys() & direction.weights.keys()):
            weights[path] = closest(user.weights[path], factors(direction, path), jnp.float32(self.penalty))
        return user.replace(weights=weights)


@jax.jit
def closest(pair: dict[str, Array], v: dict[str, Array], penalty: Float[Array, ""]) -> dict[str, Array]:
    """Factors [L, I, 2 R] and [L, 2 R, O] of what becomes of a delta's factors, given those of V^T."""

    def of_layer(factors):
        (a, b), (v_a, v_b) = factors
        # `effective_basis` spans outputs; the inputs' is that of the factors turned around
        p, _ = effective_basis(v_b.T, v_a.T, jnp.float32(0))
        q, _ = effective_basis(v_a, v_b, jnp.float32(0))
        in_a, in_b = p @ (p.T @ a), (b @ q) @ q.T
        off_a, off_b = a - in_a, b - in_b

        def energy(x, y):
            return jnp.sum((x.T @ x) * (y @ y.T))

        whole = jnp.maximum(energy(a, b), 1e-30)
        partly = 1 / (1 + penalty * (energy(in_a, off_b) + energy(off_a, in_b)) / whole)
        off = 1 / (1 + penalty * energy(off_a, off_b) / whole)
        into = jnp.concatenate([in_a, off_a], axis=1)
        return into, jnp.concatenate([in_b + partly * off_b, partly * in_b + off * off_b], axis=0)

    with jax.default_matmul_precision("highest"):
        a, b = jax.lax.map(of_layer, ((pair["a"], pair["b"]), (v["a"], v["b"])))
    return {"a": a, "b": b}
