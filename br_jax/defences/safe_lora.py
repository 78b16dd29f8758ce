"""Safe LoRA: the deltas that point away from alignment most are projected onto its direction."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import SHARE, number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.direction import factors, inner, onto


@dataclasses.dataclass(frozen=True)
class SafeLora(Defence):
    """After plain SFT, B becomes B C in a share of the matrices, those of the lowest cos(A B C, A B).

    By the paper's rule all matrices of which this is at most a threshold: share 1.
    """

    label = "Safe LoRA"
    badge = Badge("Hsu et al. 2024, arXiv 2405.16833", "variant", "the direction is align's adapter, of low rank")
    needs = ("direction",)

    share: float = number(0.16, *SHARE)  # of a layer's matrices each; the authors' code takes 10 of 64
    threshold: float = number(1.0, -1.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        return projected(user, case.direction(), self.share, self.threshold)


def projected(user: Adapter, direction: Adapter, share: float, threshold: float) -> Adapter:
    """The adapter with those matrices projected; one that alignment has not touched stays."""
    along, cosines = {}, {}
    for path in user.weights.keys() & direction.weights.keys():
        a, b = user.weights[path]["a"], user.weights[path]["b"]
        along[path] = onto(b, factors(direction, path))
        norms = jnp.sqrt(inner(a, along[path], along[path]) * inner(a, b, b))
        cosines[path] = inner(a, along[path], b) / jnp.where(norms > 0, norms, 1.0)
    lowest = np.sort(np.concatenate([np.empty(0), *map(np.asarray, cosines.values())]))
    count = int(share * len(lowest))
    most = min(threshold, lowest[count - 1]) if count else -np.inf
    weights = dict(user.weights)
    for path, cosine in cosines.items():
        b = jnp.where((cosine <= most)[:, None, None], along[path], user.weights[path]["b"])
        weights[path] = {"a": user.weights[path]["a"], "b": b}
    return user.replace(weights=weights)
