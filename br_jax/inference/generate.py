"""Batched generation with a KV cache: rows are answered together, and one that ends makes room for another."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from br_jax.adapters.lora import Adapter, collection, fold, pad_rank
from br_jax.core.bounds import BATCH, SEED, TOKENS, Bound, require
from br_jax.core.errors import UserError
from br_jax.core.hosts import fetch
from br_jax.core.mesh import mesh_of, place, platform, whole_batch
from br_jax.core.progress import progress
from br_jax.data.batches import shared_prefix
from br_jax.data.rows import Row, as_prompts
from br_jax.data.templates import render_prompt, tokenize
from br_jax.models.cache import init_cache, init_unstacked_cache, unstack_weights, write_rows
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.model import Model
from br_jax.models.precision import rounding_dtype

_ALIGNED = 32  # what divides a cache's slots, so that its lines begin where those of the processor's caches do
_BUCKET = 16  # what divides a padded prompt's length, in tokens
_PARTS = 4  # of a batch: prompts of like length, run together as soon as so many rows have ended
_ROUNDS = 16  # how many batches' worth of prompts make a queue, which is run as a whole or not at all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and which ones end an answer."""

    stops: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    greedy: bool = dataclasses.field(metadata={"static": True})
    temperature: np.ndarray  # f32[], above 0
    key: np.ndarray  # raw key data

    @property
    def filler(self) -> int:
        """What stands behind the end of an answer."""
        return self.stops[0] if self.stops else 0


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

    Prompts are sorted by length and run in quarters of a batch, each padded to a multiple of 16 tokens; tokens that all
    of them begin with (a template's header) are run once. When a quarter of the rows have ended, the next prompts take
    their place. A prompt's answer does not depend on its neighbours in the batch, and a sampled one only on (seed, its
    index).

    Args:
        prompts: instructions, put into the model's template; a `Row` may carry an input or earlier turns.
        adapter: put on the base (see `adapters.lora.stack` for several).
        max_new_tokens: longest answer, at least 1 token.
        temperature: 0 takes the likeliest token; above, up to a million, logits are divided by it and sampled.
        seed: of sampling, below 2**32.
        batch_size: prompts run together; the last batch is filled up, so there is one shape a width.

    Returns:
        One answer a prompt, in order, without EOS and special tokens.

    Raises:
        UserError: no list of prompts, one that leaves no room for an answer in the model's context, or a number out of
            bounds.
    """
    rows = generate_ids(
        model,
        encode_prompts(model, prompts),
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
    """Generates answers, with each of several adapters on the one base in the same pass.

    Prompts are cut into queues in their order, so that more of them leave the first queues as they are. What a prompt
    shares a batch with depends on its queue, not on what is known: an answer comes out to the bit as in a run that was
    not stopped. Where the base lies on a mesh, so does the batch; on several processes all of them call this alike, and
    each gets all answers.

    Args:
        adapters: None is the base alone; several must have the same targets, and None cannot be among them.
        stops: tokens that end an answer; without any, every answer is `max_new_tokens` long.
        batch_size: rows run together, prompts times adapters.
        known: (index of the adapter, of the prompt) of answers that are not wanted; queues of such alone are not run.

    Yields:
        {(index of the adapter, of the prompt): int32[max_new_tokens]} of rows that have ended.
    """
    require("max_new_tokens", max_new_tokens, TOKENS)
    require("temperature", temperature, Bound(0.0, 1e6))
    require("seed", seed, SEED)
    require("batch_size", batch_size, BATCH)
    decoder, count, known = model.decoder, len(adapters), set(known)
    for i, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > model.spec.max_length:
            told = f"{len(ids)} tokens and {max_new_tokens} new ones exceed the model's {model.spec.max_length}"
            raise UserError(f"prompt {i}: {told}: shorten it")
    if all((a, i) in known for a in range(count) for i in range(len(encoded))):
        return
    mesh, shared = mesh_of(model.params), shared_beginning(encoded)
    prefix = len(shared)
    size = whole_batch(max(batch_size // count, 1), mesh)
    part = size if mesh or size % _PARTS else size // _PARTS  # on a mesh rows have their devices
    variables = with_adapters(model, adapters, mesh)
    on_cpu = (jax.default_backend() if mesh is None else platform(mesh)) == "cpu"  # elsewhere nothing is copied
    decoding = _unstack(decoder, variables) if on_cpu and max_new_tokens > 1 else variables
    begun = begin(decoder, variables, shared, count)
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    sampling = Sampling(tuple(stops), temperature == 0, np.float32(max(temperature, 1e-6)), key)

    def run(group):
        """Answers prompts, ascending in length; yields {(adapter, prompt): its answer} of rows that have ended."""
        waiting = collections.deque(group[first : first + part] for first in range(0, len(group), part))
        slots = prefix + _width(len(encoded[group[-1]]) - prefix) + max_new_tokens
        slots = -(-slots // _ALIGNED) * _ALIGNED
        with _within(mesh):  # or the cache is first made whole on one device
            state = _empty(decoder, variables, batch=count * size, slots=slots, new=max_new_tokens)
        answers = np.full((count, size), -1)  # the prompt that a row is the answer to
        while True:
            with _within(mesh):
                while waiting and (answers < 0).sum(1).min() >= part:
                    chosen = waiting.popleft()
                    free = np.argsort(answers >= 0, axis=1, kind="stable")[:, :part]
                    prompts = pad_prompts({i: encoded[i][prefix:] for i in chosen}, part)
                    np.put_along_axis(answers, free, prompts["ids"][None], axis=1)
                    prompts = place({name: np.concatenate([each] * count) for name, each in prompts.items()}, mesh)
                    rows = (free + size * np.arange(count)[:, None]).reshape(-1).astype(np.int32)
                    state = _start(decoder, variables, decoding["params"], begun, state, rows, prompts, sampling)
                if max_new_tokens > 1:
                    least = np.int32(part if waiting else size)
                    state = _advance(decoder, decoding, state, least, sampling, count=count, new=max_new_tokens)
                ended, out = fetch((state["ended"], state["out"]))
            ended, out = np.asarray(ended).reshape(count, size) & (answers >= 0), np.asarray(out)
            yield {(int(a), int(answers[a, i])): out[a * size + i] for a, i in np.argwhere(ended)}
            answers[ended] = -1
            if not waiting and (answers < 0).all():
                return

    asked = range(len(encoded))
    with progress(len(asked) * count, name, "prompt", keep=False) as bar:
        for first in range(0, len(asked), size * _ROUNDS):
            group = sorted(asked[first : first + size * _ROUNDS], key=lambda i: len(encoded[i]))
            wanted = {(a, i) for a in range(count) for i in group} - known
            if not wanted:
                bar.update(len(group) * count)
                continue
            for found in run(group):
                yield {key: row for key, row in found.items() if key in wanted}
                bar.update(len(found))


def encode_prompts(model: Model, prompts: Sequence[str | Row]) -> list[list[int]]:
    """`encode_prompt` of each; a `UserError` for what is no list of prompts."""
    return [encode_prompt(model, prompt, f"prompt {i}") for i, prompt in enumerate(as_prompts(prompts))]


def encode_prompt(model: Model, prompt: str | Row, name: str = "a prompt") -> list[int]:
    """Token ids of a prompt in the model's template, up to where it must answer; `name` it has in messages."""
    row = prompt if isinstance(prompt, Row) else Row(turns=(("user", prompt),), origin=name)
    return tokenize(render_prompt(row, model.template, model.tokenizer), model.template, model.tokenizer)[0]


