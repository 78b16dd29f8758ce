"""What an adapter's deltas are and have in common, matrix by matrix, from low-rank factors only (no dense matrix).

Factors are the paper's turned around: a = A^T is [I, R], b = B^T is [R, O] (I input width, O output width, R rank), so
the output space of W = s B A is spanned by the rows of b. Matrix products run at the highest precision, or an
accelerator would round them to bfloat16; every SVD says `full_matrices=False`, even without vectors, or the CPU's
allocates a square one.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from itertools import combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg.cython_lapack  # noqa: F401  # JAX loads it, and its BLAS, at the first factorization: too late to limit
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import RANK, require

# Householder QR of f32 columns leaves about 1 eps (relative to the largest singular value) where the true value is 0;
# four eps a column stands clear of that noise and far below any direction that f32 can still resolve.
_NOISE_A_COLUMN = 4 * float(np.finfo(np.float32).eps)


def one_blas_thread() -> contextlib.AbstractContextManager:
    """While it lasts, BLAS does not thread the calls that it gets.

    On a CPU factorizations are LAPACK's, called from XLA's own threads: a BLAS that threads each call once more has
    them wait for one another, from seconds to forever. Wait for the results inside of it.
    """
    return threadpool_limits(limits=1, user_api="blas")


def merge_report(user: Adapter, reinforce: Adapter, merge) -> dict[str, Any]:
    """What `merge.qr_merge` does to each matrix, of the same adapters and `MergeConfig`; it needs none of this.

    Returns:
        Ready for JSON: the settings by name; "user_only" and "ignored" (paths that only one of them has); "matrices":
        path -> lists over layers: "kept_rank", "removed_share", stable ranks and singular values of both,
        "principal_angles" in degrees.
    """
    shared = sorted(user.weights.keys() & reinforce.weights.keys())
    matrices = {}
    with one_blas_thread():
        for path in shared:
            settings = user.scale, merge.reinforce_scale * reinforce.scale, np.float32(merge.tau)
            report = jax.device_get(_matrix_report(user.weights[path], reinforce.weights[path], *settings))
            lists = {name: values.tolist() for name, values in report.items()}
            counts, angles = lists.pop("angle_count"), lists["principal_angles"]
            matrices[path] = lists | {"principal_angles": [a[:n] for a, n in zip(angles, counts, strict=True)]}
    return {
        **dataclasses.asdict(merge),
        "user_only": sorted(user.weights.keys() - reinforce.weights.keys()),
        "ignored": sorted(reinforce.weights.keys() - user.weights.keys()),
        "matrices": matrices,
    }


def geometry(adapters: Mapping[str, Adapter]) -> dict[str, dict[str, float]]:
    """How long the deltas of named adapters are, and what angle each two of them make, over all matrices together.

    Returns:
        "norms": name -> Frobenius norm of its delta; "cosines": "first, second" -> their inner product over both norms,
        0 where a delta is 0. A matrix that only one of two has counts as 0 in the other.
    """
    pairs = combinations_with_replacement(adapters, 2)
    inner = {pair: float(inner_product(*map(adapters.get, pair))) for pair in pairs}
    norms = {name: math.sqrt(max(inner.pop((name, name)), 0.0)) for name in adapters}
    cosines = {f"{x}, {y}": value / (norms[x] * norms[y] or math.inf) for (x, y), value in inner.items()}
    return {"norms": norms, "cosines": cosines}


def inner_product(first: Adapter, second: Adapter) -> Float[Array, ""]:
    """The sum of products of all entries of two deltas, f32: sum((A1^T A2) * (B1 B2^T)) of each matrix and layer."""
    shared = sorted(first.weights.keys() & second.weights.keys())
    one, other = ({path: adapter.weights[path] for path in shared} for adapter in (first, second))
    return first.scale * second.scale * _inner_product(one, other)


@jax.jit
def _inner_product(one: dict[str, dict[str, Array]], other: dict[str, dict[str, Array]]) -> Float[Array, ""]:
    total = jnp.float32(0)
    for path in one:
        inputs = jnp.einsum("lir,lis->lrs", one[path]["a"], other[path]["a"], precision="highest")
        outputs = jnp.einsum("lro,lso->lrs", one[path]["b"], other[path]["b"], precision="highest")
        total += jnp.sum(inputs * outputs)
    return total


def measure(adapter: Adapter, tau: float) -> dict[str, dict[str, np.ndarray]]:
    """Each path's singular values of its delta, "sigma" [L, K], and its "stable_rank" and "effective_rank" [L]."""
    settings = adapter.scale, np.float32(tau)
    with one_blas_thread():
        return {path: jax.device_get(_measure(pair, *settings)) for path, pair in adapter.weights.items()}


