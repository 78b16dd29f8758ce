"""In what precision an f32 model multiplies matrices.

With "bfloat16" both sides of every product are rounded to bf16 and summed in f32; weights at rest, the residual stream,
norms, softmax, loss, gradients and optimizer stay f32. AMD's CPUs with AVX512-BF16, and CPUs with AMX, multiply so
about twice as fast; Intel's with AVX512-BF16 alone take longer (docs/performance.md).
Accelerators have a setting of their own, `jax_default_matmul_precision`.
"""

import pathlib
import re

import jax
import jax.numpy as jnp

from br_jax.core.errors import UserError

PRECISIONS = ("auto", "float32", "bfloat16")
_FAST = re.compile(r"\bamx_bf16\b|AuthenticAMD(?s:.*)\bavx512_bf16\b")
_CPU = pathlib.Path("/proc/cpuinfo")


def resolve_precision(name: str, dtype: str, platform: str | None = None) -> str:
    """The precision meant by one of `PRECISIONS`, for a model of a dtype and a platform (None: JAX's default).

    "auto" is "bfloat16" on a CPU that multiplies it faster; a bf16 model is all bf16. An unknown name is a `UserError`.
    """
    if name not in PRECISIONS:
        raise UserError(f"matmul_precision {name!r}: it is one of {', '.join(PRECISIONS)}")
    if dtype != "float32":
        return dtype
    if name != "auto":
        return name
    on_cpu = (platform or jax.default_backend()) == "cpu"
    return "bfloat16" if on_cpu and _CPU.exists() and _FAST.search(_CPU.read_text()) else "float32"


def rounding_dtype(dtype, precision: str) -> jnp.dtype:
    """What both sides of a product are rounded to, where they come in `dtype`: the narrower of that and precision."""
    return min(jnp.dtype(dtype), jnp.dtype(precision), key=lambda one: one.itemsize)
