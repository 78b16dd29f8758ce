"""The alignment direction as several defences use it: C = V V^T / ||V||_F of each matrix, V what alignment has added.

V^T is A_v B_v, of low rank, so C is never made: b C takes products with the factors alone. All of it is f32, at the
highest precision.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from br_jax.adapters.lora import Adapter

product = functools.partial(jnp.einsum, precision="highest")


def onto(b: Float[Array, "L R O"], v: dict[str, Array]) -> Float[Array, "L R O"]:
    """b C of every layer, for the factors {"a": [L, I, S], "b": [L, S, O]} of V^T; 0 where V is 0."""
    gram = product("lis,lit->lst", v["a"], v["a"])
    norm = jnp.sqrt(jnp.sum(gram * product("lso,lto->lst", v["b"], v["b"]), axis=(1, 2), keepdims=True))
    along = product("lrs,lst,lto->lro", product("lro,lso->lrs", b, v["b"]), gram, v["b"])
    return along / jnp.where(norm > 0, norm, 1.0)


def inner(a: Float[Array, "L I R"], x: Float[Array, "L R O"], y: Float[Array, "L R O"]) -> Float[Array, " L"]:
    """The inner product of A X and A Y, layer by layer."""
    return jnp.sum(product("lir,lis->lrs", a, a) * product("lro,lso->lrs", x, y), axis=(1, 2))


def factors(direction: Adapter, path: str) -> dict[str, Array]:
    """V^T of a path, the adapter's scale in its b."""
    pair = direction.weights[path]
    return {"a": pair["a"], "b": direction.scale * pair["b"]}
