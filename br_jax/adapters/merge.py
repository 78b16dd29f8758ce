"""The release step: QR-merge the reinforce adapter into the user's (arXiv 2605.24550)."""

import contextlib
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg.cython_lapack  # noqa: F401  # JAX loads it, and its BLAS, at the first factorization: too late to limit
from absl import logging
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import SHARE, number, require_bounds
from br_jax.core.errors import UserError

# Householder QR of f32 columns leaves about 1 eps (relative to the largest singular value) where the true value is 0;
# four eps a column stands clear of that noise and far below any direction that f32 can still resolve.
NOISE_A_COLUMN = 4 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Settings of the merge; the defaults are the paper's.

    Attributes:
        a: orthogonalization strength (the paper's alpha), from 0, a plain average, to 1.
        scale: factor of the sum, in (0, 100].
        tau: an eigenvalue of A_U A_U^T counts above tau times the largest; 0 <= tau < 1.
        reinforce_scale: factor of W_R alone, in [0, 100]; 1 in the paper, less where Reinforce makes the model
            over-refuse.
    """

    a: float = number(0.1, *SHARE)
    scale: float = number(0.5, 0.0, 100.0, open_low=True)
    tau: float = number(0.01, 0.0, 1.0, open_high=True)
    reinforce_scale: float = number(1.0, 0.0, 100.0)

    def __post_init__(self):
        require_bounds(self, "merge")


def qr_merge(user: Adapter, reinforce: Adapter, merge: MergeConfig | None = None) -> Adapter:
    """Merges two adapters after taking out of the second what would disturb the first.

    Per matrix and layer: W = scale * (W_U + reinforce_scale * (I - a Q Q^T) W_R), Q spanning the user's effective
    output space (see `diagnostics.effective_basis`). Exact in low rank: only the reinforce adapter's `b` changes, and
    the two are concatenated along the rank. A matrix that only the user has becomes scale * W_U; one that only
    the reinforce adapter has is left out, as in the reference code, with a warning.

    Returns:
        One adapter: scale 1, rank R_U + R_R, roles united. What it did to each matrix: `diagnostics.merge_report`.

    Raises:
        UserError: a buffer among the roles, numbers that are not finite, or adapters that do not belong together.
    """
    shared = _shared_paths(user, reinforce)
    if ignored := sorted(reinforce.weights.keys() - shared):
        logging.warning("QR merge leaves out what only the reinforce adapter has: %s", ", ".join(ignored))
    merge = merge or MergeConfig()
    a, tau, scale, reinforce_scale = map(np.float32, (merge.a, merge.tau, merge.scale, merge.reinforce_scale))
    pairs = {path: (user.weights[path], reinforce.weights[path]) for path in shared}
    with one_blas_thread():
        apart = jax.block_until_ready(_apart_from(pairs, a, tau))
    reinforce = lora.scaled(reinforce.replace(weights=apart), reinforce_scale)
    return lora.stack([lora.scaled(user, scale), lora.scaled(reinforce, scale)])


@jax.jit
def _apart_from(pairs: dict[str, tuple[dict, dict]], strength: float, tau: float) -> dict[str, dict[str, Array]]:
    """Of each path's user and reinforce weights, the latter with (I - a Q Q^T) B_R in every layer.

    b is the paper's B turned around, so Q Q^T stands to its right.
    """

    def of_layer(factors):
        user, b = factors
        q, _ = effective_basis(user["a"], user["b"], tau)  # [O, K]
        return b - strength * jnp.matmul(jnp.matmul(b, q, precision="highest"), q.T, precision="highest")

    return {
        path: {"a": reinforce["a"], "b": jax.lax.map(of_layer, (user, reinforce["b"]))}
        for path, (user, reinforce) in pairs.items()
    }


def _shared_paths(user: Adapter, reinforce: Adapter) -> Sequence[str]:
    """The matrices that both adapters change; a `UserError` for what must not or cannot be merged."""
    for adapter in (user, reinforce):
        lora.require_adapter(adapter, "QR merge")
        lora.refuse_buffer("QR merge", adapter.roles)
        lora.require_finite(adapter)
    shared = sorted(user.weights.keys() & reinforce.weights.keys())
    if not shared:
        raise UserError(
            f"QR merge: no matrix in common; user has {sorted(user.weights)}, reinforce has {sorted(reinforce.weights)}"
        )
    for path in shared:
        lora.require_same_kernel(path, [user, reinforce])
    return shared


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
    relative = jnp.maximum(jnp.sqrt(tau), NOISE_A_COLUMN * a.shape[1])
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
    real = sigma > NOISE_A_COLUMN * columns.shape[1] * sigma[0]
    # a choice, not a product: whatever an SVD returns for a zero matrix, masked columns are exactly zero
    return jnp.where(real, jnp.matmul(q, u, precision="highest"), 0), real.sum()


def one_blas_thread() -> contextlib.AbstractContextManager:
    """While it lasts, BLAS does not thread the calls that it gets.

    On a CPU factorizations are LAPACK's, called from XLA's own threads: a BLAS that threads each call once more has
    them wait for one another, from seconds to forever. Wait for the results inside of it.
    """
    return threadpool_limits(limits=1, user_api="blas")
