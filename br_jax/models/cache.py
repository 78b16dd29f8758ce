"""KV caches: of all layers stacked, for a scan over layers, and layer by layer, for a loop over tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from br_jax.models.masks import Place
from br_jax.models.spec import ModelSpec
from br_jax.sharding import CACHE, constrain


def init_cache(spec: ModelSpec, batch: int, slots: int, dtype) -> dict:
    """An empty one: "layers": k [L, B, K, H, S] and v [L, B, K, S, H]; positions and segment_ids [B, S] int32.

    Empty slots have segment 0, which no real token looks at.
    """
    heads = (spec.num_layers, batch, spec.num_kv_heads)
    return {
        "layers": {
            "k": constrain(jnp.zeros((*heads, spec.head_dim, slots), dtype), *CACHE["k"]),
            "v": constrain(jnp.zeros((*heads, slots, spec.head_dim), dtype), *CACHE["v"]),
        },
        **{name: jnp.zeros((batch, slots), jnp.int32) for name in Place._fields},
    }


def join_caches(caches: Sequence[dict], slots: int) -> dict:
    """Stacked caches of some rows each as one of all rows with `slots`, whose "layers" is a list of {"k", "v"}.

    A loop over tokens writes such arrays in place and reads them where they are; of a stacked cache XLA's CPU copies
    every layer at every token.
    """

    def join(arrays, axis):
        def widen(array):
            return jnp.pad(array, [(0, slots - size if i == axis else 0) for i, size in enumerate(array.shape)])

        return jnp.concatenate([widen(array) for array in arrays])

    def layer(i, name, axis):
        return constrain(join([cache["layers"][name][i] for cache in caches], axis), *CACHE[name][1:])

    return {
        "layers": [{"k": layer(i, "k", 3), "v": layer(i, "v", 2)} for i in range(len(caches[0]["layers"]["k"]))],
        **{name: join([cache[name] for cache in caches], 1) for name in Place._fields},
    }


def unstack_layers(variables: dict) -> dict:
    """The collections with {"0": layer, "1": layer, ...} for "layers": in a loop, XLA's CPU would copy each slice."""
    count = len(variables["params"]["layers"]["attn_norm"]["scale"])
    return {
        name: held | {"layers": {str(i): layer_of(held["layers"], i) for i in range(count)}}
        for name, held in variables.items()
        if held
    }


def layer_of(layers: dict, index: int) -> dict:
    """One layer of "layers", stacked ones or those of `unstack_layers`."""
    return layers[str(index)] if str(index) in layers else jax.tree.map(lambda leaf: leaf[index], layers)
