"""The decoder: one scanned stack of layers, with low-rank adapters as variable collections beside its params.

`Decoder.apply({"params": base, "lora": frozen, "lora_trainable": trained}, ...)`: both adapter collections mirror
`params` ({"layers": {"attn": {"q": {"a": [L, in, R], "b": [L, R, out]}}}}, the scale already in b), either may be
absent, and nothing in the modules changes when one is added or removed.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from br_jax.models.attention import Attend, Place, attend, attend_cache, resolve, rope_angles, rotate
from br_jax.models.spec import ModelSpec
from br_jax.sharding import CACHE, constrain

# What remat can save by name: the outputs of a layer's matmuls, and of attention (with what its gradient needs).
SAVED = ("q", "k", "v", "attention", "o", "gate", "up", "down")


def saved_names(remat: str) -> tuple[str, ...]:
    """The parts of a layer whose outputs the backward pass finds again, instead of computing them again.

    Args:
        remat: "none" or "full"; "matmuls" or "offload": all of `SAVED`; or a comma list of some.

    Raises:
        ValueError: an unknown name.
    """
    if remat in ("none", "matmuls", "offload"):
        return SAVED
    names = () if remat == "full" else tuple(part.strip() for part in remat.split(","))
    if unknown := [name for name in names if name not in SAVED]:
        known = ", ".join(SAVED)
        raise ValueError(f"remat {unknown[0]!r}: it is none, full, matmuls, offload or some of {known}")
    return names


def remat_policy(remat: str) -> Callable | None:
    """What the backward pass keeps of each layer, beside the layer's input; the rest is computed again.

    Args:
        remat: "none" keeps everything, "full" nothing more, others the outputs of `saved_names`: "offload" in the
            host's memory, the rest on the device.

    Returns:
        A policy of `jax.checkpoint`, or None for "none".

    Raises:
        ValueError: an unknown name.
    """
    names = saved_names(remat)
    if remat == "none":
        return None
    if remat == "offload":
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint_policies.save_only_these_names(*names)


@jax.custom_vjp
def low_rank(x: Float[Array, "B T in"], a: Float[Array, "in R"], b: Float[Array, "R out"]) -> Float[Array, "B T out"]:
    """x A B in the dtype of x; a and b are f32 at rest and so are their gradients.

    Autodiff would make A's and B's gradients as (wide^T thin), which transposes a [B T, out] array for each of them;
    (thin^T wide) is the same number and transposes [B T, R].
    """
    return _low_rank_forward(x, a, b)[0]


def low_rank_each(
    x: Float[Array, "B T I"], a: Float[Array, "U I R"], b: Float[Array, "U R O"]
) -> Float[Array, "B T O"]:
    """`low_rank` with U adapters side by side, each for its own B / U rows of the batch, one after the other."""
    rows = x.reshape(a.shape[0], -1, x.shape[-1])
    return (rows @ a.astype(x.dtype) @ b.astype(x.dtype)).reshape(*x.shape[:-1], b.shape[-1])


def _low_rank_forward(x, a, b):
    h = x @ a.astype(x.dtype)
    return h @ b.astype(x.dtype), (x, h, a, b)


def _low_rank_backward(saved, dy):
    x, h, a, b = saved
    dh = dy @ b.T.astype(dy.dtype)

    def sum_over_tokens(thin, wide):
        """[B T R], [B T D] -> [R D] in f32; as matrices, for XLA's CPU has no bf16 dot with more axes."""
        thin, wide = (array.reshape(-1, array.shape[-1]) for array in (thin, wide))
        return jnp.matmul(thin.T, wide, preferred_element_type=jnp.float32)

    return dh @ a.T.astype(dy.dtype), sum_over_tokens(dh, x).T, sum_over_tokens(h, dy)


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Linear(nn.Module):
    """x W + bias + x A B: a frozen kernel with whatever adapters the variables hold for it."""

    features: int
    dropout: float = 0.0
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = jnp.matmul(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
            y = (y + bias.astype(jnp.float32)[None, None]).astype(x.dtype)  # rounded once, as torch does
        else:
            y = x @ kernel.astype(x.dtype)
        for collection in ("lora", "lora_trainable"):
            if self.has_variable(collection, "a"):
                drops = collection == "lora_trainable" and self.has_rng("dropout")
                seen = nn.Dropout(self.dropout, deterministic=not drops)(x)
                a, b = (self.get_variable(collection, name) for name in "ab")
                y += (low_rank if a.ndim == 2 else low_rank_each)(seen, a, b)
        return checkpoint_name(y, self.name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rms_norm(x: Float[Array, "*N D"], eps: float) -> Float[Array, "*N D"]:
    """x / sqrt(mean(x^2) + eps), computed in f32, in the dtype of x; its gradient in two passes over x."""
    return _rms_norm_forward(x, eps)[0]


def _rms_norm_forward(x, eps):
    wide = x.astype(jnp.float32)
    return (wide * _inverse_rms(wide, eps)).astype(x.dtype), x


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


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: statistics in f32, the weight applied as its maker does (transformers).

    Llama and Qwen round to the compute dtype and multiply by the weight; Gemma multiplies by 1 + weight and rounds.
    """

    spec: ModelSpec

    @nn.compact
    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        start = nn.initializers.zeros if self.spec.norm_plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        if self.spec.norm_plus_one:
            wide = rms_norm(x.astype(jnp.float32), self.spec.norm_eps) * (1 + scale.astype(jnp.float32))
            return wide.astype(x.dtype)
        return rms_norm(x, self.spec.norm_eps) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Rotary grouped-query attention over the batch itself, or over a layer's KV cache that the batch is written to."""

    spec: ModelSpec
    dropout: float
    how: Attend

    @nn.compact
    def __call__(self, x, cache, windowed, angles, queries, keys, slot):
        spec = self.spec
        B, T, D = x.shape

        def heads(name: str, count: int):
            linear = Linear(count * spec.head_dim, self.dropout, name in spec.biases, name=name)
            return linear(x).reshape(B, T, count, spec.head_dim)

        q, k, v = heads("q", spec.num_heads), heads("k", spec.num_kv_heads), heads("v", spec.num_kv_heads)
        if spec.qk_norm:
            q, k = RMSNorm(spec, name="q_norm")(q), RMSNorm(spec, name="k_norm")(k)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            new = {"k": k.transpose(0, 2, 3, 1), "v": v.transpose(0, 2, 1, 3)}
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(cache[name], new[name].astype(cache[name].dtype), slot, axis)
                for name, axis in (("k", 3), ("v", 2))
            }
        if keys.positions.shape[1] == T:
            operands, attending = (q, k, v, queries, keys), attend
        else:
            operands, attending = (q, cache["k"], cache["v"], queries, keys), attend_cache
        out = self._in_window(attending, operands, windowed)
        return Linear(D, self.dropout, "o" in spec.biases, name="o")(out.reshape(B, T, -1)), cache

    def _in_window(self, attending, operands, windowed):
        """Attends with this layer's window; where layers differ, a scanned layer learns its own only when it runs."""
        layers, slots = set(self.spec.window_layers), operands[-1].positions.shape[1]

        def run(window, *operands):
            return attending(*operands, self.how._replace(window=window))

        if True not in layers or slots <= self.spec.window:
            return run(None, *operands)
        with_window, without = functools.partial(run, self.spec.window), functools.partial(run, None)
        if len(layers) == 1 or isinstance(windowed, bool):
            return (with_window if windowed is not False else without)(*operands)
        return jax.lax.cond(windowed, with_window, without, *operands)


class Mlp(nn.Module):
    """A gated feed-forward layer: down(act(gate x) * up x); SwiGLU, or GeGLU."""

    spec: ModelSpec
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def linear(name: str, width: int, x):
            return Linear(width, self.dropout, name in self.spec.biases, name=name)(x)

        gate, up = linear("gate", self.spec.ffw_dim, x), linear("up", self.spec.ffw_dim, x)
        gate = jax.nn.silu(gate) if self.spec.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return linear("down", x.shape[-1], gate * up)


class Block(nn.Module):
    """One pre-norm layer, on the residual stream and this layer's cache (or None)."""

    spec: ModelSpec
    dropout: float
    how: Attend

    @nn.compact
    def __call__(self, x, cache, windowed, angles, queries, keys, slot):
        def norm(name: str, x):
            return RMSNorm(self.spec, name=name)(x)

        attention = Attention(self.spec, self.dropout, self.how, name="attn")
        update, cache = attention(norm("attn_norm", x), cache, windowed, angles, queries, keys, slot)
        x += norm("attn_post_norm", update) if self.spec.post_norms else update
        update = Mlp(self.spec, self.dropout, name="mlp")(norm("mlp_norm", x))
        x += norm("mlp_post_norm", update) if self.spec.post_norms else update
        return constrain(x, "batch", "length", None), cache


class Decoder(nn.Module):
    """Tokens in, final hidden states out; `unembed` turns the states that matter into logits.

    Attributes:
        spec: sizes of the model.
        dropout: dropout rate on the input of the trainable adapter only; active when a "dropout" rng is given.
        remat: what the backward pass keeps of each layer, see `remat_policy`.
        attention: how whole rows attend (see `attention.resolve`); to a cache with earlier tokens it is "xla".
    """

    spec: ModelSpec
    dropout: float = 0.0
    remat: str = "none"
    attention: Attend = Attend()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: dict | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], dict | None]:
        """Runs the stack, over the batch itself or over a cache that it extends at `slot`.

        Args:
            tokens: token ids.
            positions: place of each token in its own sequence, from 0.
            segment_ids: 1, 2, ... for the sequences of a row, 0 for padding.
            cache: from `init_cache` or `join_caches` (then layer after layer, unrolled); all T tokens of each row are
                written at slots `slot` .. `slot + T - 1`.
            slot: first cache slot to write.

        Returns:
            Final-norm hidden states in the compute dtype (the dtype of the params), and the new cache (or None).
        """
        spec = self.spec
        embedding = self.param(
            "embed", lambda key: {"embedding": nn.initializers.normal(0.02)(key, (spec.vocab_size, spec.embed_dim))}
        )
        if not spec.tie_embeddings:
            shape = (spec.embed_dim, spec.vocab_size)
            self.param("head", lambda key: {"kernel": nn.initializers.normal(0.02)(key, shape)})
        stored, placed = None, {}
        queries = keys = Place(positions, segment_ids)
        if cache is not None:
            stored = cache["layers"]
            written = {"positions": positions, "segment_ids": segment_ids}
            placed = {n: jax.lax.dynamic_update_slice(cache[n], new, (0, slot)) for n, new in written.items()}
            keys = Place(placed["positions"], placed["segment_ids"])
        behind = keys.positions.shape != positions.shape
        how = self.attends(tokens.shape[1], embedding["embedding"].dtype, behind)
        rest = (rope_angles(positions, spec), queries, keys, slot)
        x = jnp.take(embedding["embedding"], tokens, axis=0)
        if spec.scale_embeddings:
            x *= jnp.asarray(spec.embed_dim**0.5, x.dtype)
        x = constrain(x, "batch", "length", None)
        if isinstance(stored, list):
            block, updated = Block(spec, self.dropout, how, parent=None), []
            held = {name: tree["layers"] for name, tree in self.variables.items() if "layers" in tree}
            for i, layer_cache in enumerate(stored):
                # A layer's weights are sliced, and gathered over FSDP, when it is due; or else all of them at once.
                x, held = jax.lax.optimization_barrier((x, held))
                layer = {name: layer_of(layers, i) for name, layers in held.items()}
                x, layer_cache = block.apply(layer, x, layer_cache, spec.window_layers[i], *rest)
                updated.append(layer_cache)
            stored = updated
        else:
            block = Block
            if (policy := remat_policy(self.remat)) is not None:
                block = nn.remat(Block, policy=policy, prevent_cse=False)
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "lora": 0, "lora_trainable": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=spec.num_layers,
            )(spec, self.dropout, how, name="layers")
            x, stored = layers(x, stored, jnp.asarray(spec.window_layers), *rest)
        x = RMSNorm(spec, name="final_norm")(x)
        return x, None if cache is None else {"layers": stored, **placed}

    def attends(self, length: int, dtype, behind: bool = False) -> Attend:
        """How rows of `length` tokens attend, implementation and all; `behind` others, in a cache, or to themselves."""
        how = self.attention._replace(soft_cap=self.spec.attention_soft_cap, scale=self.spec.query_scale)
        return how._replace(implementation="xla") if behind else resolve(how, length, dtype)