@jax.jit
def _measure(
    pair: dict[str, Float[Array, "L ..."]], scale: Float[Array, ""], tau: Float[Array, ""]
) -> dict[str, Float[Array, "L ..."] | Int[Array, " L"]]:
    def of_layer(pair):
        sigma, (_, rank) = singular_values(pair["a"], pair["b"], scale), effective_basis(pair["a"], pair["b"], tau)
        return {"sigma": sigma, "stable_rank": stable_rank(sigma), "effective_rank": rank}

    return jax.lax.map(of_layer, pair)


@jax.jit
def _matrix_report(user: dict, reinforce: dict, user_scale, reinforce_scale, tau: float) -> dict[str, Array]:
    """Every layer's figures of one matrix, from factors in short coordinates.

    Arrays are of a fixed size; `angle_count` says how many of the `principal_angles` are real.
    """

    def of_layer(pairs):
        user, reinforce = pairs
        user_b, reinforce_b = output_coordinates(user["b"], reinforce["b"])
        user_a, reinforce_a = (jnp.linalg.qr(pair["a"], mode="r") for pair in pairs)
        basis, kept = effective_basis(user_a, user_b, tau)
        sigmas = {
            "user": singular_values(user_a, user_b, user_scale),
            "reinforce": singular_values(reinforce_a, reinforce_b, reinforce_scale),
        }
        angles, count = principal_angles(*column_basis(user_b.T), *column_basis(reinforce_b.T))
        report = {"kept_rank": kept, "removed_share": removed_share(reinforce_a, reinforce_b, basis)}
        report |= {f"stable_rank_{role}": stable_rank(sigma) for role, sigma in sigmas.items()}
        report |= {f"singular_values_{role}": sigma for role, sigma in sigmas.items()}
        return report | {"principal_angles": angles, "angle_count": count}

    return jax.lax.map(of_layer, (user, reinforce))


def output_coordinates(
    first: Float[Array, "J O"], second: Float[Array, "K O"]
) -> tuple[Float[Array, "J N"], Float[Array, "K N"]]:
    """Writes the rows of two matrices in one orthonormal basis of both their spans, of N <= J + K vectors.

    Products and lengths are what they were, so whatever is asked about two wide b can be asked about the short ones,
    which an SVD of takes no time.

    Returns:
        Both in coordinates of that basis. Its first min(J, O) vectors span the rows of `first`; along the others, which
        are never made, `first` is 0.
    """
    q, triangle = jnp.linalg.qr(first.T)
    inside = jnp.matmul(second, q, precision="highest")
    rest = jnp.linalg.qr((second - jnp.matmul(inside, q.T, precision="highest")).T, mode="r")
    padded = jnp.pad(triangle.T, [(0, 0), (0, rest.shape[0])])
    return padded, jnp.concatenate([inside, rest.T], axis=1)


