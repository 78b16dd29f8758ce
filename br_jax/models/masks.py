"""Who sees whom: where tokens stand, what follows from it, and the settings that every form of attention shares."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

SHARED = -1  # segment of what all segments of a row begin with; their positions go on behind it


class Place(NamedTuple):
    """Where tokens stand: positions in their own sequence, from 0, and segments: 1, 2, ..., `SHARED`, 0 for padding."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


class Attend(NamedTuple):
    """How a layer attends; hashable."""

    implementation: str = "auto"  # one of `attention.IMPLEMENTATIONS`, or as `attention.resolve` chooses
    platform: str | None = None  # "cpu", "tpu" or "gpu": where it will run; None is JAX's default
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap), as in Gemma-2
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    scale: float = 1.0  # of the scores, before the soft-cap
    dtype: jnp.dtype = jnp.dtype("float32")  # of queries, keys and values
    mesh: Mesh | None = None  # that the params lie on, for a caller who has set none

    def scaled(self, q: Float[Array, "*N H"]) -> Float[Array, "*N H"]:
        """Queries times the scale, rounded once to their dtype."""
        return (q.astype(jnp.float32) * self.scale).astype(q.dtype)


def visible(queries: Place, keys: Place, window: int | None = None) -> Bool[Array, "B T S"]:
    """True where a query may look at a key: in its own segment or `SHARED`, not behind it, and inside the window.

    Padding is segment 0. It sees only padding and `SHARED`, so no row of the mask is empty among whole sequences
    and no softmax is 0/0; real tokens never see it.
    """
    ahead = queries.positions[:, :, None] - keys.positions[:, None, :]
    segments = keys.segment_ids[:, None, :]
    seen = ((queries.segment_ids[:, :, None] == segments) | (segments == SHARED)) & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)