def decode_answer(model: Model, row: np.ndarray) -> str:
    """The text of generated token ids, up to the first stop token."""
    ends = np.flatnonzero(np.isin(row, model.stop_tokens))
    return model.tokenizer.decode(row[: ends[0]] if len(ends) else row, skip_special_tokens=True)


def with_adapters(model: Model, adapters: Sequence[Adapter | None], mesh) -> dict:
    """The model's variables; one adapter is added to its weights where all is f32, else they lie beside them."""
    exact = model.params["embed"]["embedding"].dtype == jnp.float32 and model.matmul_precision == "float32"
    if len(adapters) == 1 and adapters[0] is not None and exact:
        return {"params": fold(model.params, adapters[0])}
    beside = _side_by_side(adapters)
    return {"params": model.params} | ({"lora": place(beside, mesh)} if beside else {})


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


def _width(tokens: int) -> int:
    return -(-tokens // _BUCKET) * _BUCKET


def pad_prompts(prompts: dict[int, Sequence[int]], count: int) -> dict[str, np.ndarray]:
    """{"ids", "lengths": int32[count], "tokens": int32[count, a width that `_BUCKET` divides]} of prompts by their ids.

    What they lack of `count` has id -1 and length 1.
    """
    tokens = np.zeros((count, _width(max(map(len, prompts.values())))), np.int32)
    ids, lengths = np.full(count, -1, np.int32), np.ones(count, np.int32)
    for row, (i, prompt) in enumerate(prompts.items()):
        ids[row], lengths[row], tokens[row, : len(prompt)] = i, len(prompt), prompt
    return {"ids": ids, "lengths": lengths, "tokens": tokens}


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


def _within(mesh):
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()


def shared_beginning(encoded: Sequence[Sequence[int]]) -> Sequence[int]:
    """What all prompts begin with and is run once; each keeps at least one token of its own, and a lone one all."""
    if len(encoded) == 1:
        return ()  # each length would be a program of its own
    return encoded[0][: min(shared_prefix(encoded), min(map(len, encoded)) - 1)]


def begin(decoder: Decoder, variables: dict, shared: Sequence[int], count: int = 1) -> dict | None:
    """The cache of what all prompts begin with, one row an adapter, as `prefill` takes it; None for nothing."""
    if not len(shared):
        return None
    with _within(mesh_of(variables["params"])):
        return _begin(decoder, variables, np.asarray([shared] * count, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _begin(decoder: Decoder, variables, prefix):
    positions = jnp.broadcast_to(jnp.arange(prefix.shape[1]), prefix.shape)
    cache = init_cache(decoder.spec, *prefix.shape, _dtype(variables))
    return decoder.apply(variables, prefix, positions, jnp.ones_like(positions), cache)[1]


@functools.partial(jax.jit, static_argnums=0)
def _unstack(decoder: Decoder, variables):
    return unstack_weights(variables, rounding_dtype(_dtype(variables), decoder.matmul_precision))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("batch", "slots", "new"))
def _empty(decoder: Decoder, variables, *, batch: int, slots: int, new: int):
    """A batch whose rows have all ended.

    {"cache": unstacked, None where one token is all; "step": int32, how many were made; of each row "token": its last,
    not run yet, "position": of that, "id": of its prompt, "count": of its tokens, "ended": bool, "out": int32[new]}.
    """
    row = dict.fromkeys(("token", "position", "id", "count"), jnp.zeros(batch, jnp.int32))
    row |= {"ended": jnp.ones(batch, bool), "out": jnp.zeros((batch, new), jnp.int32)}
    cache = init_unstacked_cache(decoder.spec, batch, slots, _dtype(variables)) if new > 1 else None
    return {"cache": cache, "step": jnp.int32(0), **row}


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def _start(decoder: Decoder, variables, unembedding, head, state, rows, prompts, sampling: Sampling):
    """Runs prompts into rows of a batch that have ended, and chooses the first token of each."""
    ids, new = prompts["ids"], state["out"].shape[1]
    hidden, cache = prefill(decoder, variables, head, prompts["tokens"], prompts["lengths"])
    count = jnp.zeros_like(ids)
    token, ended = _choose(decoder, unembedding, hidden, ids, count, new, sampling)
    out = jnp.full((len(ids), new), sampling.filler, jnp.int32).at[:, 0].set(token)
    position = prompts["lengths"] + (cache["positions"].shape[1] - prompts["tokens"].shape[1])
    given = {
        "token": token,
        "position": position,
        "id": ids,
        "count": count + 1,
        "ended": ended | (ids < 0),
        "out": out,
    }
    put = {n: each if each.shape == state[n].shape else state[n].at[rows].set(each) for n, each in given.items()}
    return state | put | ({} if state["cache"] is None else {"cache": write_rows(state["cache"], cache, rows)})


@functools.partial(jax.jit, static_argnums=0, static_argnames=("count", "new"), donate_argnames="state")
def _advance(decoder: Decoder, variables, state, least, sampling: Sampling, *, count: int, new: int):
    """Goes on until `least` rows of each of `count` adapters have ended.

    All rows write a new token to the same slot: the last `new` slots of the cache take turns, and none is taken again
    before who wrote to it has ended. Rope positions are each row's own, and padding is hidden by its segment 0.
    """
    first = state["cache"]["positions"].shape[1] - new

    def more(state):
        return state["ended"].reshape(count, -1).sum(1).min() < least

    def advance(state):
        token, position, ended = state["token"], state["position"], state["ended"]
        slot = first + state["step"] % new
        hidden, cache = decode(decoder, variables, token, position, state["cache"], slot)
        token, ends = _choose(decoder, variables["params"], hidden, state["id"], state["count"], new, sampling)
        here = (jnp.arange(new)[None] == state["count"][:, None]) & ~ended[:, None]
        moved = {"position": position + 1, "count": state["count"] + 1, "ended": ended | ends, "token": token}
        out = jnp.where(here, token[:, None], state["out"])
        return state | moved | {"cache": cache, "step": state["step"] + 1, "out": out}

    return jax.lax.while_loop(more, advance, state)


def _choose(decoder: Decoder, params, hidden, ids, count, new: int, sampling: Sampling):
    """The next token of each row, which has `count` of `new`, and whether it is its last."""
    logits = unembed(decoder.spec, params, hidden, decoder.matmul_precision)
    if sampling.greedy:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:

        def key_of(i, t):
            return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(sampling.key), i), t)

        keys = jax.vmap(key_of)(ids.astype(jnp.uint32), count)
        token = jax.vmap(jax.random.categorical)(keys, logits / sampling.temperature).astype(jnp.int32)
    return token, jnp.isin(token, jnp.asarray(sampling.stops, jnp.int32)) | (count + 1 >= new)
