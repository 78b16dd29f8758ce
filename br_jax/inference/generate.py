"""Batched generation with a KV cache: prompts run in parts of a batch of like length, then answered all together."""

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from br_jax.adapters.lora import Adapter, collection, fold, pad_rank
from br_jax.data.batches import shared_prefix
from br_jax.data.rows import Row
from br_jax.data.templates import render_prompt, tokenize
from br_jax.distributed import fetch
from br_jax.errors import UserError
from br_jax.models.cache import init_cache, init_unstacked_cache, unstack_weights, write_rows
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.model import Model
from br_jax.models.precision import rounding_dtype
from br_jax.progress import progress
from br_jax.sharding import mesh_of, place, platform, whole_batch

_ALIGNED = 32  # what divides a cache's slots, so that its lines begin where those of the processor's caches do
_BUCKET = 16  # what divides a padded prompt's length, in tokens
_PARTS = 4  # of a batch, sorted by length, that are padded to a width of their own


def generate(
    model: Model,
    prompts: Sequence[str | Row],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    name: str = "generate",
) -> list[str]:
    """Answers prompts, greedily or by sampling.

    Prompts are sorted by length, and each quarter of a batch is padded to a multiple of 16 tokens; tokens that all of
    them begin with (a template's header) are run once. A prompt's answer does not depend on its neighbours in the
    batch, and a sampled one only on (seed, its index).

    Args:
        prompts: instructions, put into the model's template; a `Row` may carry an input or earlier turns.
        adapter: put on the base (see `adapters.lora.stack` for several).
        max_new_tokens: longest answer, in tokens.
        temperature: 0 takes the likeliest token; above, logits are divided by it and sampled.
        batch_size: prompts run together; the last batch is filled up, so there is one shape a width.

    Returns:
        One answer a prompt, in order, without EOS and special tokens.

    Raises:
        UserError: a prompt that leaves no room for an answer in the model's context.
    """
    rows = generate_ids(
        model,
        [encode_prompt(model, prompt) for prompt in prompts],
        adapter,
        stops=model.stop_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        name=name,
    )
    return [decode_answer(model, row) for row in rows]


def generate_ids(
    model: Model, encoded: Sequence[Sequence[int]], adapter: Adapter | None = None, **settings
) -> list[np.ndarray]:
    """`generate` from token ids (of `encode_prompt`) to token ids, int32[max_new_tokens] for each prompt.

    Behind one of `stops` comes the first of them. The settings are those of `generate_batches`.
    """
    answers = [np.empty(0, np.int32)] * len(encoded)
    for batch in generate_batches(model, encoded, [adapter], **settings):
        for (_, prompt), row in batch.items():
            answers[prompt] = row
    return answers


