"""What is in adapters: figures of the merge, the best lower rank, and the guard, which knows a Buffer by its numbers.

All from low-rank factors, on the host in float64: whatever f32 adapters hold, its squares neither vanish nor overflow.
Factors are the paper's turned around: a = A^T is [L, I, R], b = B^T is [L, R, O], so the output space of W = s B A is
spanned by the rows of b.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict
from jaxtyping import Float
from scipy.linalg import orth, subspace_angles

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import NOISE_A_COLUMN
from br_jax.core.bounds import RANK, require
from br_jax.core.errors import UserError

# The guard's limits, measured: docs/provider.md. A Reinforce points away from Buffer, so the sign counts; but what is
# its exact opposite gives it away.
COSINE, OPPOSITE, SHARE = 0.3, -0.7, 0.12
_NOISE = 1e-6  # of the largest singular value: below it f32 knows no direction
_CANCELLED = 1e-8  # of the squares of an adapter's columns: a delta that is less is their rounding

Pair = tuple[Float[np.ndarray, "L I R"], Float[np.ndarray, "L R O"]]


def factors(adapter: Adapter) -> dict[str, Pair]:
    """Each path's a, and b times the scale, in float64."""
    weights, scale = jax.device_get((adapter.weights, adapter.scale))
    return {path: (np.float64(pair["a"]), np.float64(scale) * pair["b"]) for path, pair in weights.items()}


def merge_report(user: Adapter, reinforce: Adapter, merge) -> dict[str, Any]:
    """What `merge.qr_merge` does to each matrix, of the same adapters and `MergeConfig`, ready for JSON.

    The settings by name; "user_only" and "ignored" paths; "matrices": path -> lists over layers, angles in degrees.
    """
    users, reinforces = factors(user), factors(lora.scaled(reinforce, merge.reinforce_scale))
    matrices = {}
    for path in sorted(users.keys() & reinforces.keys()):
        (a_u, b_u), (a_r, b_r) = users[path], reinforces[path]
        sigmas = {"user": _singular_values(a_u, b_u), "reinforce": _singular_values(a_r, b_r)}
        matrices[path] = {
            "kept_rank": _kept_ranks(a_u, merge.tau).tolist(),
            "removed_share": removed_shares((a_u, b_u), (a_r, b_r), merge.tau).tolist(),
            **{f"stable_rank_{role}": _stable_ranks(sigma).tolist() for role, sigma in sigmas.items()},
            **{f"singular_values_{role}": sigma.tolist() for role, sigma in sigmas.items()},
            "principal_angles": [
                np.rad2deg(np.sort(subspace_angles(_span(one.T), _span(other.T)))).tolist()
                if one.any() and other.any()
                else []
                for one, other in zip(b_u, b_r, strict=True)
            ],
        }
    one_sided = {"user_only": users.keys() - reinforces.keys(), "ignored": reinforces.keys() - users.keys()}
    paths = {name: sorted(only) for name, only in one_sided.items()}
    return {**dataclasses.asdict(merge), **paths, "matrices": matrices}


