"""Who sees whom, and attention with grouped query heads: several implementations, of which "xla" is the oracle.

Each token's segment and position say what a query may see; nobody carries a [T, S] mask round.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from br_jax.core.mesh import batch_parts, current_mesh, partition
from br_jax.data.batches import SHARED
from br_jax.models.spec import ModelSpec

_LONG = 256  # tokens of a row from which on "blocked" is used
_LANES = 128  # what splash's block sizes and head widths are multiples of
_BLOCK = 32  # queries and keys of a tile of "blocked"

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Place(NamedTuple):
    """Where tokens stand: positions in their own sequence, from 0, and segments: 1, 2, ..., `SHARED`, 0 for padding."""

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]


class Attend(NamedTuple):
    """How a layer attends; hashable."""

    implementation: str = "auto"  # one of `IMPLEMENTATIONS`, or as `resolve` chooses
    platform: str | None = None  # "cpu", "tpu" or "gpu": where it will run; None is JAX's default
    soft_cap: float | None = None  # scores become cap * tanh(scores / cap), as in Gemma-2
    window: int | None = None  # a query sees itself and the window - 1 tokens before it
    scale: float = 1.0  # of the scores, before the soft-cap
    dtype: jnp.dtype = jnp.dtype("float32")  # of queries, keys and values
    mesh: Mesh | None = None  # that the params lie on, for a caller who has set none

    def scaled(self, q: Float[Array, "*N H"]) -> Float[Array, "*N H"]:
        """Queries times the scale, rounded once to their dtype."""
        return (q.astype(jnp.float32) * self.scale).astype(q.dtype)


def _visible(queries: Place, keys: Place, window: int | None = None) -> Bool[Array, "B T S"]:
    """Where a query may look at a key; padding sees padding, so that no softmax over whole sequences is 0/0."""
    ahead = queries.positions[:, :, None] - keys.positions[:, None, :]
    segments = keys.segment_ids[:, None, :]
    seen = ((queries.segment_ids[:, :, None] == segments) | (segments == SHARED)) & (ahead >= 0)
    return seen if window is None else seen & (ahead < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    queries: Place,
    keys: Place,
    how: Attend,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scores and softmax in f32: a query sees its own segment, up to its own position.

    All but "xla" need keys that are the queries' own rows, and tokens in order: a segment's side by side, later ones at
    later indices. Rows and packed rows are so; a KV cache is not, and takes "xla".
    """
    return IMPLEMENTATIONS[how.implementation](q, k, v, queries, keys, how)


def _plain(q, k, v, queries, keys, how):
    """[B, N, T, S] exists in f32."""
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
    scores = _dot("BKQH,BKHS->BKQS", q, k) * how.scale
    if how.soft_cap is not None:
        scores = how.soft_cap * jnp.tanh(scores / how.soft_cap)
    mask = jnp.repeat(_visible(queries, keys, how.window), N // K, axis=1)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = _dot("BKQS,BKSH->BKQH", weights, v).astype(v.dtype)
    return out.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _cudnn(q, k, v, queries, keys, how):
    """cuDNN's flash attention through `jax.nn`; bf16 or f16."""
    mask = _visible(queries, keys, how.window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=how.scale, implementation="cudnn")


def _splash(q, k, v, queries, keys, how):
    """JAX's kernel for TPUs, on each device's own rows and heads; elsewhere in Pallas' interpreter, as a test can."""
    B, T, _, H = q.shape
    if how.window is None:
        mask = splash_attention_mask.CausalMask((T, T))
    else:
        mask = splash_attention_mask.LocalMask((T, T), (how.window - 1, 0), 0)
    blocks = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = dict.fromkeys(blocks, math.gcd(T, 512))

    def local(q, k, v, q_segments, k_segments):
        widen = [(0, 0)] * 3 + [(0, -H % _LANES)]  # zeros add nothing to a score, and the output's are cut off
        heads_first = (jnp.moveaxis(jnp.pad(x, widen), 2, 1) for x in (how.scaled(q), k, v))
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * q.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=True),
            attn_logits_soft_cap=how.soft_cap,
            residual_checkpoint_name="attention",
            interpret=how.platform != "tpu",
        )
        out = jax.vmap(kernel)(*heads_first, splash_attention_kernel.SegmentIds(q_segments, k_segments))
        return jnp.moveaxis(out, 1, 2)[..., :H]

    mesh = current_mesh() or how.mesh
    if mesh is not None:
        rows = "batch" if B % batch_parts(mesh) == 0 else None  # one row that all prompts share is whole everywhere
        heads, kv, place = (partition(rows, None, *axes) for axes in (("heads", None), ("kv", None), ()))
        specs = {"in_specs": (heads, kv, kv, place, place), "out_specs": heads}
        local = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    return local(q, k, v, queries.segment_ids, keys.segment_ids)


