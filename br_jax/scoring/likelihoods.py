"""Scores from forward passes alone: refusal margins, perplexity, and the loss of each row.

A refusal margin is the log-odds that an answer's first token is one that refusals begin with (Arditi et al. 2024, arXiv
2406.11717, section 2.3, the refusal metric). It takes seconds where answers take minutes, and moves smoothly where a
harmful score of a few hundred prompts jumps by chance.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from br_jax.adapters.lora import Adapter
from br_jax.core.hosts import fetch
from br_jax.core.mesh import mesh_of, shard, whole_batch
from br_jax.data.batches import encode
from br_jax.data.rows import Row
from br_jax.inference.generate import encode_prompts, pad_prompts, prefill, require_ids, run_prefix, with_adapters
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.model import Model
from br_jax.training.batching import one_pass
from br_jax.training.loss import batch_losses


def refusing_tokens(model: Model, refusals: Sequence[Row], benign: Sequence[Row]) -> tuple[int, ...]:
    """The tokens that a larger share of refusals than of benign answers begins with, ascending."""

    def shares(rows: Sequence[Row]) -> dict[int, float]:
        examples = (encode(row, model.tokenizer, model.template) for row in rows)
        first = Counter(int(one["tokens"][np.argmax(one["answer"])]) for one in examples)
        return {token: count / len(rows) for token, count in first.items()}

    of_benign = shares(benign)
    return tuple(sorted(token for token, share in shares(refusals).items() if share > of_benign.get(token, 0.0)))


def refusal_margins(
    model: Model,
    prompts: Sequence[str | Row],
    refusing: Sequence[int],
    adapter: Adapter | None = None,
    *,
    batch_size: int = 32,
) -> Float[np.ndarray, " n"]:
    """log P(first token in `refusing`) - log P(any other), of each prompt in order; f32, natural logarithms."""
    encoded, mesh = encode_prompts(model, prompts), mesh_of(model.params)
    require_ids("a refusing token", refusing, model)
    margins, size = np.empty(len(encoded), np.float32), whole_batch(batch_size, mesh)
    if not encoded:
        return margins
    variables, by_length = with_adapters(model, [adapter]), sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    prefix, head = run_prefix(model.decoder, variables, encoded)
    counts = np.isin(np.arange(model.spec.vocab_size), refusing)
    for first in range(0, len(encoded), size):
        some = by_length[first : first + size]
        batch = shard(pad_prompts({i: encoded[i][prefix:] for i in some}, size), mesh)
        found = fetch(_log_odds(model.decoder, variables, head, batch["tokens"], batch["lengths"], counts))
        margins[some] = np.asarray(found)[: len(some)]
    return margins


@functools.partial(jax.jit, static_argnums=0)
def _log_odds(
    decoder: Decoder, variables, head, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], counts: Bool[Array, " V"]
) -> Float[Array, " B"]:
    hidden, _ = prefill(decoder, variables, head, tokens, lengths)
    logits = unembed(decoder.spec, variables["params"], hidden, decoder.matmul_precision)
    within, beyond = (jax.nn.logsumexp(logits, axis=-1, where=some) for some in (counts, ~counts))
    return within - beyond


def perplexity(model: Model, rows: Sequence[Row], adapter: Adapter | None = None, *, max_length: int = 256) -> float:
    """exp of the mean cross-entropy over the answer tokens of rows cut at `max_length` tokens, teacher-forced."""
    batches = _row_losses(model, rows, adapter, max_length)
    total, count = sum(sum(losses) for losses, _ in batches), sum(counts.sum() for _, counts in batches)
    return math.exp(float(total) / float(count))


def row_losses(
    model: Model, rows: Sequence[Row], adapter: Adapter | None = None, *, max_length: int = 256
) -> Float[np.ndarray, " n"]:
    """Each row's mean cross-entropy over its answer tokens, teacher-forced.

    Their order depends on the rows alone; those that are too long to have any answer are left out.
    """
    batches = _row_losses(model, rows, adapter, max_length, count_alike=True)
    return np.concatenate([losses[counts > 0] for losses, counts in batches])


def _row_losses(model: Model, rows: Sequence[Row], adapter: Adapter | None, max_length: int, **options) -> list[tuple]:
    """(weighted loss, summed weights) of each row, by batches of `one_pass`; numpy adds them up without programs."""
    variables, batches = with_adapters(model, [adapter]), one_pass(model, rows, max_length, **options)
    return [jax.tree.map(np.asarray, fetch(_batch_losses(model.decoder, variables, batch))) for batch in batches]


@functools.partial(jax.jit, static_argnums=0)
def _batch_losses(decoder: Decoder, variables: dict, batch: dict) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    return batch_losses(decoder, variables, batch, chunk=256)[1].sum(-1), batch["weights"].sum(-1)