def geometry(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """How long the deltas of named adapters are, and what angle each two of them make, over all matrices together.

    {"norms": name -> Frobenius norm; "cosines": "first, second" -> inner product over both norms, 0 where one is 0}. A
    matrix that only one of two has counts as 0 in the other.
    """
    inner = {pair: inner_product(*map(adapters.get, pair)) for pair in combinations_with_replacement(adapters, 2)}
    norms = {name: math.sqrt(max(inner.pop((name, name)), 0.0)) for name in adapters}
    cosines = {f"{x}, {y}": value / (norms[x] * norms[y] or math.inf) for (x, y), value in inner.items()}
    return {"norms": norms, "cosines": cosines}


def inner_product(first: Adapter, second: Adapter) -> float:
    """The sum of products of all entries of two deltas: sum((A1^T A2) * (B1 B2^T)) of each matrix and layer."""
    one, other = factors(first), factors(second)
    return sum(
        float(np.sum((one[path][0].mT @ other[path][0]) * (one[path][1] @ other[path][1].mT)))
        for path in sorted(one.keys() & other.keys())
    )


def measure(adapter: Adapter, tau: float) -> dict[str, dict[str, np.ndarray]]:
    """Each path's singular values of its delta, "sigma" [L, K], and its "stable_rank" and "effective_rank" [L]."""
    found = {}
    for path, (a, b) in factors(adapter).items():
        sigma = _singular_values(a, b)
        found[path] = {"sigma": sigma, "stable_rank": _stable_ranks(sigma), "effective_rank": _kept_ranks(a, tau)}
    return found


def output_spaces(a: Float[np.ndarray, "L I R"], b: Float[np.ndarray, "L R O"], tau: float) -> list[np.ndarray]:
    """Orthonormal columns that span what each layer effectively writes to, [O, rank]; see `merge.effective_basis`."""
    v = np.linalg.svd(np.linalg.qr(a, mode="r"))[2]
    return [_span(b[layer].T @ v[layer, :rank].T) for layer, rank in enumerate(_kept_ranks(a, tau))]


def removed_shares(user: Pair, reinforce: Pair, tau: float) -> Float[np.ndarray, " L"]:
    """||Q Q^T W_R|| / ||W_R||, Q the user's output space: what a = 1 takes out; 0 for W_R = 0."""
    (a, b), triangle = reinforce, np.linalg.qr(reinforce[0], mode="r")
    inside = [np.linalg.norm(r @ (y @ q)) for r, y, q in zip(triangle, b, output_spaces(*user, tau), strict=True)]
    return _divide(np.array(inside), np.linalg.norm(_core(a, b), axis=(1, 2)))


def _core(a: Float[np.ndarray, "L I R"], b: Float[np.ndarray, "L R O"]) -> Float[np.ndarray, "L J K"]:
    """The small matrices that have the singular values and the norms of a @ b."""
    return np.linalg.qr(a, mode="r") @ np.linalg.qr(b.mT, mode="r").mT


def _singular_values(a: Float[np.ndarray, "L I R"], b: Float[np.ndarray, "L R O"]) -> Float[np.ndarray, "L K"]:
    return np.linalg.svd(_core(a, b), compute_uv=False)


def _stable_ranks(sigma: Float[np.ndarray, "L K"]) -> Float[np.ndarray, " L"]:
    """||W||_F^2 / ||W||_2^2 from W's singular values; 0 for W = 0."""
    return np.sum((sigma / np.where(sigma[:, :1] > 0, sigma[:, :1], 1)) ** 2, axis=1)


def _kept_ranks(a: Float[np.ndarray, "L I R"], tau: float) -> np.ndarray:
    """How many eigenvalues of A A^T are above tau times the largest: the paper's rank check, see `merge.qr_merge`."""
    sigma = np.linalg.svd(np.linalg.qr(a, mode="r"), compute_uv=False)
    return np.sum(sigma > max(math.sqrt(tau), NOISE_A_COLUMN * a.shape[-1]) * sigma[:, :1], axis=1)


def _span(columns: Float[np.ndarray, "O R"]) -> Float[np.ndarray, "O K"]:
    """An orthonormal basis of what the columns span, as far as f32 tells it from rounding."""
    return orth(columns, rcond=NOISE_A_COLUMN * columns.shape[1]) if columns.size else columns


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    """0 where there is nothing to divide by."""
    return np.divide(values, by, where=by > 0, out=np.zeros(by.shape))


def best_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Any]]:
    """Approximates each matrix's delta, layer by layer, by the nearest one of a given rank (Eckart and Young, 1936).

    The roots of the singular values go to both sides of the result (scale 1, the same roles). Also figures for JSON:
    "rank", "relative_error" (||delta - approximation|| / ||delta||, or 0), and "matrices": path -> that of each layer.
    """
    require("rank", rank, RANK)
    lora.require_finite(adapter)
    weights, lost, whole = {}, {}, {}
    for path, (a, b) in factors(adapter).items():
        (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.mT)
        u, sigma, v = np.linalg.svd(r_a @ r_b.mT, full_matrices=False)  # rows of v
        root = np.sqrt(sigma[:, None, :rank])
        sides = {"a": root * (q_a @ u[:, :, :rank]), "b": (root * (q_b @ v[:, :rank].mT)).mT}
        weights[path] = jax.device_put({name: np.float32(side) for name, side in sides.items()})
        whole[path], lost[path] = np.sum(sigma**2, axis=1), np.sum(sigma[:, rank:] ** 2, axis=1)
    total = [np.array([sum(map(np.sum, each.values()))]) for each in (lost, whole)]
    return adapter.replace(weights=weights, scale=jnp.float32(1)), {
        "rank": rank,
        "relative_error": float(np.sqrt(_divide(*total))[0]),
        "matrices": {path: np.sqrt(_divide(lost[path], whole[path])).tolist() for path in whole},
    }


