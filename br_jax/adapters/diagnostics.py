"""What an adapter's deltas are and have in common, matrix by matrix, from low-rank factors only (no dense matrix).

On the host, by LAPACK in float64: whatever f32 adapters hold, its squares neither vanish nor overflow. Factors are the
paper's turned around: a = A^T is [L, I, R], b = B^T is [L, R, O] (L layers, I input width, O output width, R rank), so
the output space of W = s B A is spanned by the rows of b.
"""

import dataclasses
import math
from collections.abc import Mapping
from itertools import combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from scipy.linalg import orth, subspace_angles

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import NOISE_A_COLUMN
from br_jax.core.bounds import RANK, require

Pair = tuple[Float[np.ndarray, "L I R"], Float[np.ndarray, "L R O"]]


def factors(adapter: Adapter) -> dict[str, Pair]:
    """Each path's a, and b times the scale, in float64."""
    weights, scale = jax.device_get((adapter.weights, adapter.scale))
    return {path: (np.float64(pair["a"]), np.float64(scale) * pair["b"]) for path, pair in weights.items()}


def merge_report(user: Adapter, reinforce: Adapter, merge) -> dict[str, Any]:
    """What `merge.qr_merge` does to each matrix, of the same adapters and `MergeConfig`; it needs none of this.

    Returns:
        Ready for JSON: the settings by name; "user_only" and "ignored" (paths that only one of them has); "matrices":
        path -> lists over layers: "kept_rank", "removed_share", stable ranks and singular values of both,
        "principal_angles" in degrees.
    """
    users, reinforces = factors(user), factors(lora.scaled(reinforce, merge.reinforce_scale))
    matrices = {}
    for path in sorted(users.keys() & reinforces.keys()):
        (a_u, b_u), (a_r, b_r) = users[path], reinforces[path]
        sigmas = {"user": singular_values(a_u, b_u), "reinforce": singular_values(a_r, b_r)}
        matrices[path] = {
            "kept_rank": kept_ranks(a_u, merge.tau).tolist(),
            "removed_share": removed_shares((a_u, b_u), (a_r, b_r), merge.tau).tolist(),
            **{f"stable_rank_{role}": stable_ranks(sigma).tolist() for role, sigma in sigmas.items()},
            **{f"singular_values_{role}": sigma.tolist() for role, sigma in sigmas.items()},
            "principal_angles": [
                np.rad2deg(np.sort(subspace_angles(_span(one.T), _span(other.T)))).tolist()
                if one.any() and other.any()
                else []
                for one, other in zip(b_u, b_r, strict=True)
            ],
        }
    return {
        **dataclasses.asdict(merge),
        "user_only": sorted(users.keys() - reinforces.keys()),
        "ignored": sorted(reinforces.keys() - users.keys()),
        "matrices": matrices,
    }


