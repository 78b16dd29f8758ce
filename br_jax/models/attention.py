"""Attention with grouped query heads: one function, several implementations; "xla" is the oracle of the others.

What a query may see is said by each token's segment and position, never by a [T, S] mask that somebody carries round.
"""

import math

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float, Int

from br_jax.models import splash
from br_jax.models.cpu_kernels import blocked
from br_jax.models.masks import Attend, Place, visible
from br_jax.models.spec import ModelSpec

_LONG = 256  # tokens of a row from which on "blocked" is used


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


IMPLEMENTATIONS = {"xla": _plain, "blocked": blocked, "splash": splash.splash, "cudnn": _cudnn}


def resolve(how: Attend, length: int) -> Attend:
    """`how` with "auto" replaced by what suits the platform and rows of `length` tokens; a fallback is logged."""
    if how.implementation != "auto":
        return how
    chosen = "blocked" if length >= _LONG else "xla"
    if how.platform == "tpu":
        fast, fits, needs = "splash", length % splash.LANES == 0, f"a length that {splash.LANES} divides"
    elif how.platform in ("gpu", "cuda"):
        fits = how.dtype.itemsize == 2 and how.soft_cap is None
        fast, needs = "cudnn", "bf16 or f16, and no soft-cap"
    else:
        fast, fits, needs = chosen, True, ""
    if not fits:
        logging.warning("attention over %d tokens is %s: %s needs %s", length, chosen, fast, needs)
    return how._replace(implementation=fast if fits else chosen)


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
