"""The release step: QR-merge the reinforce adapter into the user's (arXiv 2605.24550)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg.cython_lapack  # noqa: F401  # JAX loads it, and its BLAS, at the first factorization: too late to limit
from absl import logging
from jaxtyping import Array, Float
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
    """Settings of the merge; the defaults are the paper's."""

    a: float = number(0.1, *SHARE)  # orthogonalization strength (the paper's alpha), from 0, a plain average, to 1
    scale: float = number(0.5, 0.0, 100.0, open_low=True)  # factor of the sum
    tau: float = number(0.01, 0.0, 1.0, open_high=True)  # an eigenvalue of A_U A_U^T counts above tau times the largest
    reinforce_scale: float = number(1.0, 0.0, 100.0)  # factor of W_R; less than 1 where the model would over-refuse

    def __post_init__(self):
        require_bounds(self, "merge")


def qr_merge(user: Adapter, reinforce: Adapter, merge: MergeConfig | None = None) -> Adapter:
    """Merges two adapters after taking out of the second what would disturb the first.

    Per matrix and layer: W = scale * (W_U + reinforce_scale * (I - a Q Q^T) W_R), Q spanning the user's effective
    output space (see `effective_basis`). Exact in low rank: only the reinforce adapter's `b` changes, and the two are
    concatenated along the rank. A matrix that only the user has becomes scale * W_U; one that only the reinforce
    adapter has is left out, as in the reference code, with a warning.

    Returns:
        One adapter: scale 1, rank R_U + R_R, roles united. What it did to each matrix: `diagnostics.merge_report`.

    Raises:
        UserError: a buffer among the roles, numbers that are not finite, or adapters that do not belong together.
    """
    for adapter in (user, reinforce):
        lora.require_adapter(adapter, "QR merge")
        lora.refuse_buffer("QR merge", adapter.roles)
        lora.require_finite(adapter)
    shared = sorted(user.weights.keys() & reinforce.weights.keys())
    if not shared:
        raise UserError(
            f"QR merge: no matrix in common; user has {sorted(user.weights)}, reinforce has {sorted(reinforce.weights)}"
        )
    lora.require_same_kernels([user, reinforce])
    if ignored := sorted(reinforce.weights.keys() - shared):
        logging.warning("QR merge leaves out what only the reinforce adapter has: %s", ", ".join(ignored))
    merge = merge or MergeConfig()
    a, tau, scale, reinforce_scale = map(np.float32, (merge.a, merge.tau, merge.scale, merge.reinforce_scale))
    pairs = {path: (user.weights[path], reinforce.weights[path]) for path in shared}
    # On a CPU factorizations are LAPACK's, called from XLA's own threads: a BLAS that threads each call once more has
    # them wait for one another, from seconds to forever. So the results are waited for in here.
    with threadpool_limits(limits=1, user_api="blas"):
        apart = jax.block_until_ready(_apart_from(pairs, a, tau))
    reinforce = lora.scaled(reinforce.replace(weights=apart), reinforce_scale)
    return lora.stack([lora.scaled(user, scale), lora.scaled(reinforce, scale)])


@jax.jit
def _apart_from(pairs: dict[str, tuple[dict, dict]], strength: float, tau: float) -> dict[str, dict[str, Array]]:
    """The reinforce weights with (I - a Q Q^T) B_R; b is the paper's B turned around, so Q Q^T stands to its right."""

    def of_layer(factors):
        user, b = factors
        q = effective_basis(user["a"], user["b"], tau)  # [O, K]
        return b - strength * jnp.matmul(jnp.matmul(b, q, precision="highest"), q.T, precision="highest")

    return {
        path: {"a": reinforce["a"], "b": jax.lax.map(of_layer, (user, reinforce["b"]))}
        for path, (user, reinforce) in pairs.items()
    }


def effective_basis(a: Float[Array, "I R"], b: Float[Array, "R O"], tau: Float[Array, ""]) -> Float[Array, "O K"]:
    """Spans the subspace that an adapter effectively writes to: the paper's Q.

    The rule: eigenpairs (lambda, V) of A A^T, keep lambda > tau * lambda_max, Q = basis of B V_kept. The pairs come
    from an SVD of A's triangular factor, where lambda = sigma^2: forming A A^T would square A's condition number.
    """
    triangle = jnp.linalg.qr(a, mode="r")
    _, sigma, v = jnp.linalg.svd(triangle, full_matrices=False)  # rows of v, descending sigma
    relative = jnp.maximum(jnp.sqrt(tau), NOISE_A_COLUMN * a.shape[1])
    kept = sigma > relative * sigma[0]
    columns = jnp.matmul(b.T, jnp.where(kept, v.T, 0), precision="highest")  # [O, K]
    # A basis of these columns, which may be rank-deficient or zero; K = min(O, R) with zero columns last. Thin QR alone
    # would invent columns wherever the given ones are zero or repeated. So an SVD of its small triangle orders the
    # directions by size, and those at rounding level are masked; of full rank, Q Q^T is that of plain thin QR.
    q, triangle = jnp.linalg.qr(columns)
    u, sigma, _ = jnp.linalg.svd(triangle, full_matrices=False)
    real = sigma > NOISE_A_COLUMN * columns.shape[1] * sigma[0]
    # a choice, not a product: whatever an SVD returns for a zero matrix, masked columns are exactly zero
    return jnp.where(real, jnp.matmul(q, u, precision="highest"), 0)
