"""Safe LoRA: a delta that points away from alignment is projected onto its direction."""

import dataclasses

import jax.numpy as jnp

from br_jax.adapters.lora import Adapter
from br_jax.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.direction import factors, inner, onto


@dataclasses.dataclass(frozen=True)
class SafeLora(Defence):
    """After plain SFT: per matrix and layer, where cos(A B C, A B) <= threshold, B becomes B C."""

    label = "Safe LoRA"
    badge = Badge("Hsu et al. 2024, arXiv 2405.16833", "faithful")
    needs = ("direction",)

    threshold: float = number(0.6, -1.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        return projected(user, case.direction(), self.threshold)


def projected(user: Adapter, direction: Adapter, threshold: float) -> Adapter:
    """The adapter with those matrices projected; one that alignment has not touched stays."""
    weights = dict(user.weights)
    for path in sorted(user.weights.keys() & direction.weights.keys()):
        a, b = user.weights[path]["a"], user.weights[path]["b"]
        along = onto(b, factors(direction, path))
        norms = jnp.sqrt(inner(a, along, along) * inner(a, b, b))
        cosine = inner(a, along, b) / jnp.where(norms > 0, norms, 1.0)
        weights[path] = {"a": a, "b": jnp.where((cosine <= threshold)[:, None, None], along, b)}
    return user.replace(weights=weights)
