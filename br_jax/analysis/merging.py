"""What the QR merge can change: how much of Reinforce lies in the user's spaces, and the bound that this puts on a."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import effective_basis, inner_product, removed_share
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge


class Overlap(NamedTuple):
    """Of one matrix, f32[L] each."""

    outputs: Float[np.ndarray, " L"]  # ||W_R Q Q^T|| / ||W_R||, Q the user's output space
    inputs: Float[np.ndarray, " L"]  # ||P P^T W_R|| / ||W_R||, P the user's input space
    chance: Float[np.ndarray, " L"]  # what a random W_R would have of outputs: sqrt(rank of Q / width)


def overlaps(user: Adapter, reinforce: Adapter, tau: float = 0.01) -> dict[str, Overlap]:
    """How much of Reinforce lies where the user's adapter does, by path of the matrix."""
    shared = sorted(user.weights.keys() & reinforce.weights.keys())
    return {
        path: Overlap(*map(np.asarray, _overlap(user.weights[path], reinforce.weights[path], jnp.float32(tau))))
        for path in shared
    }


@jax.jit
def _overlap(user: dict, reinforce: dict, tau):
    def of_layer(pairs):
        (u_a, u_b), (r_a, r_b) = pairs
        q, _ = effective_basis(u_a, u_b, tau)
        p, _ = effective_basis(u_b.T, u_a.T, tau)
        rank = jnp.sum(jnp.any(q != 0, axis=0)).astype(q.dtype)
        return removed_share(r_a, r_b, q), removed_share(r_b.T, r_a.T, p), jnp.sqrt(rank / q.shape[0])

    return jax.lax.map(of_layer, ((user["a"], user["b"]), (reinforce["a"], reinforce["b"])))


def reach(user: Adapter, reinforce: Adapter, merge: MergeConfig) -> dict[str, float]:
    """How far a can move the merged delta: ||merged(a=0) - merged(a=1)|| over ||merged(a=0)||, and over ||user's||."""
    plain, apart = (qr_merge(user, reinforce, replace(merge, a=a)) for a in (0.0, 1.0))
    off = lora.stack([plain, lora.scaled(apart, -1.0)])
    moved, whole, own = (float(jnp.sqrt(inner_product(x, x))) for x in (off, plain, lora.scaled(user, merge.scale)))
    return {"of_merged": moved / whole, "of_user": moved / own if own else float("inf")}
