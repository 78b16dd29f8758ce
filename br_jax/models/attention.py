"""Attention with grouped query heads: one function, several implementations; "xla" is the oracle of the others.

What a query may see is said by each token's segment and position, never by a [T, S] mask that somebody carries round.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from br_jax.models.spec import ModelSpec
from br_jax.sharding import current_mesh, partition

_BLOCK = 64  # queries and keys of a tile of "blocked"
_LONG = 512  # tokens of a row from which on "blocked" is used
_LANES = 128  # what splash attention's block sizes and head widths are multiples of

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Place(NamedTuple):
    """Where tokens stand: positions in their own sequence, from 0, and segments 1, 2, ... (0 is padding)."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


class Attend(NamedTuple):
    """How a layer attends; hashable.

    Attributes:
        implementation: one of `IMPLEMENTATIONS`, or "auto": see `resolve`.
        platform: "tpu", "gpu" or "cpu": where it will run, which need not be where it is compiled.
        soft_cap: scores become cap * tanh(scores / cap), as in Gemma-2.
        window: a query sees itself and the window - 1 tokens before it.
        scale: of the scores before the soft-cap; None is H^-0.5.
        interpret: run the TPU kernel in Pallas' interpreter, on any platform.
    """

    implementation: str = "auto"
    platform: str = "cpu"
    soft_cap: float | None = None
    window: int | None = None
    scale: float | None = None
    interpret: bool = False

    def scaled(self, x: Float[Array, "*N H"]) -> Float[Array, "*N H"]:
        """Queries times the scale, rounded once to their dtype."""
        return (x.astype(jnp.float32) * self.factor(x)).astype(x.dtype)

    def factor(self, x: Float[Array, "*N H"]) -> float:
        """The scale of scores of queries like x."""
        return x.shape[-1] ** -0.5 if self.scale is None else self.scale


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    queries: Place,
    keys: Place,
    how: Attend,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scores and softmax in f32: a query sees its own segment, up to its own position.

    All but "xla" ask that keys are the queries' own rows, and that tokens stand in order (a segment's side by side,
    later ones at later indices), as rows and packed rows do; a KV cache does not, and takes "xla".
    """
    return IMPLEMENTATIONS[how.implementation](q, k, v, queries, keys, how)


def visible(queries: Place, keys: Place, window: int | None = None) -> Bool[Array, "B T S"]:
    """True where a query may look at a key.

    Padding is segment 0. It sees only padding, so no row of the mask is empty among whole sequences
    and no softmax is 0/0; real tokens (segments 1, 2, ...) never see it.
    """
    ahead = queries.positions[:, :, None] - keys.positions[:, None, :]
    seen = (queries.segments[:, :, None] == keys.segments[:, None, :]) & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def _xla(q, k, v, queries, keys, how):
    """Plain attention: [B, N, T, S] exists in f32."""
    return attend_cache(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), queries, keys, how)


def attend_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    queries: Place,
    keys: Place,
    how: Attend,
) -> Float[Array, "B T N H"]:
    """`attend` to keys and values as a KV cache holds them, whose slots may stand in any order."""
    B, T, N, H = q.shape
    K = k.shape[1]
    # One row of a matrix for each query and query head: XLA's CPU has its fast dot for two axes of a batch, not more.
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, H)
    scores = _dot("BKQH,BKHS->BKQS", q, k) * how.factor(q)
    if how.soft_cap is not None:
        scores = how.soft_cap * jnp.tanh(scores / how.soft_cap)
    mask = jnp.repeat(visible(queries, keys, how.window), N // K, axis=1)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v)
    return out.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _blocked(q, k, v, queries, keys, how):
    """Flash attention (Dao 2023) for CPUs: tiles of a block of queries by a block of keys, and no larger square.

    Keys are the queries' own rows. Blocks of keys that no row's queries may see are not visited: those above the
    diagonal, before the window, and before a packed row's segments; a block of padding alone visits none and gives 0.
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

    def block(i):
        def add(j, carry):
            top, total, out = carry
            scores, _ = tile(qs[i], ks[j], i, j)
            new = jnp.maximum(top, scores.max(-1))
            weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
            update = _dot("BKqt,BKtH->BKqH", weights.astype(v.dtype), vs[j])
            return new, total * shrink + weights.sum(-1), out * shrink[..., None] + update

        nothing = jnp.zeros(qs.shape[1:-1], jnp.float32)
        start = (nothing + jnp.finfo(jnp.float32).min, nothing, jnp.zeros(qs.shape[1:], jnp.float32))
        top, total, out = jax.lax.fori_loop(_first_block(place, how)[i], i + 1, add, start)
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

    def block(carry, i):
        def add(j, carry):
            dq, dk, dv = carry
            scores, slope = tile(qs[i], ks[j], i, j)
            weights = jnp.exp(scores - lse[i][..., None])
            change = weights * (_dot("BKqH,BKtH->BKqt", d_outs[i], vs[j]) - inners[i]) * slope
            weights, change = weights.astype(v.dtype), change.astype(q.dtype)
            dv = dv.at[j].add(_dot("BKqt,BKqH->BKtH", weights, d_outs[i]))
            dk = dk.at[j].add(_dot("BKqt,BKqH->BKtH", change, qs[i]))
            return dq + _dot("BKqt,BKtH->BKqH", change, ks[j]), dk, dv

        start = (jnp.zeros(qs.shape[1:], jnp.float32), *carry)
        dq, *carry = jax.lax.fori_loop(_first_block(place, how)[i], i + 1, add, start)
        return tuple(carry), dq * how.factor(q)

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


