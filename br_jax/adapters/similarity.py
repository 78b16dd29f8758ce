"""How much of one adapter is in another, or in a change of weights; and the guard that keeps a Buffer from leaving.

An adapter's delta is a sum of R components in each matrix, its singular directions: pairs of an input and an output
direction. Of each pair one can ask how much of it another delta contains, scaled, rounded, cut or mixed as it may be.
An adapter that was made from the first has the same part of nearly all pairs. One that was trained on its own has next
to none of most; and what it has of the first one's directions, as in a small model it must, it has of all their
combinations, not of the pairs.

The guard holds every adapter and model that is handed on against the Buffers of the base. It finds a Buffer that was
relabelled, scaled, rounded, cut, merged, split or folded into the base; not one that its holder hides with skill.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters import lora
from br_jax.adapters.diagnostics import best_rank, factors
from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError

# Measured: docs/provider.md. A Reinforce points away from Buffer, so the sign counts; but what is its exact opposite
# gives it away.
COSINE, OPPOSITE, SHARE = 0.3, -0.7, 0.12
_NOISE = 1e-6  # of the largest singular value: below it f32 knows no direction
_CANCELLED = 1e-8  # of the squares of an adapter's columns: a delta that is less is their rounding


class Similarity(NamedTuple):
    """What two deltas have in common, over the matrices of the first."""

    cosine: float  # of the angle between them, from -1 to 1; 0 where one of them is 0
    # The largest t * e such that components which are in the second at least t-fold, beyond what it has of other pairs
    # of their directions, make up a part e of the first (by singular values).
    share: float

    @property
    def is_buffer(self) -> bool:
        """Whether the second has more of the first, a Buffer, in it than a user's adapter can have."""
        return self.cosine >= COSINE or self.cosine <= OPPOSITE or self.share >= SHARE


@dataclasses.dataclass(frozen=True)
class Reference:
    """An adapter that others are compared with, as its components: of scale 1, `a` and `b` of orthogonal vectors."""

    components: Adapter

    @classmethod
    def of(cls, adapter: Adapter) -> "Reference":
        """The reference that an adapter makes."""
        rank = max((pair["a"].shape[-1] for pair in adapter.weights.values()), default=1)
        return cls(best_rank(adapter, rank)[0])

    @property
    def is_zero(self) -> bool:
        """Whether it is of an adapter that changes nothing, which nothing is like."""
        return not any(np.any(pair["a"]) for pair in self.components.weights.values())

    def similarity(self, other: Adapter) -> Similarity:
        """How like it another adapter of the same base is; matrices that only the other has do not count.

        Raises:
            UserError: numbers that are not finite, or columns that cancel each other, so that nothing can be told.
        """
        lora.require_finite(other)
        mine, theirs = factors(self.components), factors(other)
        cores, columns, square = {}, 0.0, 0.0
        for path in sorted(mine.keys() & theirs.keys()):
            (own_a, own_b), (a, b) = mine[path], theirs[path]
            cores[path] = (own_a.mT @ a) @ (b @ own_b.mT)  # a_j^T (a @ b) b_k of the components' sides
            columns += np.sum(np.sum(a**2, axis=1) * np.sum(b**2, axis=2))
            square += np.sum((a.mT @ a) * (b @ b.mT))
        if square < _CANCELLED * columns:
            raise UserError("refused: the adapter's columns cancel each other, so nobody can tell what is in it")
        return self._similarity(cores, square, 1.0)

    def similarity_of_change(self, params: Mapping[str, Any], base: Mapping[str, Any]) -> Similarity:
        """How like it the difference between two trees of params is."""
        now, before = (traverse_util.flatten_dict(dict(tree), sep="/") for tree in (params, base))
        kernels = {path: (now[f"{path}/kernel"], before[f"{path}/kernel"]) for path in self.components.weights}
        size = max((float(_largest(*pair)) for pair in kernels.values()), default=0.0)
        if not math.isfinite(size):
            raise UserError("refused: the model's weights are not finite")
        if size == 0:
            return Similarity(0.0, 0.0)
        cores, square = {}, 0.0
        for path, pair in self.components.weights.items():
            cores[path], squares = _core_of_change(pair, *kernels[path], np.float32(size))
            square += float(squares)
        return self._similarity(cores, square, size)

    def _similarity(self, cores: Mapping[str, Array], square: float, size: float) -> Similarity:
        """Of what the other delta has of all pairs of directions, and its squared norm, both once divided by `size`."""
        sigmas, parts, inner = [np.zeros(0)], [np.zeros(0)], 0.0
        for path, pair in self.components.weights.items():
            # each side of a component holds the root of its singular value
            sigma = np.square(np.asarray(pair["a"], np.float64)).sum(axis=1)  # [L, K]
            sigma = np.where(sigma > _NOISE * sigma.max(axis=1, keepdims=True), sigma, 0)
            sigmas.append(sigma.ravel())
            if path not in cores:
                parts.append(np.zeros(sigma.size))
                continue
            scales = np.sqrt(sigma)[:, :, None] * np.sqrt(sigma)[:, None, :]
            core = _divide(np.asarray(cores[path], np.float64) * size, scales)
            own = np.diagonal(core, axis1=1, axis2=2)  # u_k^T D v_k of each pair
            others = (np.square(core).sum(axis=1) + np.square(core).sum(axis=2)) / 2 - own**2
            pairs = np.maximum((sigma > 0).sum(axis=1, keepdims=True) - 1, 1)
            parts.append(_divide(own - np.sqrt(np.maximum(others, 0) / pairs), sigma).ravel())
            inner += (own * sigma).sum()
        sigma, part = map(np.concatenate, (sigmas, parts))
        length = math.sqrt(np.square(sigma).sum() * square) * size
        if not length > 0:
            return Similarity(0.0, 0.0)
        order = np.argsort(-part)
        at_least = np.cumsum(sigma[order]) / sigma.sum()
        return Similarity(float(inner / length), float(np.max(np.clip(part[order], 0, 1) * at_least)))


