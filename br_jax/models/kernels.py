"""Products and norms of the decoder: in which precision, in the form that XLA's CPU runs fast, with gradients by hand.

With the precision "bfloat16" an f32 model rounds both sides of every product to bf16 and sums in f32; weights at rest,
the residual stream, norms, softmax, loss, gradients and optimizer stay f32. AMD's CPUs with AVX512-BF16, and CPUs with
AMX, multiply so about twice as fast; Intel's with AVX512-BF16 alone take longer (docs/performance.md). Accelerators
have a setting of their own, `jax_default_matmul_precision`.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
