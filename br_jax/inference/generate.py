"""Batched generation with a KV cache: rows are answered together, and one that ends makes room for another."""

import collections
import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from br_jax.adapters.lora import Adapter, collection, fingerprint, fold, pad_rank
from br_jax.core.bounds import BATCH, SEED, TOKENS, Bound, require
from br_jax.core.errors import UserError
from br_jax.core.hosts import fetch
from br_jax.core.mesh import mesh_of, shard, whole_batch
from br_jax.core.progress import progress
from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.core.threads import side_by_side
from br_jax.data.batches import shared_prefix
from br_jax.data.rows import Row, as_prompts
from br_jax.data.templates import render_prompt, tokenize
from br_jax.models.decoder import Decoder, init_cache, unembed, unstack_weights, write_rows
from br_jax.models.kernels import rounding_dtype
from br_jax.models.model import Model, require_model

_ALIGNED = 32  # divides a cache's slots, so that its lines begin where those of the processor's caches do
_BUCKET = 16  # divides a padded prompt's length, in tokens
_PARTS = 4  # of a stream's batch: prompts of like length, run together as soon as so many rows have ended
_STREAMS = 2  # batches that a CPU runs side by side: each alone leaves cores idle between its many small products
_ROUNDS = 16  # how many batches' worth of prompts make a queue, which is run as a whole or not at all


def generate(
    model: Model,
    prompts: Sequence[str | Row],
    adapter: Adapter | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    name: str = "generate",
) -> list[str]:
    """Answers prompts, greedily or by sampling.

    Prompts are sorted by length and run in quarters of a batch, padded to a multiple of 16 tokens; a longer beginning
    that all share (a template's header) is run once. When a quarter of the rows have ended, the next prompts take their
    place. An answer does not depend on its neighbours in the batch; a sampled one does on (seed, its prompt's index).

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
        UserError: no model, no list of prompts, a prompt without tokens or one that leaves no room for an answer in the
            model's context, or a number out of bounds.
    """
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "batch_size": batch_size}
    encoded = encode_prompts(model, prompts)
    rows = generate_ids(model, encoded, adapter, stops=model.stop_tokens, name=name, **settings)
    return [decode_answer(model, row) for row in rows]


def answer(
    model: Model,
    prompts: Sequence[str | Row],
    adapters: Mapping[str, Adapter | None],  # by a name for the progress bar; None is the base alone
    store: Store,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,
    together: int = 1,  # so many adapters of the same targets share a pass and the rows of a batch
    name: str = "answer",
) -> dict[str, list[str]]:
    """`generate` with each of several adapters, {its name: answers}; those that the store holds are not made again.

    Equal prompts are answered once. Answers are added batch by batch, by base, adapter, settings and prompt (its
    tokens; of a sampled answer its place among the prompts too, by which it is drawn).
    """
    encoded = [tuple(ids) for ids in encode_prompts(model, prompts)]
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "batch_size": batch_size}
    texts, keys, by_targets = {}, {}, collections.defaultdict(list)
    for ids, prompt in zip(encoded, prompts, strict=True):
        row = prompt if isinstance(prompt, Row) else Row((("user", prompt),))
        asked = next(text for role, text in reversed(row.turns) if role == "user")
        texts[ids] = f"{asked}\n{row.input}" if row.input else asked
    for label, adapter in adapters.items():
        source = model.key, fingerprint(adapter) if adapter else "", max_new_tokens
        source += (temperature, seed) if temperature else ()
        source += (sorted(model.stop_tokens),) if len(model.stop_tokens) > 1 else ()
        keys[label] = [key_of(*source, *([i] if temperature else []), ids) for i, ids in enumerate(texts)]
        by_targets[(label,) if adapter is None else tuple(sorted(adapter.weights))].append(label)
    unique = list(texts)
    for group in (names[i : i + together] for names in by_targets.values() for i in range(0, len(names), together)):
        places = list(itertools.product(range(len(group)), range(len(unique))))
        known = set(itertools.compress(places, store.holds([keys[group[a]][i] for a, i in places])))
        given, title = [adapters[label] for label in group], f"{', '.join(group)}: {name}"
        for batch in generate_batches(
            model, unique, given, stops=model.stop_tokens, name=title, known=known, **settings
        ):
            found = {}
            for (a, i), row in batch.items():
                of = {"model": model.fingerprint[:12], "adapter": group[a] if given[a] else ""}
                found[keys[group[a]][i]] = of | {"prompt": texts[unique[i]], "answer": decode_answer(model, row)}
            store.add(found)
    index = {ids: i for i, ids in enumerate(unique)}
    return {label: [store[keys[label][index[ids]]]["answer"] for ids in encoded] for label in adapters}