def geometry(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """How long the deltas of named adapters are, and what angle each two of them make, over all matrices together.

    Returns:
        "norms": name -> Frobenius norm of its delta; "cosines": "first, second" -> their inner product over both norms,
        0 where a delta is 0. A matrix that only one of two has counts as 0 in the other.
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
        sigma = singular_values(a, b)
        found[path] = {"sigma": sigma, "stable_rank": stable_ranks(sigma), "effective_rank": kept_ranks(a, tau)}
    return found


def singular_values(a: Float[np.ndarray, "L I R"], b: Float[np.ndarray, "L R O"]) -> Float[np.ndarray, "L K"]:
    """Those of a @ b, descending, from the two triangular factors."""
    return np.linalg.svd(_core(a, b), compute_uv=False)


def stable_ranks(sigma: Float[np.ndarray, "L K"]) -> Float[np.ndarray, " L"]:
    """||W||_F^2 / ||W||_2^2 from W's singular values; 0 for W = 0."""
    return np.sum((sigma / np.where(sigma[:, :1] > 0, sigma[:, :1], 1)) ** 2, axis=1)


def kept_ranks(a: Float[np.ndarray, "L I R"], tau: float) -> np.ndarray:
    """How many eigenvalues of A A^T are above tau times the largest: the paper's rank check, see `merge.qr_merge`."""
    sigma = np.linalg.svd(np.linalg.qr(a, mode="r"), compute_uv=False)
    return np.sum(sigma > max(math.sqrt(tau), NOISE_A_COLUMN * a.shape[-1]) * sigma[:, :1], axis=1)


def output_spaces(a: Float[np.ndarray, "L I R"], b: Float[np.ndarray, "L R O"], tau: float) -> list[np.ndarray]:
    """Orthonormal columns that span what each layer effectively writes to, [O, rank]; see `merge.effective_basis`."""
    v = np.linalg.svd(np.linalg.qr(a, mode="r"))[2]
    kept = kept_ranks(a, tau)
    return [_span(b[layer].T @ v[layer, :rank].T) for layer, rank in enumerate(kept)]


def removed_shares(user: Pair, reinforce: Pair, tau: float) -> Float[np.ndarray, " L"]:
    """||Q Q^T W_R|| / ||W_R||, Q the user's output space: what a = 1 takes out; 0 for W_R = 0."""
    (a, b), triangle = reinforce, np.linalg.qr(reinforce[0], mode="r")
    inside = [np.linalg.norm(r @ (y @ q)) for r, y, q in zip(triangle, b, output_spaces(*user, tau), strict=True)]
    whole = np.linalg.norm(_core(a, b), axis=(1, 2))
    return np.array(inside) / np.where(whole > 0, whole, 1)


def best_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Any]]:
    """Approximates each matrix's delta, layer by layer, by the one of a given rank that is nearest in Frobenius norm.

    With a = Q_a R_a and b^T = Q_b R_b the delta is Q_a (R_a R_b^T) Q_b^T; the core in brackets is small and has the
    delta's singular values (Eckart and Young, 1936). From the adapter's own rank on, its delta comes back the same.

    Returns:
        An adapter with scale 1 and the same roles, balanced (each singular value's root goes to both sides); a path
        whose delta cannot have this rank gets the highest that it can. And figures ready for JSON: "rank",
        "relative_error" (||delta - approximation|| / ||delta|| over all matrices together) and "matrices" (path ->
        the same of each layer); the error of a zero delta is 0.

    Raises:
        UserError: a rank below 1 or above 65,536, or numbers that are not finite.
    """
    require("rank", rank, RANK)
    lora.require_finite(adapter)
    weights, lost, whole = {}, {}, {}
    for path, (a, b) in factors(adapter).items():
        (q_a, r_a), (q_b, r_b) = np.linalg.qr(a), np.linalg.qr(b.mT)
        u, sigma, v = np.linalg.svd(r_a @ r_b.mT, full_matrices=False)  # rows of v
        root = np.sqrt(sigma[:, None, :rank])
        sides = {"a": root * (q_a @ u[:, :, :rank]), "b": (root * (q_b @ v[:, :rank].mT)).mT}
        weights[path] = {name: jnp.asarray(side, jnp.float32) for name, side in sides.items()}
        whole[path], lost[path] = np.sum(sigma**2, axis=1), np.sum(sigma[:, rank:] ** 2, axis=1)

    def relative(part: float, total: float) -> float:
        return math.sqrt(part / total) if total > 0 else 0.0

    return adapter.replace(weights=weights, scale=jnp.float32(1)), {
        "rank": rank,
        "relative_error": relative(sum(map(np.sum, lost.values())), sum(map(np.sum, whole.values()))),
        "matrices": {path: list(map(relative, lost[path], whole[path])) for path in whole},
    }


def _core(a: Float[np.ndarray, "L I R"], b: Float[np.ndarray, "L R O"]) -> Float[np.ndarray, "L J K"]:
    """The small matrices that have the singular values and the norms of a @ b."""
    return np.linalg.qr(a, mode="r") @ np.linalg.qr(b.mT, mode="r").mT


def _span(columns: Float[np.ndarray, "O R"]) -> Float[np.ndarray, "O K"]:
    """An orthonormal basis of what the columns span, as far as f32 tells it from rounding."""
    return orth(columns, rcond=NOISE_A_COLUMN * columns.shape[1]) if columns.size else columns
