"""KV caches, and weights: of all layers stacked, for a scan over layers, and one by one, for a loop over tokens.

A loop over tokens writes a layer's own arrays in place and reads them where they are; of stacked ones XLA's CPU copies
every layer at every token.
"""

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Int

from br_jax.core.mesh import CACHE, constrain
from br_jax.models.masks import Place
from br_jax.models.spec import ModelSpec


def init_cache(spec: ModelSpec, batch: int, slots: int, dtype) -> dict:
    """An empty one: "layers": k [L, B, K, H, S] and v [L, B, K, S, H]; positions and segment_ids [B, S] int32.

    Empty slots have segment 0, which no real token looks at.
    """
    places = {name: jnp.zeros((batch, slots), jnp.int32) for name in Place._fields}
    return {"layers": _zeros(spec, (spec.num_layers, batch), slots, dtype), **places}


def init_unstacked_cache(spec: ModelSpec, batch: int, slots: int, dtype) -> dict:
    """An empty one whose "layers" is a list of {"k": [B, K, H, S], "v": [B, K, S, H]}."""
    layers = [_zeros(spec, (batch,), slots, dtype) for _ in range(spec.num_layers)]
    return {"layers": layers, **{name: jnp.zeros((batch, slots), jnp.int32) for name in Place._fields}}


def _zeros(spec: ModelSpec, rows: tuple[int, ...], slots: int, dtype) -> dict:
    shapes = {"k": (spec.head_dim, slots), "v": (slots, spec.head_dim)}
    shapes = {name: (*rows, spec.num_kv_heads, *shape) for name, shape in shapes.items()}
    return {name: constrain(jnp.zeros(shape, dtype), *CACHE[name][-len(shape) :]) for name, shape in shapes.items()}


def write_rows(cache: dict, part: dict, rows: Int[Array, " R"]) -> dict:
    """An unstacked cache with the slots of a stacked one of R rows in its rows `rows`, which hold nothing else then.

    As many rows as the cache has are all of them, in order.
    """
    rest = cache["positions"].shape[1] - part["positions"].shape[1]
    part = part | {name: jnp.pad(part[name], ((0, 0), (0, rest))) for name in Place._fields}

    def write(cache, part, row):
        layers = [layer_of(part["layers"], i) for i in range(len(cache["layers"]))]
        return jax.tree.map(
            lambda all_rows, new: jax.lax.dynamic_update_slice(all_rows, new, (row, *[0] * (all_rows.ndim - 1))),
            cache,
            part | {"layers": layers},
        )

    def write_one(i, cache):
        one = {name: jax.lax.dynamic_slice_in_dim(part[name], i, 1) for name in Place._fields}
        layers = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), part["layers"])
        return write(cache, one | {"layers": layers}, rows[i])

    if len(part["positions"]) == len(cache["positions"]):
        return write(cache, part, 0)
    return jax.lax.fori_loop(0, len(part["positions"]), write_one, cache)


def unstack_weights(variables: dict, rounding: jnp.dtype) -> dict:
    """The collections with {"0": layer, "1": layer, ...} for "layers", each kernel as "turned", [out, in].

    What is multiplied is rounded here, once. Few rows meet a turned kernel faster (`cpu_kernels.turned_product`); an
    embedding lies so by itself.
    """
    params = variables["params"]
    head = params["head"]["kernel"].T if "head" in params else params["embed"]["embedding"]

    def layer(collection, i):
        flat = {}
        for (*module, name), leaf in traverse_util.flatten_dict(layer_of(collection["layers"], i)).items():
            if name == "kernel":
                name, leaf = "turned", leaf.T
            flat[*module, name] = leaf.astype(rounding) if name in ("turned", "a", "b") else leaf
        return traverse_util.unflatten_dict(flat)

    layers = range(len(params["layers"]["attn_norm"]["scale"]))
    unstacked = {
        name: collection | {"layers": {str(i): layer(collection, i) for i in layers}}
        for name, collection in variables.items()
        if collection
    }
    return unstacked | {"params": unstacked["params"] | {"head": {"turned": head.astype(rounding)}}}


def layer_of(layers: dict, index: int) -> dict:
    """One layer of "layers", stacked ones or those of `unstack_weights`."""
    return layers[str(index)] if str(index) in layers else jax.tree.map(lambda leaf: leaf[index], layers)
