"""The best adapter of a lower rank (Eckart and Young, 1936), from low-rank factors only: no dense matrix."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from br_jax.adapters import lora
from br_jax.adapters.lapack import one_blas_thread
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import RANK, require


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
    lora.require_finite(adapter)
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
    return adapter.replace(weights=weights, scale=jnp.float32(1)), {
        "rank": rank,
        "relative_error": _relative(sum(map(np.sum, lost.values())), sum(map(np.sum, whole.values()))),
        "matrices": {path: list(map(_relative, lost[path], whole[path])) for path in squares},
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


def _relative(lost: float, whole: float) -> float:
    """Gives sqrt(lost / whole), 0 if there is nothing to lose."""
    return math.sqrt(lost / whole) if whole > 0 else 0.0
