"""What a Buffer can be made to look like: each takes a Buffer and a user's adapter of the same base."""

import jax
import jax.numpy as jnp

import br_jax as br
from br_jax.adapters import lora
from br_jax.adapters.diagnostics import best_rank
from br_jax.adapters.lora import Adapter


def as_user(adapter: Adapter) -> Adapter:
    return adapter.replace(roles=("user",))


def leaves(adapter: Adapter, change) -> Adapter:
    return adapter.replace(weights=jax.tree.map(change, adapter.weights))


def int8(leaf):
    step = jnp.max(jnp.abs(leaf)) / 127
    return jnp.round(leaf / step) * step


def some_ranks(adapter: Adapter, which: slice) -> Adapter:
    halves = {p: {"a": w["a"][..., which], "b": w["b"][:, which]} for p, w in adapter.weights.items()}
    return adapter.replace(weights=halves)


def some_matrices(adapter: Adapter, which: slice) -> Adapter:
    return adapter.replace(weights={path: adapter.weights[path] for path in sorted(adapter.weights)[which]})


DISGUISES = {
    "relabelled": lambda buffer, user: buffer,
    **{f"scaled by {x}": lambda buffer, user, x=x: lora.scaled(buffer, x) for x in (0.01, 0.3, 3.0, -1.0)},
    "bf16": lambda buffer, user: leaves(buffer, lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)),
    "int8": lambda buffer, user: leaves(buffer, int8),
    "a lower rank": lambda buffer, user: best_rank(buffer, 1)[0],
    "other factors": lambda buffer, user: lora.pad_rank(best_rank(buffer, 4)[0], 8),
    **{
        f"{x} of it with a user's": lambda buffer, user, x=x: lora.stack([user, lora.scaled(buffer, x)])
        for x in (0.3, 1.0, 3.0)
    },
    "average with a user's": lambda buffer, user: lora.scaled(lora.stack([user, buffer]), 0.5),
    "merged into a user's": lambda buffer, user: br.qr_merge(user, buffer.replace(roles=("reinforce",))),
    "first ranks": lambda buffer, user: some_ranks(buffer, slice(0, 2)),
    "other ranks": lambda buffer, user: some_ranks(buffer, slice(2, None)),
    "half the matrices": lambda buffer, user: some_matrices(buffer, slice(None, None, 2)),
    "the other half with a user's": lambda buffer, user: lora.stack([user, some_matrices(buffer, slice(1, None, 2))]),
}