class Similarity(NamedTuple):
    """What two deltas have in common, over the matrices of the first.

    A delta is a sum of R components in each matrix: pairs of an input and an output direction. An adapter that was made
    from the first has the same part of nearly all pairs; one that was trained on its own has next to none of most.
    """

    cosine: float  # of the angle between them, from -1 to 1; 0 where one of them is 0
    # The largest t * e such that components which are in the second at least t-fold, beyond what it has of other pairs
    # of their directions, make up a part e of the first (by singular values).
    share: float

    @property
    def is_buffer(self) -> bool:
        """Whether the second has more of the first, a Buffer, in it than a user's adapter can have."""
        return self.cosine >= COSINE or self.cosine <= OPPOSITE or self.share >= SHARE


def components(adapter: Adapter) -> Adapter:
    """The same delta, of scale 1, with `a` and `b` of orthogonal vectors: what others are compared with."""
    return best_rank(adapter, max((pair["a"].shape[-1] for pair in adapter.weights.values()), default=1))[0]


def similarity(reference: Adapter, other: Adapter) -> Similarity:
    """How like `components` of an adapter another of the same base is; matrices that only the other has do not count.

    A `UserError` where numbers are not finite, or columns cancel each other, so that nothing can be told.
    """
    lora.require_finite(other)
    mine, theirs = factors(reference), factors(other)
    cores, columns, square = {}, 0.0, 0.0
    for path in sorted(mine.keys() & theirs.keys()):
        (own_a, own_b), (a, b) = mine[path], theirs[path]
        cores[path] = (own_a.mT @ a) @ (b @ own_b.mT)  # a_j^T (a @ b) b_k of the components' sides
        columns += np.sum(np.sum(a**2, axis=1) * np.sum(b**2, axis=2))
        square += np.sum((a.mT @ a) * (b @ b.mT))
    if square < _CANCELLED * columns:
        raise UserError("refused: the adapter's columns cancel each other, so nobody can tell what is in it")
    return _similarity(mine, cores, square)


def similarity_of_change(reference: Adapter, params: Mapping[str, Any], base: Mapping[str, Any]) -> Similarity:
    """How like `components` of an adapter the difference between two trees of params is."""
    now, before = (flatten_dict(dict(tree), sep="/") for tree in (params, base))
    mine, cores, square = factors(reference), {}, 0.0
    for path, (own_a, own_b) in mine.items():
        cores[path] = np.empty((len(own_a), own_a.shape[2], own_b.shape[1]))
        for layer, pair in enumerate(zip(*(np.asarray(tree[f"{path}/kernel"]) for tree in (now, before)), strict=True)):
            with np.errstate(all="ignore"):  # what is not finite is refused below
                change = np.subtract(*map(np.float64, pair))
                cores[path][layer] = own_a[layer].T @ change @ own_b[layer].T
                square += np.square(change).sum()
    if not math.isfinite(square):
        raise UserError("refused: the model's weights are not finite")
    return _similarity(mine, cores, square)


