"""The decoder: one scanned stack of layers, its adapters as variable collections beside its params, its KV caches.

`Decoder.apply({"params": base, "lora": frozen, "lora_trainable": trained}, ...)`: both adapter collections mirror
`params` ({"layers": {"attn": {"q": {"a": [L, in, R], "b": [L, R, out]}}}}, the scale already in b), either may be
absent, and nothing in the modules changes when one is added or removed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from br_jax.core.mesh import CACHE, constrain, gather
from br_jax.models.attention import Attend, Place, attend, attend_cache, resolve, rope_angles, rotate
from br_jax.models.kernels import low_rank, product, rms_norm, rounding_dtype, turned_product
from br_jax.models.spec import ModelSpec

# What remat can save by name: the outputs of a layer's matmuls, and of attention (with what its gradient needs).
SAVED = ("q", "k", "v", "attention", "o", "gate", "up", "down")

# Collections that a caller may ask for, or give: each matrix' inputs, each MLP's outputs, what is added to the residual
# stream behind each layer, and by what each row's dropout is drawn.
_OPTIONAL = ("inputs", "outputs", "perturbations", "seeds")


class Shared(NamedTuple):
    """What all layers of a call have in common."""

    angles: Float[Array, "B T half"]  # of rope
    queries: Place  # the batch's tokens
    keys: Place  # what they may look at: themselves, or all slots of the cache
    slot: Int[Array, ""] | int  # of the cache, that the first of them is written to

    @property
    def self_contained(self) -> bool:
        """Whether the batch looks at itself alone: there is no cache, or none but its own slots."""
        return self.keys.positions.shape == self.queries.positions.shape


class Linear(nn.Module):
    """x W + bias + x A B: a frozen kernel, one of `spec.KERNELS`, with whatever adapters the variables hold for it."""

    spec: ModelSpec
    rounding: jnp.dtype  # of what is multiplied
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        self.sow("inputs", "x", x)  # where a caller asks for it
        shape, biased = self.spec.kernel_shapes[self.name], self.name in self.spec.biases
        wide = x.astype(jnp.float32) if biased else x
        if self.has_variable("params", "turned"):
            y = turned_product(wide, self.get_variable("params", "turned"))
        else:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
            y = product(wide, gather(kernel, f"{self.name}/kernel"), self.rounding)
        if biased:  # added in f32 and rounded once, as torch does
            bias = self.param("bias", nn.initializers.zeros, shape[1:])
            y = (y + bias.astype(jnp.float32)[None, None]).astype(x.dtype)
        for collection in ("lora", "lora_trainable"):
            if not self.has_variable(collection, "a"):
                continue
            drops = collection == "lora_trainable" and self.has_rng("dropout")
            seen = Dropout(self.dropout)(x) if drops and self.dropout else x
            if collection == "lora_trainable" and self.has_variable("seeds", "rows"):
                seen = drop(x, kept_by_row(self.get_variable("seeds", "rows"), x.shape, self.dropout), self.dropout)
            a, b = (self.get_variable(collection, name) for name in "ab")
            if a.ndim == 3:  # several adapters side by side, each for its own rows of the batch
                each = jax.vmap(functools.partial(low_rank, dtype=self.rounding))
                y += each(seen.reshape(len(a), -1, seen.shape[-1]), a, b).reshape(y.shape)
            else:
                y += low_rank(seen, gather(a, f"{self.name}/a"), gather(b, f"{self.name}/b"), self.rounding)
        return checkpoint_name(y, self.name)


class Dropout(nn.Module):
    """Inverted dropout, as `flax.linen.Dropout`."""

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return drop(x, jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape), self.rate)


def drop(x: Float[Array, "B T D"], kept: Bool[Array, "B T D"], rate: float) -> Float[Array, "B T D"]:
    """x where it is kept, larger by what is lost.

    The mask is made once: without a barrier a TPU's compiler makes it again inside each product that reads what is
    left, and takes minutes to do so.
    """
    kept = jax.lax.optimization_barrier(kept)
    return jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), 0)


def kept_by_row(seeds: UInt32[Array, " B"], shape: tuple[int, int, int], rate: float) -> Bool[Array, "B T D"]:
    """A mask that at a token depends on its row's seed and its place alone, whatever stands around it."""

    def of_token(seed, place):
        key = jax.random.fold_in(jax.random.key(seed), place)
        return jax.random.bernoulli(key, 1 - rate, shape[-1:])

    return jax.vmap(jax.vmap(of_token, (None, 0)), (0, None))(seeds, jnp.arange(shape[1]))


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
    def __call__(self, x: Float[Array, "B T D"], cache: dict | None, windowed: Bool[Array, ""] | bool, shared: Shared):
        spec, (B, T, _) = self.spec, x.shape

        linear = functools.partial(Linear, spec, self.how.dtype, self.dropout)
        q, k, v = (linear(name=name)(x).reshape(B, T, -1, spec.head_dim) for name in "qkv")
        if spec.qk_norm:
            q, k = RMSNorm(spec, name="q_norm")(q), RMSNorm(spec, name="k_norm")(k)
        q, k = rotate(q, shared.angles), rotate(k, shared.angles)
        if cache is None:
            q, k, v = (x.astype(self.how.dtype) for x in (q, k, v))
        else:
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(cache[name], new.astype(cache[name].dtype), shared.slot, axis)
                for name, new, axis in (("k", k.transpose(0, 2, 3, 1), 3), ("v", v.transpose(0, 2, 1, 3), 2))
            }
        attending, k, v = (attend, k, v) if shared.self_contained else (attend_cache, cache["k"], cache["v"])

        def run(window, *operands):
            return attending(*operands, self.how._replace(window=window))

        with_window, without = functools.partial(run, spec.window), functools.partial(run, None)
        operands = (q, k, v, shared.queries, shared.keys)
        bites = spec.window is not None and shared.keys.positions.shape[1] > spec.window
        layers = set(spec.window_layers) if bites else {False}
        windowed = layers.pop() if len(layers) == 1 else windowed
        if isinstance(windowed, bool):
            out = (with_window if windowed else without)(*operands)
        else:  # a scanned layer learns its own only when it runs
            out = jax.lax.cond(windowed, with_window, without, *operands)
        return linear(name="o")(out.reshape(B, T, -1).astype(x.dtype)), cache


