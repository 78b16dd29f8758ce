"""Attention with grouped query heads: one function, several implementations; "xla" is the oracle of the others.

What a query may see is said by each token's segment and position, never by a [T, S] mask that somebody carries round.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from br_jax.sharding import current_mesh, partition

_BLOCK = 256  # queries that "blocked" takes at a time
_LANES = 128  # what splash attention's block sizes and head widths are multiples of


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
        interpret: run the TPU kernel in Pallas' interpreter, on any platform.
    """

    implementation: str = "auto"
    platform: str = "cpu"
    soft_cap: float | None = None
    window: int | None = None
    interpret: bool = False


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    queries: Place,
    keys: Place,
    how: Attend,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scores and softmax in f32: a query sees its own segment, up to its own position.

    All but "xla" ask that tokens stand in order (a later token of a segment at a later index), as rows and packed rows
    do; a KV cache does not, and takes "xla".
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
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
    if how.soft_cap is not None:
        scores = how.soft_cap * jnp.tanh(scores / how.soft_cap)
    mask = visible(queries, keys, how.window)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(B, T, N, H)


def _blocked(q, k, v, queries, keys, how):
    """A block of queries at a time against the keys it may see; going back its scores are made anew.

    Memory grows with T, not T^2, and what lies above the diagonal (or before the window) is never computed.
    """
    T = q.shape[1]

    @jax.checkpoint
    def block(q, k, v, queries, keys):
        return _xla(q, k, v, queries, keys, how)

    def part(array, first, last):
        return jax.tree.map(lambda x: x[:, first:last], array)

    outs = []
    for first in range(0, T, _BLOCK):
        last = min(first + _BLOCK, T)
        start = 0 if how.window is None else max(0, first - how.window + 1)
        seen = [part(x, start, last) for x in (k, v)]
        outs.append(block(part(q, first, last), *seen, part(queries, first, last), part(keys, start, last)))
    return jnp.concatenate(outs, axis=1)


def _splash(q, k, v, queries, keys, how):
    """JAX's TPU kernel, on each device's own rows and heads."""
    T, H = q.shape[1], q.shape[3]
    heads = partition("batch", None, "heads", None)
    kv_heads = partition("batch", None, "kv", None)
    place = partition("batch", None)

    def local(q, k, v, q_segments, k_segments):
        kernel = _splash_kernel(T, q.shape[2], how)
        widen = [(0, 0)] * 3 + [(0, -H % _LANES)]  # zeros add nothing to a score, and the output's are cut off
        scaled = (q.astype(jnp.float32) * H**-0.5).astype(q.dtype)
        q, k, v = (jnp.moveaxis(jnp.pad(x, widen), 2, 1) for x in (scaled, k, v))
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
        interpret=how.interpret,
    )


def _cudnn(q, k, v, queries, keys, how):
    """cuDNN's flash attention through `jax.nn`; bf16 or f16."""
    mask = visible(queries, keys, how.window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


IMPLEMENTATIONS = {"xla": _xla, "blocked": _blocked, "splash": _splash, "cudnn": _cudnn}


def resolve(how: Attend, length: int, dtype) -> Attend:
    """`how` with "auto" replaced by what suits the platform and rows of `length` tokens; a fallback is logged."""
    if how.implementation != "auto":
        return how
    fallback = "blocked" if length >= 2 * _BLOCK else "xla"
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


def rope_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> Float[Array, "B T half"]:
    """Rotation angles in f32: position * theta^(-2i/H) for i in [0, H/2)."""
    inverse = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions[..., None].astype(jnp.float32) * inverse[None, None]


def rotate(x: Float[Array, "B T heads H"], angles: Float[Array, "B T half"]) -> Float[Array, "B T heads H"]:
    """Rotary embedding, halves paired (i, i + H/2) as in transformers' Llama; computed in f32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