def unembed(spec: ModelSpec, params: dict, hidden: Float[Array, "*N D"]) -> Float[Array, "*N V"]:
    """Logits in f32 from final hidden states, by the head or, when tied, the embedding."""
    if "head" in params:
        logits = jnp.matmul(hidden, params["head"]["kernel"], preferred_element_type=jnp.float32)
    else:
        embedding = params["embed"]["embedding"]
        logits = jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=jnp.float32)
    return logits if spec.logit_soft_cap is None else spec.logit_soft_cap * jnp.tanh(logits / spec.logit_soft_cap)


def init_cache(spec: ModelSpec, batch: int, slots: int, dtype) -> dict:
    """An empty KV cache: "layers": k [L, B, K, H, S] and v [L, B, K, S, H]; positions and segment_ids [B, S] int32.

    Empty slots have segment 0, which no real token looks at.
    """
    heads = (spec.num_layers, batch, spec.num_kv_heads)
    return {
        "layers": {
            "k": constrain(jnp.zeros((*heads, spec.head_dim, slots), dtype), *CACHE["k"]),
            "v": constrain(jnp.zeros((*heads, slots, spec.head_dim), dtype), *CACHE["v"]),
        },
        "positions": jnp.zeros((batch, slots), jnp.int32),
        "segment_ids": jnp.zeros((batch, slots), jnp.int32),
    }