class Mlp(nn.Module):
    """A gated feed-forward layer: down(act(gate x) * up x); SwiGLU, or GeGLU."""

    spec: ModelSpec
    dropout: float
    rounding: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        linear = functools.partial(Linear, self.spec, self.rounding, self.dropout)
        gate, up = linear(name="gate")(x), linear(name="up")(x)
        gate = jax.nn.silu(gate) if self.spec.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        out = linear(name="down")(gate * up)
        self.sow("outputs", "out", out)
        return out


class Block(nn.Module):
    """One pre-norm layer, on the residual stream and this layer's cache (or None)."""

    spec: ModelSpec
    dropout: float
    how: Attend

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], cache: dict | None, windowed: Bool[Array, ""] | bool, shared: Shared):
        norm = functools.partial(RMSNorm, self.spec)
        attention = Attention(self.spec, self.dropout, self.how, name="attn")
        update, cache = attention(norm(name="attn_norm")(x), cache, windowed, shared)
        x += norm(name="attn_post_norm")(update) if self.spec.post_norms else update
        update = Mlp(self.spec, self.dropout, self.how.dtype, name="mlp")(norm(name="mlp_norm")(x))
        x += norm(name="mlp_post_norm")(update) if self.spec.post_norms else update
        if self.has_variable("perturbations", "out"):
            x += self.get_variable("perturbations", "out")
        return constrain(x, "batch", "length", None), cache