def _blocked(q, k, v, queries, keys, how):
    """As flash attention (Dao 2023), a tile at a time; blocks of keys that no row's queries may see are not visited."""
    T = q.shape[1]
    widen = [(0, 0), (0, -T % _BLOCK)]  # by padding, segment 0
    q, k, v = (jnp.pad(x, [*widen, (0, 0), (0, 0)]) for x in (q, k, v))
    queries = jax.tree.map(lambda x: jnp.pad(x, widen), queries)
    return _tiled(q, k, v, queries, how)[:, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(q, k, v, place, how):
    return _tiled_forward(q, k, v, place, how)[0]


def _tiled_forward(q, k, v, place, how):
    qs, ks, vs, tile, visits, visited = _tiles(q, k, v, place, how)

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
    q, k, v, place, out, lse = saved
    qs, ks, vs, tile, visits, visited = _tiles(q, k, v, place, how)
    inner = _dot("BTNH,BTNH->BTN", d_out, out)[..., None]
    d_outs, inners = (_tile(x, k.shape[2]) for x in (d_out, inner))

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
    """q (scaled), k, v in blocks, and tile(queries, keys, i, j) -> (scores, slope), visits(i), visited(i, t)."""
    (B, T), K, G = place.segment_ids.shape, k.shape[2], q.shape[2] // k.shape[2]
    places = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(len(x), -1, _BLOCK), 1, 0), place)

    def tile(queries, keys, i, j):
        scores, slope = _dot("BKqH,BKtH->BKqt", queries, keys), 1.0
        if how.soft_cap is not None:
            squashed = jnp.tanh(scores / how.soft_cap)
            scores, slope = how.soft_cap * squashed, 1 - squashed**2
        mask = _visible(*(Place(*(x[at] for x in places)) for at in (i, j)), how.window)
        mask = jnp.tile(mask, (1, G, 1))[:, None]
        return jnp.where(mask, scores, jnp.finfo(jnp.float32).min), slope

    # For each block of queries, the first block of keys of its segments that it may see; behind its own if none.
    # Segments are contiguous: the first query's begins no later than the others'.
    blocks = jnp.arange(T // _BLOCK)
    ahead = place.segment_ids[:, ::_BLOCK]
    first = jnp.argmax(place.segment_ids[:, None] == ahead[..., None], axis=-1) // _BLOCK
    real = (place.segment_ids.reshape(B, -1, _BLOCK) != 0).any(-1)
    first = jnp.where(real, first, blocks + 1).min(0)
    first = first if how.window is None else jnp.maximum(first, (blocks * _BLOCK - how.window + 1) // _BLOCK)
    before = jnp.minimum(first, -(-(place.segment_ids == SHARED).sum(1).max() // _BLOCK))
    visits = lambda i: before[i] + i + 1 - first[i]  # noqa: E731
    visited = lambda i, t: jnp.where(t < before[i], t, t - before[i] + first[i])  # noqa: E731
    return *(_tile(x, K) for x in (how.scaled(q), k, v)), tile, visits, visited


def _tile(x: Float[Array, "B T N H"], groups: int) -> Float[Array, "n B K GQ H"]:
    """Blocks of tokens first, and the query heads of a key head as more rows of it."""
    B, T, N, H = x.shape
    x = x.reshape(B, T // _BLOCK, _BLOCK, groups, N // groups, H)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(T // _BLOCK, B, groups, -1, H)


def _untile(x: Float[Array, "n B K GQ H"], shape: tuple[int, ...]) -> Float[Array, "B T N H"]:
    n, B, K, _, H = x.shape
    return x.reshape(n, B, K, -1, _BLOCK, H).transpose(1, 0, 4, 2, 3, 5).reshape(shape)


IMPLEMENTATIONS = {"xla": _plain, "blocked": _blocked, "splash": _splash, "cudnn": _cudnn}


def resolve(how: Attend, length: int, head_dim: int = 64) -> Attend:
    """`how` with "auto" replaced by what suits the platform and rows of `length` tokens.

    A warning says where long rows do without the platform's own kernel.
    """
    if how.implementation != "auto":
        return how
    plain = "blocked" if length >= _LONG else "xla"
    if how.platform == "tpu":
        fast, fits, needs = "splash", length % _LANES == 0, f"a length that {_LANES} divides"
    elif how.platform in ("gpu", "cuda"):
        fits = how.dtype.itemsize == 2 and how.soft_cap is None and head_dim in range(8, 129, 8) and length % 2 == 0
        fast, needs = "cudnn", "bf16 or f16, no soft-cap, heads of 8, 16, ... 128 numbers, and an even length"
    else:
        return how._replace(implementation=plain)
    if not fits and plain == "blocked":
        logging.warning("attention over %d tokens is %s: %s needs %s", length, plain, fast, needs)
    return how._replace(implementation=fast if fits else plain)


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