def effective_basis(
    a: Float[Array, "I R"], b: Float[Array, "R O"], tau: Float[Array, ""]
) -> tuple[Float[Array, "O K"], Int[Array, ""]]:
    """Spans the subspace that an adapter effectively writes to (the paper's Q and its rank check).

    The rule: eigenpairs (lambda, V) of A A^T, keep lambda > tau * lambda_max, Q = basis of B V_kept. The
    pairs come from an SVD of A's triangular factor, where lambda = sigma^2: forming A A^T would square A's
    condition number.

    Returns:
        Q, zero in its unused columns, and the number of eigenvalues kept.
    """
    triangle = jnp.linalg.qr(a, mode="r")
    _, sigma, v = jnp.linalg.svd(triangle, full_matrices=False)  # rows of v, descending sigma
    relative = jnp.maximum(jnp.sqrt(tau), _NOISE_A_COLUMN * a.shape[1])
    kept = sigma > relative * sigma[0]
    columns = jnp.matmul(b.T, jnp.where(kept, v.T, 0), precision="highest")  # [O, K]
    basis, _ = column_basis(columns)
    return basis, kept.sum()


def column_basis(columns: Float[Array, "O R"]) -> tuple[Float[Array, "O K"], Int[Array, ""]]:
    """Spans the columns of a matrix that may be rank-deficient, or zero, with static shapes.

    Thin QR alone is not enough: it completes the basis with invented columns wherever the given ones are zero
    or repeated, and without pivoting a small diagonal of R does not say which ones. So QR reduces the matrix
    to its small triangle, an SVD of that orders the directions by size, and those at rounding level are
    masked. For a matrix of full rank the span, and so the projector Q Q^T, is that of plain thin QR. Working
    from the factor rather than from the Gram matrix keeps all the digits of f32.

    Returns:
        Q, K = min(O, R), with orthonormal or zero columns, the zero ones last; and the rank.
    """
    q, triangle = jnp.linalg.qr(columns)
    u, sigma, _ = jnp.linalg.svd(triangle, full_matrices=False)
    real = sigma > _NOISE_A_COLUMN * columns.shape[1] * sigma[0]
    # a choice, not a product: whatever an SVD returns for a zero matrix, masked columns are exactly zero
    return jnp.where(real, jnp.matmul(q, u, precision="highest"), 0), real.sum()


def singular_values(a: Float[Array, "I R"], b: Float[Array, "R O"], scale: Float[Array, ""]) -> Float[Array, " K"]:
    """Gives the singular values of scale * a @ b, descending, from the two triangular factors."""
    return jnp.linalg.svd(scale * _core(a, b), full_matrices=False, compute_uv=False)


def stable_rank(sigma: Float[Array, " K"]) -> Float[Array, ""]:
    """Gives ||W||_F^2 / ||W||_2^2 from W's singular values; 0 for W = 0."""
    largest = sigma[0]
    return jnp.sum((sigma / jnp.where(largest > 0, largest, 1)) ** 2)


def removed_share(a: Float[Array, "I R"], b: Float[Array, "R O"], basis: Float[Array, "O K"]) -> Float[Array, ""]:
    """Gives ||Q Q^T W||_F / ||W||_F, the part of W = a @ b inside the span of the basis; 0 for W = 0."""
    inside = jnp.matmul(b, basis, precision="highest")  # [R, K]; Q is orthonormal and drops out of the norm
    triangle = jnp.linalg.qr(a, mode="r")
    part = jnp.linalg.norm(jnp.matmul(triangle, inside, precision="highest"))
    whole = jnp.linalg.norm(_core(a, b))
    return part / jnp.where(whole > 0, whole, 1)


def principal_angles(
    first: Float[Array, "O J"], first_rank: Int[Array, ""], second: Float[Array, "O K"], second_rank: Int[Array, ""]
) -> tuple[Float[Array, " M"], Int[Array, ""]]:
    """Measures the angles between the spans of two masked bases, each as `column_basis` makes it.

    Small angles come from sines and large ones from cosines (Bjorck and Golub): an arccos near 1 loses half
    the digits.

    Returns:
        min(J, K) angles in degrees, ascending, and how many of them are real: min(first_rank, second_rank).
    """
    cosines_matrix = jnp.matmul(first.T, second, precision="highest")  # [J, K]
    cosines = jnp.linalg.svd(cosines_matrix, full_matrices=False, compute_uv=False)
    rest = second - jnp.matmul(first, cosines_matrix, precision="highest")
    sines = jnp.linalg.svd(rest, full_matrices=False, compute_uv=False)
    sines = sines[::-1]  # ascending: a zero for each unused column comes first
    unused = sines.shape[0] - second_rank
    sines = jnp.take(sines, unused + jnp.arange(cosines.shape[0]), mode="clip")
    cosines, sines = jnp.clip(cosines, 0, 1), jnp.clip(sines, 0, 1)
    angles = jnp.where(cosines**2 < 0.5, jnp.arccos(cosines), jnp.arcsin(sines))
    return jnp.rad2deg(angles), jnp.minimum(first_rank, second_rank)


