"""Cross-entropy at the answer tokens, or the distance to another model's tokens; logits only where there is loss."""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jaxtyping import Array, Float, Int

from br_jax.core.mesh import RULES, current_mesh, partition
from br_jax.models.decoder import Decoder
from br_jax.models.kernels import rounding_dtype


def answer_loss(
    params: dict,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"] | Float[Array, "B T D"],
    weights: Float[Array, "B T"],
    chunk: int,
    soft_cap: float | None = None,
    precision: str = "float32",
) -> Float[Array, ""]:
    """Sum of weight * cross-entropy over the positions with weight; [B, T, V] never exists.

    The answer positions of each device's rows are moved to the front and taken a chunk at a time; a chunk without any
    is skipped. Where a gradient is asked for, it is made in the same pass, so that no logits are made twice.

    Args:
        params: with the unembedding.
        hidden, weights: final hidden states, see `data.batches`.
        targets: tokens; or hidden states of another model with the same unembedding, into which no gradient goes: then
            it is the sum of weight * KL(theirs || ours), of the distributions of the next token.
        chunk: tokens that a device turns into logits at a time.
        soft_cap: logits become cap * tanh(logits / cap), as in Gemma-2.
        precision: of the products, see `models.kernels`.
    """
    return _losses(params, hidden, targets, weights, chunk, soft_cap, precision)[0]


def token_losses(params, hidden, targets, weights, *head) -> Float[Array, "B T"]:
    """The cross-entropy at each position with weight, 0 elsewhere; arguments as in `answer_loss`, no gradient."""
    return _losses(*jax.lax.stop_gradient((params, hidden, targets, weights)), *head)[1]