class Decoder(nn.Module):
    """Tokens in, final hidden states out; `unembed` turns the states that matter into logits."""

    spec: ModelSpec
    dropout: float = 0.0  # on the input of the trainable adapter only, when a "dropout" rng is given
    remat: str = "none"  # what the backward pass keeps of each layer, see `saved_names`
    attention: Attend = Attend()  # of whole rows; spec gives scale, caps and window
    matmul_precision: str = "float32"  # what is multiplied is rounded to it, see `models.kernels`

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: dict | None = None,
        slot: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], dict | None]:
        """Final-norm hidden states in the compute dtype (that of the params), and the new cache (or None).

        The stack runs over the batch itself (see `Place`), or over a cache, stacked or not (see `init_cache`): all T
        tokens of each row are written to its slots `slot` .. `slot + T - 1`.
        """
        spec = self.spec
        draw, sizes = nn.initializers.normal(0.02), (spec.vocab_size, spec.embed_dim)
        embedding = self.param("embed", lambda key: {"embedding": draw(key, sizes)})["embedding"]
        if self.is_initializing() and not spec.tie_embeddings:
            self.param("head", lambda key: {"kernel": draw(key, sizes[::-1])})
        queries = keys = Place(positions, segment_ids)
        if cache is not None:
            filled = Place(cache["positions"], cache["segment_ids"])
            keys = jax.tree.map(lambda slots, new: jax.lax.dynamic_update_slice(slots, new, (0, slot)), filled, queries)
        shared = Shared(rope_angles(positions, spec), queries, keys, slot)
        how = self.attends(tokens.shape[1], embedding.dtype, shared.self_contained)
        x = jnp.take(embedding, tokens, axis=0)
        if spec.scale_embeddings:
            x *= jnp.asarray(spec.embed_dim**0.5, x.dtype)
        x = constrain(x, "batch", "length", None)
        layers = None if cache is None else cache["layers"]
        run = self._unrolled if isinstance(layers, list) else self._scanned
        x, layers = run(x, layers, how, shared)
        x = RMSNorm(spec, name="final_norm")(x)
        return x, None if cache is None else {"layers": layers, **keys._asdict()}

    def _scanned(self, x, cache: dict | None, how: Attend, shared: Shared):
        """All layers as one, over the stacked weights and cache."""
        policy = remat_policy(self.remat)
        block = Block if policy is None else nn.remat(Block, policy=policy, prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes=dict.fromkeys(("params", "lora", "lora_trainable", *_OPTIONAL), 0),
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),
            length=self.spec.num_layers,
        )(self.spec, self.dropout, how, name="layers")
        return layers(x, cache, jnp.asarray(self.spec.window_layers), shared)

    def _unrolled(self, x, cache: list[dict], how: Attend, shared: Shared):
        """Layer after layer, over an unstacked cache."""
        block, updated = Block(self.spec, self.dropout, how, parent=None), []
        stacks = {name: tree["layers"] for name, tree in self.variables.items() if "layers" in tree}
        for i, layer_cache in enumerate(cache):
            # A layer's weights are sliced, and gathered over FSDP, when it is due; or else all of them at once.
            x, stacks = jax.lax.optimization_barrier((x, stacks))
            layer = {name: layer_of(layers, i) for name, layers in stacks.items()}
            x, layer_cache = block.apply(layer, x, layer_cache, self.spec.window_layers[i], shared)
            updated.append(layer_cache)
        return x, updated

    def attends(self, length: int, dtype, self_contained: bool = True) -> Attend:
        """How rows of `length` tokens attend, implementation and all: to themselves, or (else) to a cache."""
        scale = self.spec.query_scale or self.spec.head_dim**-0.5
        rounding, platform = rounding_dtype(dtype, self.matmul_precision), self.attention.platform
        how = self.attention._replace(soft_cap=self.spec.attention_soft_cap, scale=scale, dtype=rounding)
        how = how._replace(platform=platform or jax.default_backend())
        return resolve(how, length, self.spec.head_dim) if self_contained else how._replace(implementation="xla")


def decoder_of(spec: ModelSpec, params: dict, matmul_precision: str = "float32") -> Decoder:
    """The decoder as it runs where these params lie or, abstract ones, will lie: what runs, trains and is planned."""
    sharding = getattr(params["embed"]["embedding"], "sharding", None)
    platform = jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None
    return Decoder(spec, attention=Attend(platform=platform, mesh=mesh), matmul_precision=matmul_precision)


def saved_names(remat: str) -> tuple[str, ...]:
    """The parts of a layer whose outputs the backward pass keeps, beside the layer's input; the rest it makes again.

    `remat` is "none" or "full"; "matmuls" or "offload" (kept in the host's memory): all of `SAVED`; or a comma list. An
    unknown name is a `ValueError`.
    """
    if remat in ("none", "matmuls", "offload"):
        return SAVED
    names = () if remat == "full" else tuple(part.strip() for part in remat.split(","))
    if unknown := [name for name in names if name not in SAVED]:
        raise ValueError(f"remat {unknown[0]!r}: it is none, full, matmuls, offload or some of {', '.join(SAVED)}")
    return names