def _core(a: Float[Array, "I R"], b: Float[Array, "R O"]) -> Float[Array, "J K"]:
    """Gives the small matrix that has the singular values and the norm of a @ b."""
    left, right = jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.T, mode="r")
    return jnp.matmul(left, right.T, precision="highest")


def best_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, Any]]:
    """Approximates each matrix's delta, layer by layer, by the one of a given rank that is nearest in Frobenius norm.

    From the adapter's own rank on, its delta comes back the same (to f32 rounding).

    Returns:
        An adapter with scale 1 and the same roles, balanced (each singular value's root goes to both sides); a path
        whose delta cannot have this rank gets the highest that it can. And figures ready for JSON: "rank",
        "relative_error" (||delta - approximation|| / ||delta|| over all matrices together) and "matrices" (path ->
        the same of each layer); the error of a zero delta is 0.

    Raises:
        UserError: a rank below 1 or above 65,536, or numbers that are not finite.
    """
    require("rank", rank, RANK)
    with one_blas_thread():
        results = {
            path: jax.block_until_ready(_best_factors(pair["a"], pair["b"], adapter.scale, rank))
            for path, pair in adapter.weights.items()
        }
    weights = {path: {"a": a, "b": b} for path, (a, b, _) in results.items()}
    # squares in float64: in f32 those of a small adapter would be 0
    squares = {path: np.square(jax.device_get(sigma), dtype=np.float64) for path, (_, _, sigma) in results.items()}
    lost = {path: square[:, rank:].sum(axis=-1) for path, square in squares.items()}
    whole = {path: square.sum(axis=-1) for path, square in squares.items()}
    if not np.isfinite(sum(map(np.sum, whole.values()))):
        lora.require_finite(adapter)  # says which of its numbers it is

    def relative(part, total):
        return math.sqrt(part / total) if total > 0 else 0.0

    return adapter.replace(weights=weights, scale=jnp.float32(1)), {
        "rank": rank,
        "relative_error": relative(sum(map(np.sum, lost.values())), sum(map(np.sum, whole.values()))),
        "matrices": {path: list(map(relative, lost[path], whole[path])) for path in squares},
    }


@functools.partial(jax.jit, static_argnames="rank")
def _best_factors(
    a: Float[Array, "L I R"], b: Float[Array, "L R O"], scale: Float[Array, ""], rank: int
) -> tuple[Float[Array, "L I K"], Float[Array, "L K O"], Float[Array, "L M"]]:
    """Factors the best approximation of scale * a @ b, and gives all M = min(I, O, R) singular values, descending.

    With a = Q_a R_a and b^T = Q_b R_b the delta is Q_a (scale R_a R_b^T) Q_b^T; the core in brackets is small and has
    the delta's singular values.
    """
    q_a, r_a = jnp.linalg.qr(a)
    q_b, r_b = jnp.linalg.qr(b.mT)
    core = scale * jnp.matmul(r_a, r_b.mT, precision="highest")
    u, sigma, v = jnp.linalg.svd(core, full_matrices=False)  # rows of v
    root = jnp.sqrt(sigma[:, None, :rank])
    left = jnp.matmul(q_a, u[:, :, :rank], precision="highest")
    right = jnp.matmul(q_b, v[:, :rank].mT, precision="highest")
    # a choice, not a product: whatever an SVD returns for a zero matrix, the factors are exactly zero
    left, right = (jnp.where(root > 0, side * root, 0) for side in (left, right))
    return left, right.mT, sigma