def generate_ids(
    model: Model, encoded: Sequence[Sequence[int]], adapter: Adapter | None = None, **settings
) -> list[np.ndarray]:
    """`generate` from token ids to token ids, int32[max_new_tokens]: behind one of `stops` comes the first of them.

    The settings are those of `generate_batches`.
    """
    answers = [np.empty(0, np.int32)] * len(encoded)
    for batch in generate_batches(model, encoded, [adapter], **settings):
        for (_, prompt), row in batch.items():
            answers[prompt] = row
    return answers


def generate_batches(
    model: Model,
    encoded: Sequence[Sequence[int]],
    adapters: Sequence[Adapter | None],  # None is the base alone; several have the same targets, and none is None
    *,
    stops: tuple[int, ...],  # tokens that end an answer; without any, each is `max_new_tokens` long
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 128,  # rows run together, prompts times adapters
    name: str = "generate",
    known: Collection[tuple[int, int]] = (),  # pairs that are not wanted; queues of such alone are not run
) -> Iterator[dict[tuple[int, int], np.ndarray]]:
    """Generates answers, with each of several adapters on the one base in the same pass.

    Yields {(index of the adapter, of the prompt): int32[max_new_tokens]} of rows that have ended. Prompts are cut into
    queues in their order. What a prompt shares a batch with depends on its queue, not on what is known: an answer comes
    out to the bit as in a run that was not stopped. The batch lies on the base's mesh; several processes call this
    alike, and each gets all answers.
    """
    require("max_new_tokens", max_new_tokens, TOKENS)
    require("temperature", temperature, Bound(0.0, 1e6))
    require("seed", seed, SEED)
    require("batch_size", batch_size, BATCH)
    require_ids("a stop token", stops, model)
    for i, ids in enumerate(encoded):
        if len(ids) + max_new_tokens > model.spec.max_length:
            sizes = f"{len(ids)} tokens and {max_new_tokens} new ones exceed the model's {model.spec.max_length}"
            raise UserError(f"prompt {i}: {sizes}: shorten it")
    decoder, count, known, mesh = model.decoder, len(adapters), set(known), mesh_of(model.params)
    if all((a, i) in known for a in range(count) for i in range(len(encoded))):
        return
    whole = whole_batch(max(batch_size // count, 1), mesh)
    steps_on_cpu = max_new_tokens > 1 and decoder.attention.platform == "cpu"
    streams = _STREAMS if steps_on_cpu and not mesh and whole % _STREAMS == 0 else 1
    size = whole // streams
    part = size if mesh or size % _PARTS else size // _PARTS  # on a mesh rows have their devices
    variables = with_adapters(model, adapters)
    # Other platforms copy no layers, see models.decoder.
    decoding = variables
    if steps_on_cpu:
        decoding = unstack_weights(variables, rounding_dtype(_dtype(variables), decoder.matmul_precision))
    prefix, head = run_prefix(decoder, variables, encoded, count)
    sampling = None
    if temperature > 0:
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        sampling = {"temperature": np.float32(max(temperature, 1e-6)), "key": key}
    static = {"stops": tuple(stops), "new": max_new_tokens}

    dispatching = threading.Lock()  # of streams that want the same program the first alone compiles it

    def empty(longest: int) -> dict:
        """A batch for prompts of so many tokens, see `_empty`.

        Made in the caller's thread: what a new thread of each call asked for, glibc would keep apart for it.
        """
        slots = prefix + _width(longest - prefix) + max_new_tokens
        slots = -(-slots // _ALIGNED) * _ALIGNED
        with _within(mesh):  # or the cache is first made whole on one device
            return _empty(decoder, variables, batch=count * size, slots=slots, new=max_new_tokens)

    def run(chunks: Sequence[Sequence[int]], state: dict) -> Iterator[dict[tuple[int, int], np.ndarray]]:
        """Answers prompts, ascending in length and a part of a batch each; yields those of rows that have ended."""
        waiting = collections.deque(chunks)
        answers = np.full((count, size), -1)  # the prompt that a row is the answer to
        while waiting or (answers >= 0).any():
            with _within(mesh), dispatching:
                while waiting and (answers < 0).sum(1).min() >= part:
                    chosen = waiting.popleft()
                    free = np.argsort(answers >= 0, axis=1, kind="stable")[:, :part]
                    prompts = pad_prompts({i: encoded[i][prefix:] for i in chosen}, part)
                    np.put_along_axis(answers, free, prompts["ids"][None], axis=1)
                    prompts = shard({name: np.concatenate([each] * count) for name, each in prompts.items()}, mesh)
                    rows = (free + size * np.arange(count)[:, None]).reshape(-1).astype(np.int32)
                    given = head, state, rows, prompts, sampling
                    state = _start(decoder, variables, decoding["params"], *given, **static)
                if max_new_tokens > 1:
                    least = np.int32(part if waiting else size)
                    state = _advance(decoder, decoding, state, least, sampling, count=count, **static)
            with _within(mesh):
                ended, out = map(np.asarray, fetch((state["ended"], state["out"])))
            ended = ended.reshape(count, size) & (answers >= 0)
            yield {(int(a), int(answers[a, i])): out[a * size + i] for a, i in np.argwhere(ended)}
            answers[ended] = -1

    with progress(len(encoded) * count, name, "prompt", keep=False) as bar:
        for first in range(0, len(encoded), whole * _ROUNDS):
            queue = range(len(encoded))[first : first + whole * _ROUNDS]
            wanted = {(a, i) for a in range(count) for i in queue} - known
            if not wanted:
                bar.update(len(queue) * count)
                continue
            queue = sorted(queue, key=lambda i: len(encoded[i]))
            chunks = [queue[first : first + part] for first in range(0, len(queue), part)]
            shares, longest = [chunks[k::streams] for k in range(min(streams, len(chunks)))], len(encoded[queue[-1]])
            for found in side_by_side([run(share, empty(longest)) for share in shares]):
                yield {key: row for key, row in found.items() if key in wanted}
                bar.update(len(found))


def encode_prompts(model: Model, prompts: Sequence[str | Row]) -> list[list[int]]:
    """`encode_prompt` of each; a `UserError` for what is no model, no list of prompts, or no token."""
    require_model(model, "generate")
    encoded = [encode_prompt(model, prompt, f"prompt {i}") for i, prompt in enumerate(as_prompts(prompts))]
    if not all(encoded):
        raise UserError(f"prompt {list(map(len, encoded)).index(0)} has no tokens, so nothing can follow: write a text")
    return encoded


def encode_prompt(model: Model, prompt: str | Row, name: str = "a prompt") -> list[int]:
    """Token ids of a prompt in the model's template, up to where it must answer; `name` it has in messages."""
    row = prompt if isinstance(prompt, Row) else Row(turns=(("user", prompt),), origin=name)
    return tokenize(render_prompt(row, model.template, model.tokenizer), model.template, model.tokenizer)[0]


def decode_answer(model: Model, row: np.ndarray) -> str:
    """The text of generated token ids, up to the first stop token."""
    ends = np.flatnonzero(np.isin(row, model.stop_tokens))
    return model.tokenizer.decode(row[: ends[0]] if len(ends) else row, skip_special_tokens=True)


def require_ids(name: str, ids: Sequence[int], model: Model) -> None:
    """Raises a `UserError` for a token id that the model's vocabulary does not have."""
    for token in ids:
        require(name, token, Bound(0, model.spec.vocab_size - 1))


def with_adapters(model: Model, adapters: Sequence[Adapter | None]) -> dict:
    """The model's variables; one adapter is added to its weights where all is f32, else they lie beside them."""
    held, mesh = [adapter for adapter in adapters if adapter is not None], mesh_of(model.params)
    embedding = model.params["embed"]["embedding"]
    variables = {"params": model.params}
    if mesh is None:  # an adapter as it comes from training lies on a mesh of one device: programs of their own
        held = jax.device_get(held)
    if len(adapters) > 1:
        if len(held) < len(adapters) or len({tuple(sorted(adapter.weights)) for adapter in held}) > 1:
            raise ValueError("adapters in one pass must have the same targets, and the base alone is none of them")
        rank = max(pair["a"].shape[-1] for adapter in held for pair in adapter.weights.values())
        variables["lora"] = shard(_side_by_side(held, rank), mesh)
    elif held and embedding.dtype == jnp.float32 and model.matmul_precision == "float32":
        variables = {"params": fold(model.params, held[0])}
    elif held:
        variables["lora"] = shard(collection(held[0]), mesh)
    return variables


@functools.partial(jax.jit, static_argnums=1)
def _side_by_side(adapters: list[Adapter], rank: int) -> dict:
    """The collection of several adapters, with an axis of their own behind the layers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *(collection(pad_rank(a, rank)) for a in adapters))


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

    From `run_prefix`'s cache with P slots, tokens [B, T] int32 and how many of each row are no padding: [B, D], the
    final hidden state at each prompt's last token, and the cache with P + T slots.
    """
    B, T = tokens.shape
    P = 0 if head is None else head["positions"].shape[1]

    def fill(cache, head):
        """Writes each row's slots to the first slots of as many rows of the cache."""
        batch = 1 if head.ndim > 2 else 0  # behind the layers
        rows = jnp.repeat(head, cache.shape[batch] // head.shape[batch], axis=batch)
        return jax.lax.dynamic_update_slice(cache, rows, (0,) * cache.ndim)

    cache = init_cache(decoder.spec, B, P + T, _dtype(variables), stacked=True)
    cache = cache if head is None else jax.tree.map(fill, cache, head)
    place = jnp.arange(T)[None]
    segments = (place < lengths[:, None]).astype(jnp.int32)
    hidden, cache = decoder.apply(variables, tokens, P + place + jnp.zeros_like(segments), segments, cache, P)
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0], cache


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


def run_prefix(
    decoder: Decoder, variables: dict, encoded: Sequence[Sequence[int]], count: int = 1
) -> tuple[int, dict | None]:
    """Runs once what all prompts begin with: how many tokens, and their cache, one row for each of `count` adapters.

    Each prompt keeps a token of its own. A lone prompt, and a beginning of less than `_BUCKET` tokens, are not worth
    the programs that each length needs: then there are no such tokens, and the cache is None.
    """
    length = min(shared_prefix(encoded), min(map(len, encoded)) - 1) if len(encoded) > 1 else 0
    if length < _BUCKET:
        return 0, None
    with _within(mesh_of(variables["params"])):
        return length, _run_prefix(decoder, variables, np.asarray([encoded[0][:length]] * count, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _run_prefix(decoder: Decoder, variables, prefix):
    return prefill(decoder, variables, None, prefix, jnp.full(len(prefix), prefix.shape[1]))[1]


@functools.partial(jax.jit, static_argnums=0, static_argnames=("batch", "slots", "new"), keep_unused=True)
def _empty(decoder: Decoder, variables, *, batch: int, slots: int, new: int):
    """A batch whose rows have all ended.

    {"cache": unstacked, None where one token is all; "step": int32, how many were made; of each row "token": its last,
    not run yet, "position": of that, "id": of its prompt, "count": of its tokens, "ended": bool, "out": int32[new]}.
    """
    row = dict.fromkeys(("token", "position", "id", "count"), jnp.zeros(batch, jnp.int32))
    row |= {"ended": jnp.ones(batch, bool), "out": jnp.zeros((batch, new), jnp.int32)}
    cache = init_cache(decoder.spec, batch, slots, _dtype(variables), stacked=False) if new > 1 else None
    return {"cache": cache, "step": jnp.int32(0), **row}


@functools.partial(jax.jit, static_argnums=0, static_argnames=("stops", "new"), donate_argnames="state")
def _start(decoder: Decoder, variables, unembedding, head, state, rows, prompts, sampling: dict | None, *, stops, new):
    """Runs prompts into rows of a batch that have ended, and chooses the first token of each."""
    ids = prompts["ids"]
    hidden, cache = prefill(decoder, variables, head, prompts["tokens"], prompts["lengths"])
    count = jnp.zeros_like(ids)
    token, ended = _choose(decoder, unembedding, hidden, ids, count, sampling, stops, new)
    out = jnp.full((len(ids), new), stops[0] if stops else 0, jnp.int32).at[:, 0].set(token)
    position = prompts["lengths"] + (cache["positions"].shape[1] - prompts["tokens"].shape[1])
    given = {"token": token, "position": position, "id": ids, "count": count + 1}
    given |= {"ended": ended | (ids < 0), "out": out}
    put = {n: each if each.shape == state[n].shape else state[n].at[rows].set(each) for n, each in given.items()}
    return state | put | ({} if state["cache"] is None else {"cache": write_rows(state["cache"], cache, rows)})


@functools.partial(jax.jit, static_argnums=0, static_argnames=("count", "stops", "new"), donate_argnames="state")
def _advance(decoder: Decoder, variables, state, least, sampling: dict | None, *, count: int, stops, new: int):
    """Goes on until `least` rows of each of `count` adapters have ended."""
    # All rows write to the same slot. The cache's last `new` take turns: none comes again before its writer has ended.
    first = state["cache"]["positions"].shape[1] - new

    def more(state):
        return state["ended"].reshape(count, -1).sum(1).min() < least

    def advance(state):
        token, position, ended = state["token"], state["position"], state["ended"]
        slot = first + state["step"] % new
        hidden, cache = decode(decoder, variables, token, position, state["cache"], slot)
        token, ends = _choose(decoder, variables["params"], hidden, state["id"], state["count"], sampling, stops, new)
        here = (jnp.arange(new)[None] == state["count"][:, None]) & ~ended[:, None]
        moved = {"position": position + 1, "count": state["count"] + 1, "ended": ended | ends, "token": token}
        out = jnp.where(here, token[:, None], state["out"])
        return state | moved | {"cache": cache, "step": state["step"] + 1, "out": out}

    return jax.lax.while_loop(more, advance, state)


def _likeliest(logits):
    """[B] int32, as `argmax` of [B, V]: of parts first, for XLA's CPU finds maxima fast and their places slowly."""
    parts = logits.T.reshape(-1, math.gcd(logits.shape[-1], 512), len(logits))
    best = jnp.argmax(parts.max(axis=1), axis=0).astype(jnp.int32)
    within = jnp.take_along_axis(parts, best[None, None], axis=0)[0]
    return best * parts.shape[1] + jnp.argmax(within, axis=0).astype(jnp.int32)


def _choose(decoder: Decoder, params, hidden, ids, count, sampling: dict | None, stops: tuple[int, ...], new: int):
    """The next token of each row, which has `count` of `new`, and whether it is its last."""
    logits = unembed(decoder.spec, params, hidden, decoder.matmul_precision)
    if sampling is None:
        on_cpu = decoder.attention.platform == "cpu"  # elsewhere a vocabulary may lie on several devices
        token = _likeliest(logits) if on_cpu else jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:

        def key_of(i, t):
            return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(sampling["key"]), i), t)

        keys = jax.vmap(key_of)(ids.astype(jnp.uint32), count)
        token = jax.vmap(jax.random.categorical)(keys, logits / sampling["temperature"]).astype(jnp.int32)
    return token, jnp.isin(token, jnp.asarray(stops, jnp.int32)) | (count + 1 >= new)