def _losses(params, hidden, targets, weights, chunk, soft_cap=None, precision="float32"):
    head = {"head": params["head"]} if "head" in params else {"embed": params["embed"]}
    return _summed(head, hidden, targets, weights, (chunk, soft_cap, rounding_dtype(hidden.dtype, precision)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(head, hidden, targets, weights, settings):
    """(sum by weights, [B, T] of each position with weight); only the sum has a gradient."""
    loss, found = _over_devices(head, hidden, targets, weights, settings, ("each",))
    return loss, found["each"]


def _forward(head, hidden, targets, weights, settings):
    trains_head = any(leaf.perturbed for leaf in jax.tree.leaves(head))
    values = custom_vjp_primal_tree_values((head, hidden, targets, weights))
    wanted = ("each", "hidden", "head") if trains_head else ("each", "hidden")
    loss, found = _over_devices(*values, settings, wanted)
    return (loss, found.pop("each")), (found, values[0])


def _backward(settings, saved, cotangents):
    (grads, head), (cotangent, _) = saved, cotangents
    of_head = jax.tree.map(lambda x: None, head)
    if "head" in grads:
        of_head = jax.tree.map(lambda x: (cotangent * grads["head"]).astype(x.dtype), head)
    of_hidden = grads["hidden"] * cotangent.astype(grads["hidden"].dtype)
    return of_head, of_hidden, None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_devices(head, hidden, targets, weights, settings, wanted):
    """(loss, gradients): each device takes its own rows, with the whole unembedding (split over `tensor` alone)."""
    if current_mesh() is None:
        return _local(head, hidden, targets, weights, settings, wanted)
    axes = RULES["batch"]

    def local(*args):
        loss, grads = _local(*args, settings, wanted)
        if "head" in grads:
            grads["head"] = jax.lax.psum(grads["head"], axes)
        return jax.lax.psum(loss, axes), grads

    whole, rows = jax.sharding.PartitionSpec(), partition("batch")
    found = {"hidden": rows, "each": rows, "head": whole}
    return jax.shard_map(
        local,
        in_specs=(whole, rows, rows, rows),
        out_specs=(whole, {name: found[name] for name in wanted}),
        axis_names=set(axes),
        check_vma=False,
    )(head, hidden, targets, weights)


def _local(head, hidden, targets, weights, settings, wanted):
    """(sum of losses, {"hidden": [B, T, D] in its dtype, "head": f32: gradients; "each": [B, T]} as far as wanted)."""
    B, T, _ = hidden.shape
    tied = "embed" in head
    matrix = head["embed"]["embedding"] if tied else head["head"]["kernel"]
    into, back, of_matrix = ("ND,VD->NV", "NV,VD->ND", "NV,ND->VD") if tied else ("ND,DV->NV", "NV,DV->ND", "NV,ND->DV")
    chunk, soft_cap, rounding = settings
    chunk, matrix = min(chunk, B * T), matrix.astype(rounding)

    def dot(form, x, y):
        return jnp.einsum(form, x.astype(rounding), y.astype(rounding), preferred_element_type=jnp.float32)

    padding = -(B * T) % chunk
    order = jnp.argsort(weights.reshape(-1) <= 0, stable=True)

    def chunks(x):
        x = x.reshape(B * T, *x.shape[2:])[order]
        return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    def capped(h):
        logits = dot(into, h, matrix)
        if soft_cap is None:
            return logits, 1.0
        squashed = jnp.tanh(logits / soft_cap)
        return soft_cap * squashed, 1 - squashed**2

    def active(h, t, w):
        logits, slope = capped(h)
        lse = jax.nn.logsumexp(logits, axis=-1)
        if t.ndim > 1:
            theirs = jax.nn.log_softmax(capped(t)[0], axis=-1)
            each = jnp.sum(jnp.exp(theirs) * (theirs - logits + lse[:, None]), axis=-1)
        else:
            each = lse - jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0]
        loss, found = jnp.sum(w * each), {"each": jnp.where(w > 0, each, 0.0)}
        if "hidden" in wanted:
            share = jnp.exp(logits - lse[:, None]) * w[:, None]
            if t.ndim > 1:
                expected = jnp.exp(theirs) * w[:, None]
            else:
                expected = jnp.where(jnp.arange(logits.shape[1])[None] == t[:, None], w[:, None], 0.0)
            change = (share - expected) * slope
            found["hidden"] = dot(back, change, matrix).astype(h.dtype)
        if "head" in wanted:
            found["head"] = dot(of_matrix, change, h)
        return loss, {name: found[name] for name in wanted}

    def skipped(h, t, w):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(active, h, t, w))

    def add(carry, xs):
        loss, found = jax.lax.cond(jnp.any(xs[2] > 0), active, skipped, *xs)
        of_tokens = {name: found.pop(name) for name in ("hidden", "each") if name in found}
        return jax.tree.map(jnp.add, carry, (loss, found)), of_tokens

    start = jnp.float32(0), ({"head": jnp.zeros(matrix.shape, jnp.float32)} if "head" in wanted else {})
    (loss, found), of_tokens = jax.lax.scan(add, start, (chunks(hidden), chunks(targets), chunks(weights)))
    for name, values in of_tokens.items():
        shape = values.shape[2:]
        found[name] = values.reshape(-1, *shape)[jnp.argsort(order)].reshape(B, T, *shape)
    return loss, found


def hidden_states(decoder: Decoder, variables: dict, batch: dict, dropout_key=None) -> Float[Array, "B T D"]:
    """Final hidden states of a batch (see `br_jax.data.batches`); dropout acts when a key is given."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    return decoder.apply(variables, batch["tokens"], batch["positions"], batch["segment_ids"], rngs=rngs)[0]


def batch_loss(decoder: Decoder, variables: dict, batch: dict, chunk: int, dropout_key=None) -> Float[Array, ""]:
    """Summed answer loss of one batch (see `br_jax.data.batches`); dropout acts when a key is given."""
    return batch_losses(decoder, variables, batch, chunk, dropout_key)[0]


def batch_losses(
    decoder: Decoder, variables: dict, batch: dict, chunk: int, dropout_key=None
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """(`batch_loss`, weight * loss at each position, which has no gradient)."""
    hidden = hidden_states(decoder, variables, batch, dropout_key)
    head = chunk, decoder.spec.logit_soft_cap, decoder.matmul_precision
    loss, each = _losses(variables["params"], hidden, batch["targets"], batch["weights"], *head)
    return loss, batch["weights"] * each
