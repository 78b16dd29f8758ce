"""JAX's splash attention, the TPU's kernel, on each device's own rows and heads."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

from br_jax.core.mesh import current_mesh, partition
from br_jax.models.masks import Attend

LANES = 128  # what its block sizes and head widths are multiples of


def splash(q, k, v, queries, keys, how):
    """See `attention.attend`; off the TPU the kernel runs in Pallas' interpreter, as a test can."""
    T, H = q.shape[1], q.shape[3]
    heads, kv = partition("batch", None, "heads", None), partition("batch", None, "kv", None)
    place = partition("batch", None)

    def local(q, k, v, q_segments, k_segments):
        kernel = _kernel(T, q.shape[2], how)
        widen = [(0, 0)] * 3 + [(0, -H % LANES)]  # zeros add nothing to a score, and the output's are cut off
        q, k, v = (jnp.moveaxis(jnp.pad(x, widen), 2, 1) for x in (how.scaled(q), k, v))
        segments = splash_attention_kernel.SegmentIds(q_segments, k_segments)
        return jnp.moveaxis(jax.vmap(kernel)(q, k, v, segments), 1, 2)[..., :H]

    if current_mesh() is not None:
        local = jax.shard_map(local, in_specs=(heads, kv, kv, place, place), out_specs=heads, check_vma=False)
    return local(q, k, v, queries.segment_ids, keys.segment_ids)


def _kernel(T: int, heads: int, how: Attend):
    """The kernel for rows of T tokens, and blocks as large as divide T, up to 512."""
    if how.window is None:
        mask = splash_attention_mask.CausalMask((T, T))
    else:
        mask = splash_attention_mask.LocalMask((T, T), (how.window - 1, 0), 0)
    size = math.gcd(T, 512)
    blocks = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(blocks, size), use_fused_bwd_kernel=True)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=how.soft_cap,
        residual_checkpoint_name="attention",
        interpret=how.platform != "tpu",
    )