def join_caches(caches: Sequence[dict], slots: int) -> dict:
    """Caches of some rows each as one of all rows with `slots`, where each layer's k and v are arrays of their own.

    A loop over tokens writes such arrays in place and reads them where they are; of a stacked cache XLA's CPU copies
    every layer at every token.

    Args:
        caches: stacked ones, with no more than `slots` each.
        slots: of the new one.

    Returns:
        A cache whose "layers" is a list of {"k": [B, K, H, S], "v": [B, K, S, H]}.
    """

    def join(arrays, axis):
        def widen(array):
            return jnp.pad(array, [(0, slots - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])

        return jnp.concatenate([widen(array) for array in arrays])

    def layer(i, name, axis):
        joined = join([cache["layers"][name][i] for cache in caches], axis)
        return constrain(joined, *CACHE[name][1:])

    count = caches[0]["layers"]["k"].shape[0]
    return {
        "layers": [{"k": layer(i, "k", 3), "v": layer(i, "v", 2)} for i in range(count)],
        **{name: join([cache[name] for cache in caches], 1) for name in ("positions", "segment_ids")},
    }


def unstack_layers(variables: dict) -> dict:
    """The collections with {"0": layer, "1": layer, ...} for "layers"."""

    def unstack(stacked):
        return {str(i): layer_of(stacked, i) for i in range(len(jax.tree.leaves(stacked)[0]))}

    return {
        name: {part: unstack(tree) if part == "layers" else tree for part, tree in held.items()}
        for name, held in variables.items()
    }


def layer_of(layers: dict, index: int) -> dict:
    """One layer of "layers", stacked ones or those of `unstack_layers`."""
    return layers[str(index)] if str(index) in layers else jax.tree.map(lambda leaf: leaf[index], layers)


def init_params(spec: ModelSpec, key: Array) -> dict:
    """Random f32 params of a model to be trained from scratch."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Decoder(spec).init(key, tokens, tokens, tokens + 1)["params"]


def abstract_params(spec: ModelSpec, dtype=jnp.float32) -> dict:
    """Shapes and dtypes of the params, without any memory."""
    tree = jax.eval_shape(lambda key: init_params(spec, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)