def _first_block(place: Place, how: Attend) -> Int[Array, " n"]:
    """For each block of queries, the first block of keys that one of them may see; behind its own where none does."""
    B, T = place.segments.shape
    blocks = jnp.arange(T // _BLOCK)
    ahead = place.segments[:, ::_BLOCK]  # segments are contiguous: the first query's begins no later than the others'
    first = jnp.argmax(place.segments[:, None] == ahead[..., None], axis=-1) // _BLOCK
    real = (place.segments.reshape(B, -1, _BLOCK) > 0).any(-1)
    first = jnp.where(real, first, blocks + 1).min(0)
    return first if how.window is None else jnp.maximum(first, (blocks * _BLOCK - how.window + 1) // _BLOCK)


def _splash(q, k, v, queries, keys, how):
    """JAX's TPU kernel, on each device's own rows and heads."""
    T, H = q.shape[1], q.shape[3]
    heads = partition("batch", None, "heads", None)
    kv_heads = partition("batch", None, "kv", None)
    place = partition("batch", None)

    def local(q, k, v, q_segments, k_segments):
        kernel = _splash_kernel(T, q.shape[2], how)
        widen = [(0, 0)] * 3 + [(0, -H % _LANES)]  # zeros add nothing to a score, and the output's are cut off
        q, k, v = (jnp.moveaxis(jnp.pad(x, widen), 2, 1) for x in (how.scaled(q), k, v))
        segments = splash_attention_kernel.SegmentIds(q_segments, k_segments)
        return jnp.moveaxis(jax.vmap(kernel)(q, k, v, segments), 1, 2)[..., :H]

    if current_mesh() is not None:
        local = jax.shard_map(
            local, in_specs=(heads, kv_heads, kv_heads, place, place), out_specs=heads, check_vma=False
        )
    return local(q, k, v, queries.segments, keys.segments)


def _splash_kernel(T: int, heads: int, how: Attend):
    """The kernel for rows of T tokens, and blocks as large as divide T, up to 512."""
    if how.window is None:
        mask = splash_attention_mask.CausalMask((T, T))
    else:
        mask = splash_attention_mask.LocalMask((T, T), (how.window - 1, 0), 0)
    size = math.gcd(T, 512)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        use_fused_bwd_kernel=True,
    )
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=blocks,
        attn_logits_soft_cap=how.soft_cap,
        residual_checkpoint_name="attention",
        interpret=how.interpret,
    )


def _cudnn(q, k, v, queries, keys, how):
    """cuDNN's flash attention through `jax.nn`; bf16 or f16."""
    mask = visible(queries, keys, how.window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=how.factor(q), implementation="cudnn")


IMPLEMENTATIONS = {"xla": _xla, "blocked": _blocked, "splash": _splash, "cudnn": _cudnn}


def resolve(how: Attend, length: int, dtype) -> Attend:
    """`how` with "auto" replaced by what suits the platform and rows of `length` tokens; a fallback is logged."""
    if how.implementation != "auto":
        return how
    fallback = "blocked" if length >= _LONG else "xla"
    if how.platform == "tpu":
        fast, fits, needs = "splash", length % _LANES == 0, f"a length that {_LANES} divides"
    elif how.platform in ("gpu", "cuda"):
        fits = jnp.dtype(dtype).itemsize == 2 and how.soft_cap is None
        fast, needs = "cudnn", "bf16 or f16, and no soft-cap"
    else:
        return how._replace(implementation=fallback)
    if fits:
        return how._replace(implementation=fast)
    logging.warning("attention over %d tokens is %s: %s needs %s", length, fallback, fast, needs)
    return how._replace(implementation=fallback)


def rope_angles(positions: Int[Array, "B T"], spec: ModelSpec) -> Float[Array, "B T half"]:
    """Rotation angles in f32: position * theta^(-2i/H) for i in [0, H/2), or slower as rope scaling has it."""
    inverse = spec.rope_theta ** (-jnp.arange(0, spec.head_dim, 2, dtype=jnp.float32) / spec.head_dim)
    if (scaling := spec.rope_scaling) is not None:  # as transformers' `_compute_llama3_parameters`
        turns = scaling.original_length * inverse / (2 * math.pi)  # in the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        fast = jnp.clip((turns - low) / (high - low), 0, 1)
        inverse = inverse * (fast + (1 - fast) / scaling.factor)
    return positions[..., None].astype(jnp.float32) * inverse[None, None]


def rotate(x: Float[Array, "B T heads H"], angles: Float[Array, "B T half"]) -> Float[Array, "B T heads H"]:
    """Rotary embedding, halves paired (i, i + H/2) as in transformers' Llama; computed in f32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
