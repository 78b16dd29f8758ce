"""The release step: QR-merge the reinforce adapter into the user's (arXiv 2605.24550)."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg.cython_lapack  # noqa: F401  # JAX loads it, and its BLAS, at the first factorization: too late to limit
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from br_jax.adapters import diagnostics, lora
from br_jax.adapters.lora import Adapter
from br_jax.errors import UserError

logger = logging.getLogger(__name__)

Weights = dict[str, dict[str, Array]]


def qr_merge(
    user: Adapter,
    reinforce: Adapter,
    a: float = 0.1,
    scale: float = 0.5,
    tau: float = 0.01,
    reinforce_scale: float = 1.0,
) -> tuple[Adapter, dict[str, Any]]:
    """Merges two adapters after taking out of the second what would disturb the first.

    Per matrix and layer: W = scale * (W_U + reinforce_scale * (I - a Q Q^T) W_R), Q spanning the user's effective
    output space (see `diagnostics.effective_basis`). Exact in low rank: only the reinforce adapter's `b` changes, and
    the two are concatenated along the rank. A matrix that only the user has becomes scale * W_U; one that only
    the reinforce adapter has is left out, as in the reference code, with a warning.

    Args:
        user: the user's adapter.
        reinforce: the provider's; rank and scale of its own.
        a: orthogonalization strength (the paper's alpha), 0 (plain average) to 1.
        scale: factor of the sum.
        tau: an eigenvalue of A_U A_U^T counts above tau times the largest; 0 <= tau < 1.
        reinforce_scale: factor of W_R alone; 1 in the paper, less where Reinforce makes the model over-refuse.

    Returns:
        One adapter (scale 1, rank R_U + R_R, roles united) and the figures of the merge, ready for JSON:
        the settings by name, "user_only" and "ignored" (paths), and "matrices": path -> lists over layers.

    Raises:
        UserError: a buffer among the roles, a setting out of range, numbers that are not finite, or adapters
            that do not belong together.
    """
    settings = {"a": float(a), "scale": float(scale), "tau": float(tau), "reinforce_scale": float(reinforce_scale)}
    _check(user, reinforce, settings)
    shared = sorted(user.weights.keys() & reinforce.weights.keys())
    user_only = sorted(user.weights.keys() - reinforce.weights.keys())
    ignored = sorted(reinforce.weights.keys() - user.weights.keys())
    if ignored:
        logger.warning("QR merge leaves out what only the reinforce adapter has: %s", ", ".join(ignored))
    # On a CPU the factorizations are LAPACK's, called from XLA's own threads: a BLAS that threads each call once more
    # has them wait for one another, from seconds to forever.
    with threadpool_limits(limits=1, user_api="blas"):
        weights, reports = jax.block_until_ready(
            _merge_weights(
                user.weights,
                {path: reinforce.weights[path] for path in shared},
                user.scale,
                reinforce_scale * reinforce.scale,
                jnp.float32(a),
                jnp.float32(scale),
                jnp.float32(tau),
            )
        )
    merged = Adapter(weights, jnp.float32(1), lora.union_of_roles([user, reinforce]))
    matrices = {path: _as_lists(report) for path, report in jax.device_get(reports).items()}
    return merged, {**settings, "user_only": user_only, "ignored": ignored, "matrices": matrices}


@jax.jit
def _merge_weights(
    user: Weights,
    reinforce: Weights,
    user_scale: Float[Array, ""],
    reinforce_scale: Float[Array, ""],
    strength: Float[Array, ""],
    scale: Float[Array, ""],
    tau: Float[Array, ""],
) -> tuple[Weights, dict[str, dict[str, Array]]]:
    """Merges every matrix; all settings are traced, so that one compilation serves all their values."""

    def merge_layer(user_pair, reinforce_pair):
        b = reinforce_pair["b"]
        basis_of_user, user_b, reinforce_b = diagnostics.output_coordinates(user_pair["b"], b)
        small_user = {"a": jnp.linalg.qr(user_pair["a"], mode="r"), "b": user_b}
        small_reinforce = {"a": jnp.linalg.qr(reinforce_pair["a"], mode="r"), "b": reinforce_b}
        basis, kept = diagnostics.effective_basis(small_user["a"], user_b, tau)
        inside = jnp.matmul(jnp.matmul(reinforce_b, basis, precision="highest"), basis.T, precision="highest")
        inside = jnp.matmul(inside[:, : basis_of_user.shape[1]], basis_of_user.T, precision="highest")
        merged = scale * jnp.concatenate([user_scale * user_pair["b"], reinforce_scale * (b - strength * inside)])
        report = diagnostics.layer_report(small_user, small_reinforce, user_scale, reinforce_scale, basis)
        return merged, {"kept_rank": kept, **report}

    weights, reports = {}, {}
    for path, pair in user.items():
        if path in reinforce:
            b, reports[path] = jax.lax.map(lambda pairs: merge_layer(*pairs), (pair, reinforce[path]))
            weights[path] = {"a": jnp.concatenate([pair["a"], reinforce[path]["a"]], axis=-1), "b": b}
        else:
            weights[path] = {"a": pair["a"], "b": scale * user_scale * pair["b"]}
    return weights, reports


def _check(user: Adapter, reinforce: Adapter, settings: Mapping[str, float]) -> None:
    """Raises a `UserError` for what must not or cannot be merged."""
    for name, adapter in {"user": user, "reinforce": reinforce}.items():
        if "buffer" in adapter.roles:
            raise UserError(
                f"QR merge: the {name} adapter holds a buffer (roles {'+'.join(adapter.roles)}); detach it "
                "first, a buffer must never be released"
            )
        lora.require_finite(adapter)
    if not (0 <= settings["a"] <= 1 and 0 <= settings["tau"] < 1 and all(map(math.isfinite, settings.values()))):
        given = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise UserError(f"QR merge: {given}: a must lie in [0, 1], tau in [0, 1), and all be finite")
    shared = user.weights.keys() & reinforce.weights.keys()
    if not shared:
        raise UserError(
            f"QR merge: no matrix in common; user has {sorted(user.weights)}, reinforce has {sorted(reinforce.weights)}"
        )
    for path in sorted(shared):
        lora.require_same_kernel(path, [user, reinforce])


def _as_lists(report: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Turns one matrix's stacked figures into lists over layers, without the places that no angle fills."""
    lists = {name: values.tolist() for name, values in report.items()}
    counts = lists.pop("angle_count")
    lists["principal_angles"] = [
        angles[:count] for angles, count in zip(lists["principal_angles"], counts, strict=True)
    ]
    return lists
