"""Attention with grouped query heads: one function, several implementations; "xla" is the oracle of the others.

Each token's segment and position say what a query may see; nobody carries a [T, S] mask round.
"""

import math

import jax
import jax.numpy as jnp
from absl import logging
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Float, Int

from br_jax.core.mesh import batch_parts, current_mesh, partition
from br_jax.models.cpu_kernels import blocked
from br_jax.models.masks import Attend, Place, visible
from br_jax.models.spec import ModelSpec

_LONG = 256  # tokens of a row from which on "blocked" is used
_LANES = 128  # what splash's block sizes and head widths are multiples of


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
    scores = jnp.einsum("BKQH,BKHS->BKQS", q, k, preferred_element_type=jnp.float32) * how.scale
    if how.soft_cap is not None:
        scores = how.soft_cap * jnp.tanh(scores / how.soft_cap)
    mask = jnp.repeat(visible(queries, keys, how.window), N // K, axis=1)
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKQS,BKSH->BKQH", weights, v, preferred_element_type=jnp.float32).astype(v.dtype)
    return out.reshape(B, K, T, N // K, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _cudnn(q, k, v, queries, keys, how):
    """cuDNN's flash attention through `jax.nn`; bf16 or f16."""
    mask = visible(queries, keys, how.window)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=how.scale, implementation="cudnn")


def _splash(q, k, v, queries, keys, how):
    """JAX's kernel for TPUs, on each device's own rows and heads; elsewhere in Pallas' interpreter, as a test can."""
    B, T, _, H = q.shape

    def local(q, k, v, q_segments, k_segments):
        widen = [(0, 0)] * 3 + [(0, -H % _LANES)]  # zeros add nothing to a score, and the output's are cut off
        heads_first = (jnp.moveaxis(jnp.pad(x, widen), 2, 1) for x in (how.scaled(q), k, v))
        segments = splash_attention_kernel.SegmentIds(q_segments, k_segments)
        out = jax.vmap(_splash_kernel(T, q.shape[2], how))(*heads_first, segments)
        return jnp.moveaxis(out, 1, 2)[..., :H]

    mesh = current_mesh() or how.mesh
    if mesh is not None:
        rows = "batch" if B % batch_parts(mesh) == 0 else None  # one row that all prompts share is whole everywhere
        heads, kv, place = (partition(rows, None, *axes) for axes in (("heads", None), ("kv", None), ()))
        specs = {"in_specs": (heads, kv, kv, place, place), "out_specs": heads}
        local = jax.shard_map(local, mesh=mesh, check_vma=False, **specs)
    return local(q, k, v, queries.segment_ids, keys.segment_ids)


def _splash_kernel(T: int, heads: int, how: Attend):
    """The kernel for rows of T tokens, and blocks as large as divide T, up to 512."""
    if how.window is None:
        mask = splash_attention_mask.CausalMask((T, T))
    else:
        mask = splash_attention_mask.LocalMask((T, T), (how.window - 1, 0), 0)
    blocks = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = dict.fromkeys(blocks, math.gcd(T, 512))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=True),
        attn_logits_soft_cap=how.soft_cap,
        residual_checkpoint_name="attention",
        interpret=how.platform != "tpu",
    )


IMPLEMENTATIONS = {"xla": _plain, "blocked": blocked, "splash": _splash, "cudnn": _cudnn}


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
