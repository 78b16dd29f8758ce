"""Steps of the decoder in the form that XLA's CPU runs fast: the plain formulas, with gradients by hand.

Every platform runs `product`, `low_rank` and `rms_norm`; `blocked` is for long rows where the platform has no kernel of
its own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from br_jax.models.masks import SHARED, Attend, Place, visible

_BLOCK = 32  # queries and keys of a tile

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _rounded(x, y, dtype):
    """x y in the dtype of x, both rounded to `dtype`: what comes out in f32 is summed in f32."""
    return jnp.matmul(x.astype(dtype), y.astype(dtype), preferred_element_type=x.dtype)


def _over_tokens(thin, wide, dtype):
    """[B T R], [B T D] -> [R D] in f32; as matrices, for XLA's CPU has no bf16 dot with more axes."""
    thin, wide = (array.reshape(-1, array.shape[-1]).astype(dtype) for array in (thin, wide))
    return jnp.matmul(thin.T, wide, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Float[Array, "*N in"], kernel: Float[Array, "in out"], dtype) -> Float[Array, "*N out"]:
    """x W in the dtype of x; what is multiplied, here and for the gradients, is rounded to `dtype`."""
    return _rounded(x, kernel, dtype)


def _product_forward(x, kernel, dtype):
    # What only the gradient of a kernel needs is not kept for one that is frozen.
    return product(x.value, kernel.value, dtype), (x.value if kernel.perturbed else None, kernel.value)


def _product_backward(dtype, saved, dy):
    x, kernel = saved
    of_kernel = None if x is None else _over_tokens(x, dy, dtype).astype(kernel.dtype)
    return _rounded(dy, kernel.T, dtype), of_kernel


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def turned_product(x: Float[Array, "*N in"], kernel: Float[Array, "out in"]) -> Float[Array, "*N out"]:
    """x W^T in the dtype of x, as W x^T: for few rows XLA's CPU is faster with the large matrix on the left."""
    rows = x.reshape(-1, x.shape[-1]).astype(kernel.dtype)
    y = jnp.einsum("OI,NI->ON", kernel, rows, preferred_element_type=jnp.float32)
    y = jax.lax.optimization_barrier(y)  # or XLA would exchange them again, to save the transpose
    return y.T.astype(x.dtype).reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(
    x: Float[Array, "*N in"], a: Float[Array, "in R"], b: Float[Array, "R out"], dtype
) -> Float[Array, "*N out"]:
    """x A B in the dtype of x; what is multiplied is rounded to `dtype`. a and b are f32 at rest, as their gradients.

    Autodiff would make A's and B's gradients as (wide^T thin), which transposes a [B T, out] array for each of them;
    (thin^T wide) is the same number and transposes [B T, R].
    """
    return _rounded(_rounded(x, a, dtype), b, dtype)


def _low_rank_forward(x, a, b, dtype):
    h = _rounded(x, a, dtype)
    return _rounded(h, b, dtype), (x, h, a, b)


def _low_rank_backward(dtype, saved, dy):
    x, h, a, b = saved
    dh = _rounded(dy, b.T, dtype)
    return _rounded(dh, a.T, dtype), _over_tokens(dh, x, dtype).T, _over_tokens(h, dy, dtype)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_norm(x: Float[Array, "*N D"], eps: float) -> Float[Array, "*N D"]:
    """x / sqrt(mean(x^2) + eps), computed in f32, in the dtype of x; its gradient in two passes over x."""
    wide = x.astype(jnp.float32)
    return (wide * _inverse_rms(wide, eps)).astype(x.dtype)


def _inverse_rms(wide, eps):
    return jax.lax.rsqrt(_inner(wide, wide) / wide.shape[-1] + eps)


def _inner(x, y):
    """Sums of products over D, [..., 1], as a dot: XLA's CPU passes a reduction to a library that is slower here."""
    return jnp.einsum("...D,...D->...", x, y, precision="highest")[..., None]


def _rms_norm_backward(eps, x, dy):
    wide, d_wide = x.astype(jnp.float32), dy.astype(jnp.float32)
    inverse = _inverse_rms(wide, eps)
    inner = _inner(wide, d_wide) * inverse**2 / wide.shape[-1]
    return (((d_wide - wide * inner) * inverse).astype(x.dtype),)


rms_norm.defvjp(lambda x, eps: (rms_norm(x, eps), x), _rms_norm_backward)


def blocked(q, k, v, queries, keys, how):
    """See `attention.attend`; as flash attention (Dao 2023), a tile of queries by keys at a time, and no larger square.

    Keys are the queries' own rows. Blocks of keys that no row's queries may see are not visited: those above the
    diagonal, before the window, and between a beginning that is shared and a packed row's segments; a block of padding
    alone visits none but that.
    """
    T = q.shape[1]
    widen = [(0, 0), (0, -T % _BLOCK)]  # by padding, segment 0
    q, k, v = (jnp.pad(x, [*widen, (0, 0), (0, 0)]) for x in (q, k, v))
    queries = jax.tree.map(lambda x: jnp.pad(x, widen), queries)
    return _tiled(q, k, v, queries, how)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(q, k, v, place, how):
    return _tiled_forward(q, k, v, place, how)[0]


