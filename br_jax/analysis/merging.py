"""What the QR merge can change: how much of Reinforce lies in the user's spaces, and the bound that this puts on a."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import factors, inner_product, output_spaces, removed_shares
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig, qr_merge


class Overlap(NamedTuple):
    """Of one matrix, [L] each."""

    outputs: Float[np.ndarray, " L"]  # ||W_R Q Q^T|| / ||W_R||, Q the user's output space
    inputs: Float[np.ndarray, " L"]  # ||P P^T W_R|| / ||W_R||, P the user's input space
    chance: Float[np.ndarray, " L"]  # what a random W_R would have of outputs: sqrt(rank of Q / width)


def overlaps(user: Adapter, reinforce: Adapter, tau: float = 0.01) -> dict[str, Overlap]:
    """How much of Reinforce lies where the user's adapter does, by path of the matrix."""
    users, reinforces, found = factors(user), factors(reinforce), {}
    for path in sorted(users.keys() & reinforces.keys()):
        (u_a, u_b), (r_a, r_b) = users[path], reinforces[path]
        outputs = removed_shares((u_a, u_b), (r_a, r_b), tau)
        inputs = removed_shares((u_b.mT, u_a.mT), (r_b.mT, r_a.mT), tau)
        chance = [np.sqrt(q.shape[1] / len(q)) for q in output_spaces(u_a, u_b, tau)]
        found[path] = Overlap(outputs, inputs, np.array(chance))
    return found


def reach(user: Adapter, reinforce: Adapter, merge: MergeConfig) -> dict[str, float]:
    """How far a can move the merged delta: ||merged(a=0) - merged(a=1)|| over ||merged(a=0)||, and over ||user's||."""
    plain, apart = (qr_merge(user, reinforce, replace(merge, a=a)) for a in (0.0, 1.0))
    off = lora.stack([plain, lora.scaled(apart, -1.0)])
    moved, whole, own = (inner_product(x, x) ** 0.5 for x in (off, plain, lora.scaled(user, merge.scale)))
    return {"of_merged": moved / whole, "of_user": moved / own if own else float("inf")}