def _similarity(mine: Mapping[str, Pair], cores: Mapping[str, np.ndarray], square: float) -> Similarity:
    """From components, what the other delta has of all pairs of their directions, and its squared norm."""
    sigmas, parts, inner = [np.zeros(0)], [np.zeros(0)], 0.0
    for path, (own_a, _) in mine.items():
        sigma = np.square(own_a).sum(axis=1)  # [L, K]: each side of a component holds the root of its singular value
        sigma = np.where(sigma > _NOISE * sigma.max(axis=1, keepdims=True), sigma, 0)
        core = cores.get(path, np.zeros((*sigma.shape, sigma.shape[1])))
        core = _divide(core, np.sqrt(sigma)[:, :, None] * np.sqrt(sigma)[:, None, :])
        own = np.diagonal(core, axis1=1, axis2=2)  # u_k^T D v_k of each pair
        others = (np.square(core).sum(axis=1) + np.square(core).sum(axis=2)) / 2 - own**2
        pairs = np.maximum((sigma > 0).sum(axis=1, keepdims=True) - 1, 1)
        sigmas.append(sigma.ravel())
        parts.append(_divide(own - np.sqrt(np.maximum(others, 0) / pairs), sigma).ravel())
        inner += (own * sigma).sum()
    sigma, part = map(np.concatenate, (sigmas, parts))
    length = math.sqrt(np.square(sigma).sum() * square)
    if not length > 0:
        return Similarity(0.0, 0.0)
    order = np.argsort(-part)
    at_least = np.cumsum(sigma[order]) / sigma.sum()
    return Similarity(float(inner / length), float(np.max(np.clip(part[order], 0, 1) * at_least)))


@dataclasses.dataclass(frozen=True)
class Guard:
    """What adapters and models that are handed on are held against.

    It finds a Buffer that was relabelled, scaled, rounded, cut, merged, split or folded into the base; not one that its
    holder hides with skill.
    """

    params: Mapping[str, Any]  # of the aligned base, by which a model that something was folded into is known
    fingerprints: tuple[str, ...]  # of its Buffers
    references: tuple[Adapter, ...]  # the Buffers' `components`

    @classmethod
    def of(cls, params: Mapping[str, Any], buffers: Sequence[Adapter]) -> "Guard":
        """The guard of a base and its Buffers."""
        return cls(params, tuple(map(lora.fingerprint, buffers)), tuple(map(components, buffers)))

    def refuse(self, place: object, adapter: Adapter) -> None:
        """Raises a `UserError` where an adapter has more of a Buffer in it than a user's can have."""
        self._refuse(f"{place}: refused, for this adapter", [similarity(each, adapter) for each in self.references])

    def refuse_model(self, place: object, params: Mapping[str, Any]) -> None:
        """Raises a `UserError` where a model differs from the aligned base by something like a Buffer."""
        if params is not self.params:
            found = [similarity_of_change(each, params, self.params) for each in self.references]
            self._refuse(f"{place}: refused, for what was folded into this model", found)

    def _refuse(self, what: str, found: Sequence[Similarity]) -> None:
        for each in found:
            if each.is_buffer:
                raise UserError(
                    f"{what} is like the provider's Buffer (cosine {each.cosine:.2f}, share {each.share:.2f}; a user's "
                    f"stays below {COSINE} and {SHARE}): it undoes the model's alignment; keep it in the provider's "
                    "folder"
                )


def warn_unguarded(place: object) -> None:
    """Says that no Buffer was at hand to compare with."""
    cure = "load the model from a provider's folder, or use br.guard"
    logging.warning("%s: not compared with a Buffer, as none is at hand: %s", place, cure)