def _tiled_forward(q, k, v, place, how):
    qs, ks, vs, tile = _tiles(q, k, v, place, how)
    visits, visited = _visits(place, how)

    def block(i):
        def add(t, carry):
            top, total, out = carry
            j = visited(i, t)
            scores, _ = tile(qs[i], ks[j], i, j)
            new = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            update = _dot("BKqt,BKtH->BKqH", weights.astype(v.dtype), vs[j])
            return new, total * shrink + weights.sum(-1), out * shrink[..., None] + update

        nothing = jnp.zeros(qs.shape[1:-1], jnp.float32)
        start = (nothing + jnp.finfo(jnp.float32).min, nothing, jnp.zeros(qs.shape[1:], jnp.float32))
        top, total, out = jax.lax.fori_loop(0, visits(i), add, start)
        total = jnp.where(total > 0, total, 1.0)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = jax.lax.map(block, jnp.arange(len(qs)))
    out, lse = (checkpoint_name(x, "attention") for x in (_untile(out, q.shape), lse))
    return out, (q, k, v, place, out, lse)


def _tiled_backward(how, saved, d_out):
    """From the output and the logarithm of each softmax' sum: weights are made anew, a tile at a time."""
    q, k, v, place, out, lse = saved
    qs, ks, vs, tile = _tiles(q, k, v, place, how)
    inner = _dot("BTNH,BTNH->BTN", d_out, out)[..., None]
    d_outs, inners = (_tile(x, k.shape[2]) for x in (d_out, inner))
    visits, visited = _visits(place, how)

    def block(carry, i):
        def add(t, carry):
            dq, dk, dv = carry
            j = visited(i, t)
            scores, slope = tile(qs[i], ks[j], i, j)
            weights = jnp.exp(scores - lse[i][..., None])
            change = weights * (_dot("BKqH,BKtH->BKqt", d_outs[i], vs[j]) - inners[i]) * slope
            weights, change = weights.astype(v.dtype), change.astype(q.dtype)
            dv = dv.at[j].add(_dot("BKqt,BKqH->BKtH", weights, d_outs[i]))
            dk = dk.at[j].add(_dot("BKqt,BKqH->BKtH", change, qs[i]))
            return dq + _dot("BKqt,BKtH->BKqH", change, ks[j]), dk, dv

        start = (jnp.zeros(qs.shape[1:], jnp.float32), *carry)
        dq, *carry = jax.lax.fori_loop(0, visits(i), add, start)
        return tuple(carry), dq * how.scale

    nothing = jnp.zeros(ks.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(block, (nothing, nothing), jnp.arange(len(qs)))
    return *(_untile(d, x.shape).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v))), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _tiles(q, k, v, place, how):
    """q (scaled), k and v in blocks, and what makes the masked scores of two blocks and their slope by the soft-cap."""
    K, G = k.shape[2], q.shape[2] // k.shape[2]
    places = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(x), -1, _BLOCK), 1, 0), place)

    def tile(queries, keys, i, j):
        scores, slope = _dot("BKqH,BKtH->BKqt", queries, keys), 1.0
        if how.soft_cap is not None:
            squashed = jnp.tanh(scores / how.soft_cap)
            scores, slope = how.soft_cap * squashed, 1 - squashed**2
        mask = visible(*(Place(*(x[at] for x in places)) for at in (i, j)), how.window)
        mask = jnp.tile(mask, (1, G, 1))[:, None]
        return jnp.where(mask, scores, jnp.finfo(jnp.float32).min), slope

    return *(_tile(x, K) for x in (how.scaled(q), k, v)), tile


def _tile(x: Float[Array, "B T N H"], groups: int) -> Float[Array, "n B K GQ H"]:
    """Blocks of tokens first, and the query heads of a key head as more rows of it."""
    B, T, N, H = x.shape
    x = x.reshape(B, T // _BLOCK, _BLOCK, groups, N // groups, H)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(T // _BLOCK, B, groups, -1, H)


def _untile(x: Float[Array, "n B K GQ H"], shape: tuple[int, ...]) -> Float[Array, "B T N H"]:
    n, B, K, _, H = x.shape
    return x.reshape(n, B, K, -1, _BLOCK, H).transpose(1, 0, 4, 2, 3, 5).reshape(shape)


def _visits(place: Place, how: Attend) -> tuple[Callable, Callable]:
    """How many blocks of keys the queries of block i visit, and which is the t-th: shared ones, then those nearby."""
    first = _first_block(place, how)
    shared = -(-(place.segment_ids == SHARED).sum(1).max() // _BLOCK)
    before = jnp.minimum(first, shared)
    return lambda i: before[i] + i + 1 - first[i], lambda i, t: jnp.where(t < before[i], t, t - before[i] + first[i])


def _first_block(place: Place, how: Attend) -> Int[Array, " n"]:
    """For each block of queries, the first block of keys of its segments that it may see; behind its own if none."""
    B, T = place.segment_ids.shape
    blocks = jnp.arange(T // _BLOCK)
    # segments are contiguous: the first query's begins no later than the others'
    ahead = place.segment_ids[:, ::_BLOCK]
    first = jnp.argmax(place.segment_ids[:, None] == ahead[..., None], axis=-1) // _BLOCK
    real = (place.segment_ids.reshape(B, -1, _BLOCK) != 0).any(-1)
    first = jnp.where(real, first, blocks + 1).min(0)
    return first if how.window is None else jnp.maximum(first, (blocks * _BLOCK - how.window + 1) // _BLOCK)