def remat_policy(remat: str) -> Callable | None:
    """The policy of `jax.checkpoint` that keeps `saved_names`; None keeps everything."""
    names, policies = saved_names(remat), jax.checkpoint_policies
    if remat == "offload":
        settings = {"offload_src": "device", "offload_dst": "pinned_host", "names_which_can_be_saved": []}
        return policies.save_and_offload_only_these_names(names_which_can_be_offloaded=[*names], **settings)
    return None if remat == "none" else policies.save_only_these_names(*names)


def unembed(
    spec: ModelSpec, params: dict, hidden: Float[Array, "*N D"], precision: str = "float32"
) -> Float[Array, "*N V"]:
    """Logits in f32 from final hidden states, by the head or, when tied, the embedding; see `Decoder` of precision."""
    if "turned" in params.get("head", {}):
        logits = turned_product(hidden.astype(jnp.float32), params["head"]["turned"])
    else:
        tied, rounding = "head" not in params, rounding_dtype(hidden.dtype, precision)
        matrix = params["embed"]["embedding"] if tied else params["head"]["kernel"]
        form = "...D,VD->...V" if tied else "...D,DV->...V"
        logits = jnp.einsum(form, hidden.astype(rounding), matrix.astype(rounding), preferred_element_type=jnp.float32)
    return logits if spec.logit_soft_cap is None else spec.logit_soft_cap * jnp.tanh(logits / spec.logit_soft_cap)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_params(spec: ModelSpec, seed: int) -> dict:
    """Random f32 params of a model to be trained from scratch."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Decoder(spec).init(jax.random.key(seed), tokens, tokens, tokens + 1)["params"]


def abstract_params(spec: ModelSpec, dtype=jnp.float32) -> dict:
    """Shapes and dtypes of the params, without any memory."""
    tree = jax.eval_shape(lambda: init_params(spec, 0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


# A loop over tokens writes a layer's own arrays in place and reads them where they are; of stacked ones XLA's CPU
# copies every layer at every token. So caches and weights are stacked for a scan over layers, and not for such a loop.


def init_cache(spec: ModelSpec, batch: int, slots: int, dtype, *, stacked: bool) -> dict:
    """An empty one: "layers", positions and segment_ids [B, S] int32; segment 0, which no real token looks at.

    "layers" is k [L, B, K, H, S] and v [L, B, K, S, H], or a list of the same of each layer, without its axis.
    """
    shapes = {"k": (spec.head_dim, slots), "v": (slots, spec.head_dim)}

    def zeros(*rows: int) -> dict:
        of = {name: (*rows, spec.num_kv_heads, *shape) for name, shape in shapes.items()}
        return {name: constrain(jnp.zeros(shape, dtype), *CACHE[name][-len(shape) :]) for name, shape in of.items()}

    layers = zeros(spec.num_layers, batch) if stacked else [zeros(batch) for _ in range(spec.num_layers)]
    return {"layers": layers, **{name: jnp.zeros((batch, slots), jnp.int32) for name in Place._fields}}


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

    What is multiplied is rounded here, once. Few rows meet a turned kernel faster (`kernels.turned_product`); an
    embedding lies so by itself, and is not copied. Not to be traced: a program copies what it only hands on.
    """
    params = variables["params"]
    head = params["head"]["kernel"].T if "head" in params else params["embed"]["embedding"]
    unstacked = {
        name: collection | {"layers": _unstack_layers(collection["layers"], rounding)}
        for name, collection in variables.items()
        if collection
    }
    return unstacked | {"params": unstacked["params"] | {"head": {"turned": head.astype(rounding)}}}


@functools.partial(jax.jit, static_argnums=1)
def _unstack_layers(layers: dict, rounding: jnp.dtype) -> dict:
    def layer(i):
        flat = {}
        for (*module, name), leaf in flatten_dict(layer_of(layers, i)).items():
            if name == "kernel":
                name, leaf = "turned", leaf.T
            flat[*module, name] = leaf.astype(rounding) if name in ("turned", "a", "b") else leaf
        return unflatten_dict(flat)

    return {str(i): layer(i) for i in range(len(jax.tree.leaves(layers)[0]))}


def layer_of(layers: dict, index: int) -> dict:
    """One layer of "layers", stacked ones or those of `unstack_weights`."""
    return layers[str(index)] if str(index) in layers else jax.tree.map(lambda leaf: leaf[index], layers)
