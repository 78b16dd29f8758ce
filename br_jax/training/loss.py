"""Cross-entropy at the answer tokens, with logits only where there is loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from br_jax.models.decoder import Decoder, unembed


def answer_loss(
    params: dict,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weight * cross-entropy over the positions with weight; [B, T, V] never exists.

    Each row's answer positions are moved to its front, then taken `chunk` at a time; a chunk that holds none is
    skipped, and the backward pass makes a chunk's logits anew.
    """
    B, T, _ = hidden.shape
    order = jnp.argsort(weights <= 0, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[:, :, None], axis=1)
    targets, weights = (jnp.take_along_axis(x, order, axis=1) for x in (targets, weights))
    chunk = min(chunk, T)
    pad = -T % chunk

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    def cross_entropy(h, t, w):
        logits = unembed(params, h)
        picked = jnp.take_along_axis(logits, t[..., None], axis=-1)[..., 0]
        return jnp.sum(w * (jax.nn.logsumexp(logits, axis=-1) - picked))

    @jax.checkpoint  # round the cond: inside it, the scan would keep a copy of the unembedding for every chunk
    def add(total, xs):
        h, t, w = xs
        return total + jax.lax.cond(jnp.any(w > 0), cross_entropy, lambda h, t, w: jnp.float32(0), h, t, w), None

    total, _ = jax.lax.scan(add, jnp.float32(0), (chunks(hidden), chunks(targets), chunks(weights)))
    return total


def batch_loss(decoder: Decoder, variables: dict, batch: dict, chunk: int, dropout_key=None) -> Float[Array, ""]:
    """Summed answer loss of one batch (see `br_jax.data.batches`); dropout acts when a key is given."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    hidden, _ = decoder.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)
    return answer_loss(variables["params"], hidden, batch["targets"], batch["weights"], chunk)
