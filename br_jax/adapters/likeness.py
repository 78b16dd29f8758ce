"""How much of one adapter is in another, or in a change of weights: scaled, rounded, cut or mixed as it may be.

An adapter's delta is a sum of R components in each matrix, its singular directions. Of each of them one can ask how
much of it another delta contains. Trained on other rows, or from other first values, another adapter has next to none
of most of them; one that was made from the first has the same part of nearly all.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters.compress import best_rank
from br_jax.adapters.diagnostics import inner_product
from br_jax.adapters.lora import Adapter


class Likeness(NamedTuple):
    """What two deltas have in common, over the matrices of the first."""

    cosine: float  # of the angle between them, from -1 to 1; 0 where one of them is 0
    share: float  # the largest t * e such that components with a part e of the first's energy are in the second t-fold


@dataclasses.dataclass(frozen=True)
class Reference:
    """An adapter that others are compared with, as its components: of scale 1, `a` and `b` of orthogonal vectors."""

    components: Adapter

    @classmethod
    def of(cls, adapter: Adapter) -> "Reference":
        """The reference that an adapter makes."""
        rank = max((pair["a"].shape[-1] for pair in adapter.weights.values()), default=1)
        return cls(best_rank(adapter, rank)[0])

    def likeness(self, other: Adapter) -> Likeness:
        """How like it another adapter of the same base is; matrices that only the other has do not count."""
        mine = self.components.weights
        shared = {path: other.weights[path] for path in sorted(mine.keys() & other.weights.keys())}
        other = other.replace(weights=shared)
        parts = {path: _parts_of_adapter(mine[path], pair, other.scale) for path, pair in shared.items()}
        return self._likeness(parts, float(inner_product(other, other)))

    def likeness_of_change(self, params: Mapping[str, Any], base: Mapping[str, Any]) -> Likeness:
        """How like it the difference between two trees of params is."""
        now, before = (traverse_util.flatten_dict(dict(tree), sep="/") for tree in (params, base))
        parts, square = {}, 0.0
        for path, pair in self.components.weights.items():
            kernels = now[f"{path}/kernel"], before[f"{path}/kernel"]
            parts[path], squares = _parts_of_change(pair, *kernels)
            square += float(squares)
        return self._likeness(parts, square)

    def _likeness(self, parts: Mapping[str, Array], square: float) -> Likeness:
        """Of each component's part in the other delta, and the other's squared norm."""
        energies, found = [np.zeros(0)], [np.zeros(0)]
        for path, pair in self.components.weights.items():
            # each side of a component holds the root of its singular value
            energy = np.square(np.square(np.asarray(pair["a"], np.float64)).sum(axis=1))
            product = np.asarray(parts.get(path, np.zeros(energy.shape)), np.float64)
            energies.append(energy.ravel())
            found.append(np.divide(product, energy, where=energy > 0, out=np.zeros_like(energy)).ravel())
        energy, part = map(np.concatenate, (energies, found))
        whole = energy.sum()
        if not whole > 0 or not square > 0:
            return Likeness(0.0, 0.0)
        order = np.argsort(-part)
        at_least = np.cumsum(energy[order]) / whole
        share = np.max(np.clip(part[order], 0, 1) * at_least)
        return Likeness(float((part * energy).sum() / math.sqrt(whole * square)), float(share))


@jax.jit
def _parts_of_adapter(
    component: dict[str, Float[Array, "L ..."]], pair: dict[str, Float[Array, "L ..."]], scale: Float[Array, ""]
) -> Float[Array, "L K"]:
    """a_k^T (scale * a @ b) b_k of each component k."""
    inputs = jnp.einsum("lik,lir->lkr", component["a"], pair["a"], precision="highest")
    outputs = jnp.einsum("lko,lro->lkr", component["b"], pair["b"], precision="highest")
    return scale * jnp.sum(inputs * outputs, axis=-1)


@jax.jit
def _parts_of_change(
    component: dict[str, Float[Array, "L ..."]], now: Float[Array, "L I O"], before: Float[Array, "L I O"]
) -> tuple[Float[Array, "L K"], Float[Array, ""]]:
    """a_k^T (now - before) b_k of each component k, and the squared norm of the change; a layer at a time."""

    def of_layer(layer):
        a, b, now, before = layer
        change = now.astype(jnp.float32) - before.astype(jnp.float32)
        inputs = jnp.matmul(a.T, change, precision="highest")
        return jnp.sum(inputs * b, axis=-1), jnp.sum(change**2)

    parts, squares = jax.lax.map(of_layer, (component["a"], component["b"], now, before))
    return parts, squares.sum()