@dataclasses.dataclass(frozen=True)
class Guard:
    """The Buffers of an aligned base, and its params.

    Attributes:
        params: of the aligned base, by which a model that something was folded into is known.
        fingerprints: of the Buffers.
        references: the Buffers, as adapters are compared with them.
    """

    params: Mapping[str, Any]
    fingerprints: tuple[str, ...]
    references: tuple[Reference, ...]

    @classmethod
    def of(cls, params: Mapping[str, Any], buffers: Sequence[Adapter]) -> "Guard":
        """The guard of a base and its Buffers."""
        return cls(params, tuple(map(lora.fingerprint, buffers)), tuple(map(Reference.of, buffers)))

    def refuse(self, place: object, adapter: Adapter) -> None:
        """Raises a `UserError` where an adapter has more of a Buffer in it than a user's can have."""
        for reference in self.references:
            _refuse_buffer(f"{place}: refused, for this adapter", reference.similarity(adapter))

    def refuse_model(self, place: object, params: Mapping[str, Any]) -> None:
        """Raises a `UserError` where a model differs from the aligned base by something like a Buffer."""
        if params is not self.params:
            for reference in self.references:
                similarity = reference.similarity_of_change(params, self.params)
                _refuse_buffer(f"{place}: refused, for what was folded into this model", similarity)


def warn_unguarded(place: object) -> None:
    """Says that no Buffer was at hand to compare with."""
    logging.warning(
        "%s: not compared with a Buffer, as none is at hand: load the model from a provider's folder, or use br.guard",
        place,
    )


def _refuse_buffer(what: str, similarity: Similarity) -> None:
    if similarity.is_buffer:
        raise UserError(
            f"{what} is like the provider's Buffer (cosine {similarity.cosine:.2f}, share {similarity.share:.2f}; a "
            f"user's stays below {COSINE} and {SHARE}): it undoes the model's alignment; keep it in the provider's "
            "folder"
        )


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return np.divide(values, by, where=by > 0, out=np.zeros(by.shape))


@jax.jit
def _largest(now: Float[Array, "L I O"], before: Float[Array, "L I O"]) -> Float[Array, ""]:
    return jnp.max(jnp.abs(now.astype(jnp.float32) - before.astype(jnp.float32)))


@jax.jit
def _core_of_change(
    component: dict[str, Float[Array, "L ..."]],
    now: Float[Array, "L I O"],
    before: Float[Array, "L I O"],
    size: Float[Array, ""],
) -> tuple[Float[Array, "L K K"], Float[Array, ""]]:
    """a_j^T D b_k of the components' sides, and D's squared norm, D = (now - before) / size; a layer at a time."""

    def of_layer(layer):
        a, b, now, before = layer
        change = (now.astype(jnp.float32) - before.astype(jnp.float32)) / size
        inputs = jnp.matmul(a.T, change, precision="highest")
        return jnp.matmul(inputs, b.T, precision="highest"), jnp.sum(change**2)

    cores, squares = jax.lax.map(of_layer, (component["a"], component["b"], now, before))
    return cores, squares.sum()