def generate_batches(
    model: Model,
    encoded: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],
    *,
    stops: tuple[int, ...],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    name: str = "generate",
    known: Collection[tuple[int, int]] = (),
) -> Iterator[dict[tuple[int, int], np.ndarray]]:
    """Generates batch by batch, with each of several adapters on the one base in the same pass.

    Which prompts share a batch, and how it is padded, is a function of all prompts, whatever is known already: an
    answer comes out to the bit as in a run that was not stopped. Where the base lies on a mesh, so does the batch; on
    several processes all of them call this alike, and each gets all answers.

    Args:
        adapters: None is the base alone; several must have the same targets, and None cannot be among them.
        stops: tokens that end an answer; without any, every answer is `max_new_tokens` long.
        batch_size: rows run together, prompts times adapters.
        known: (index of the adapter, of the prompt) of answers that are not wanted; batches of such alone are not run.

    Yields:
        {(index of the adapter, of the prompt): int32[max_new_tokens]} of each batch.
    """
    decoder, count, known = model.decoder, len(adapters), set(known)
    for i, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > model.spec.max_length:
            told = f"{len(ids)} tokens and {max_new_tokens} new ones exceed the model's {model.spec.max_length}"
            raise UserError(f"prompt {i}: {told}: shorten it")
    if all((a, i) in known for a in range(count) for i in range(len(encoded))):
        return
    # What all prompts begin with is run once; each keeps at least one token of its own.
    mesh, prefix = mesh_of(model.params), min(shared_prefix(encoded), min(map(len, encoded)) - 1)
    size = whole_batch(max(batch_size // count, 1), mesh)
    # With several adapters all rows of one come before those of the next; on a mesh rows have their devices.
    parts = _PARTS if count == 1 and mesh is None and size % _PARTS == 0 else 1
    variables = _with_adapters(model, adapters, mesh)
    on_cpu = (jax.default_backend() if mesh is None else platform(mesh)) == "cpu"  # elsewhere nothing is copied
    decoding = _unstack(decoder, variables) if on_cpu and max_new_tokens > 1 else variables
    head = np.asarray([encoded[0][:prefix]] * count, np.int32)
    begun = _begin(decoder, variables, head) if prefix else None
    sampling = {
        "greedy": temperature == 0,
        "temperature": np.float32(max(temperature, 1e-6)),
        "key": np.asarray(jax.random.key_data(jax.random.key(seed))),
    }

    def run(chosen, wanted):
        """[adapters, size, new] answers to at most `size` prompts; a row that is not wanted ends at once."""
        prompts = [*chosen, *[-1] * (size - len(chosen))]
        ids = np.asarray([i if (a, i) in wanted else -1 for a in range(count) for i in prompts], np.int32)
        rows = [[encoded[i][prefix:] for i in part if i >= 0] for part in np.split(np.asarray(prompts), parts)]
        padded = [_pad(part, size // parts) for part in rows]
        slots = prefix + max(tokens.shape[1] for tokens, _ in padded) + max_new_tokens
        slots = -(-slots // _ALIGNED) * _ALIGNED
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            cache, hidden = _empty(decoder, variables, batch=count * size, slots=slots), []
            for part, (tokens, lengths) in enumerate(padded):
                batch = {"tokens": np.tile(tokens, (count, 1)), "lengths": np.tile(lengths, count)}
                first = np.int32(part * count * size // parts)
                last, cache = _start(decoder, variables, begun, **place(batch, mesh), cache=cache, first=first)
                hidden.append(last)
            lengths = prefix + np.tile(np.concatenate([lengths for _, lengths in padded]), count)
            batch = place({"lengths": lengths, "ids": ids}, mesh)
            settings = {"new": max_new_tokens, "stops": stops, **sampling}
            out, _ = _finish(decoder, decoding, hidden, cache, **batch, **settings)
        return np.asarray(fetch(out)).reshape(count, size, -1)

    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with progress(len(order) * count, name, "prompt", keep=False) as bar:
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            wanted = {(a, i) for a in range(count) for i in chosen} - known
            if wanted:
                rows = run(chosen, wanted)
                yield {(a, i): rows[a, at] for a in range(count) for at, i in enumerate(chosen) if (a, i) in wanted}
            bar.update(len(chosen) * count)


def encode_prompt(model: Model, prompt: str | Row) -> list[int]:
    """Token ids of a prompt in the model's template, up to where it must answer."""
    row = prompt if isinstance(prompt, Row) else Row(turns=(("user", prompt),))
    return tokenize(render_prompt(row, model.template, model.tokenizer), model.template, model.tokenizer)[0]


def decode_answer(model: Model, row: np.ndarray) -> str:
    """The text of generated token ids, up to the first stop token."""
    ends = np.flatnonzero(np.isin(row, model.stop_tokens))
    return model.tokenizer.decode(row[: ends[0]] if len(ends) else row, skip_special_tokens=True)


def _with_adapters(model: Model, adapters: Sequence[Adapter | None], mesh) -> dict:
    """The model's variables; one adapter is added to its weights where that rounds to f32, several lie beside them."""
    if len(adapters) == 1 and adapters[0] is not None and model.params["embed"]["embedding"].dtype == jnp.float32:
        return {"params": fold(model.params, adapters[0])}
    return {"params": model.params, "lora": place(_side_by_side(adapters), mesh)}


def _side_by_side(adapters: Sequence[Adapter | None]) -> dict:
    """The collection of one adapter, or of several with an axis of their own behind the layers."""
    held = [adapter for adapter in adapters if adapter is not None]
    if not held:
        return {}
    if len(adapters) == 1:
        return collection(held[0])
    if len(held) < len(adapters) or len({tuple(sorted(adapter.weights)) for adapter in held}) > 1:
        raise ValueError("adapters in one pass must have the same targets, and the base alone is none of them")
    rank = max(pair["a"].shape[-1] for adapter in held for pair in adapter.weights.values())
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *(collection(pad_rank(a, rank)) for a in held))


def _pad(rows: list[list[int]], count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` rows of a width that `_BUCKET` divides, and their lengths; those that `rows` lacks have length 1."""
    width = -(-max(map(len, rows), default=1) // _BUCKET) * _BUCKET
    tokens, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    return tokens, lengths


def prefill(decoder: Decoder, variables: dict, head: dict | None, tokens, lengths):
    """Runs prompts into a new KV cache: behind the tokens that all share, each prompt's own, padded on the right.

    Args:
        head: the stacked cache of one row an adapter, whose P slots hold what its rows begin with; None for nothing.
        tokens: [B, T] int32.
        lengths: [B] int32, tokens that are no padding.

    Returns:
        [B, D] final hidden state at each prompt's last token, and the cache with P + T slots.
    """
    B, T = tokens.shape
    P = 0 if head is None else head["positions"].shape[1]
    cache = init_cache(decoder.spec, B, P + T, _dtype(variables))
    if head is not None:
        cache = jax.tree.map(_fill, cache, head)
    place = jnp.arange(T)[None]
    segments = (place < lengths[:, None]).astype(jnp.int32)
    hidden, cache = decoder.apply(variables, tokens, P + place + jnp.zeros_like(segments), segments, cache, P)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache


def _fill(cache, head):
    """Writes each row's slots to the first slots of as many rows of the cache."""
    batch = 1 if head.ndim > 2 else 0  # behind the layers
    rows = jnp.repeat(head, cache.shape[batch] // head.shape[batch], axis=batch)
    return jax.lax.dynamic_update_slice(cache, rows, (0,) * cache.ndim)


def decode(decoder: Decoder, variables: dict, token, positions, cache: dict, slot):
    """Runs one token a row: [B] ids at [B] positions, to slot `slot` of an unstacked cache; returns as `prefill`."""
    where = positions[:, None]
    hidden, cache = decoder.apply(variables, token[:, None], where, jnp.ones_like(where), cache, slot)
    return hidden[:, 0], cache


def _dtype(variables):
    """Of what runs through the layers, and of a cache: a bf16 one XLA's CPU would turn into f32 and back at a write."""
    return variables["params"]["final_norm"]["scale"].dtype


@functools.partial(jax.jit, static_argnums=0)
def _begin(decoder: Decoder, variables, prefix):
    """The cache of what all prompts begin with, one row an adapter, [A, P]."""
    positions = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)
    cache = init_cache(decoder.spec, *prefix.shape, _dtype(variables))
    return decoder.apply(variables, prefix, positions, jnp.ones_like(positions), cache)[1]


@functools.partial(jax.jit, static_argnums=0)
def _unstack(decoder: Decoder, variables):
    return unstack_weights(variables, rounding_dtype(_dtype(variables), decoder.matmul_precision))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("batch", "slots"))
def _empty(decoder: Decoder, variables, *, batch: int, slots: int):
    return init_unstacked_cache(decoder.spec, batch, slots, _dtype(variables))


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("cache",))
def _start(decoder: Decoder, variables, head, tokens, lengths, cache, first):
    """Runs a part of the prompts into its rows of the cache; returns as `prefill`."""
    hidden, rows = prefill(decoder, variables, head, tokens, lengths)
    return hidden, write_rows(cache, rows, first)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("new", "stops", "greedy"), donate_argnames=("cache",))
def _finish(decoder: Decoder, variables, hidden, cache, lengths, ids, *, new, stops, greedy, temperature, key):
    """[B, new] int32 token ids, filled up behind a row's stop token; and the cache, whose buffers are used again.

    The last `new` slots of the cache are for the new tokens. All rows write a new token to the same slot; rope
    positions come from each row's own length, and padding is hidden by its segment 0.
    """
    slots, hidden = cache["positions"].shape[1], jnp.concatenate(hidden)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.wrap_key_data(key)))(ids.astype(jnp.uint32))

    def choose(hidden, t):
        logits = unembed(decoder.spec, variables["params"], hidden, decoder.matmul_precision)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        step_keys = jax.vmap(lambda k: jax.random.fold_in(k, t))(keys)
        return jax.vmap(jax.random.categorical)(step_keys, logits / temperature).astype(jnp.int32)

    filler = jnp.int32(stops[0] if stops else 0)

    def ends(token):
        return jnp.isin(token, jnp.asarray(stops, jnp.int32))

    def more(carry):
        t, _, done, _, _ = carry
        return (t < new) & ~jnp.all(done)

    def advance(carry):
        t, token, done, out, cache = carry
        hidden, cache = decode(decoder, variables, token, lengths + t - 1, cache, slots - new + t - 1)
        token = jnp.where(done, filler, choose(hidden, t))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, t))
        return t + 1, token, done | ends(token), out, cache

    token = choose(hidden, 0)
    out = jnp.full((len(ids), new), filler, jnp.int32).at[:, 0].set(token)
    carry = (jnp.int32(1), token, ends(token) | (ids < 0), out, cache)
    return jax.lax.while_loop(more, advance, carry)[3:]
