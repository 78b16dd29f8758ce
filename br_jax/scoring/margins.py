"""Refusal margins: how far a model is from refusing a prompt, in seconds, where a score of answers takes minutes.

The margin is the log-odds that an answer's first token is one that refusals begin with (Arditi et al. 2024, arXiv
2406.11717, section 2.3, the refusal metric). It moves smoothly where a harmful score of a few hundred prompts jumps by
chance.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from br_jax.adapters.lora import Adapter
from br_jax.core.hosts import fetch
from br_jax.core.mesh import mesh_of, place, whole_batch
from br_jax.data.batches import encode
from br_jax.data.rows import Row
from br_jax.inference.generate import begin, encode_prompts, pad_prompts, prefill, shared_beginning, with_adapters
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.model import Model


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
    """log P(first token in `refusing`) - log P(any other), of each prompt in order; f32, natural logarithms.

    Args:
        prompts: as for `inference.generate.generate`.
        refusing: token ids, of `refusing_tokens`.
        adapter: put on the base.
        batch_size: prompts run together.
    """
    encoded, mesh = encode_prompts(model, prompts), mesh_of(model.params)
    size, by_length = whole_batch(batch_size, mesh), sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    variables = with_adapters(model, [adapter], mesh)
    counts = np.isin(np.arange(model.spec.vocab_size), refusing)
    margins = np.empty(len(encoded), np.float32)
    if not encoded:
        return margins
    shared = shared_beginning(encoded)
    begun = begin(model.decoder, variables, shared)
    for first in range(0, len(encoded), size):
        some = by_length[first : first + size]
        batch = place(pad_prompts({i: encoded[i][len(shared) :] for i in some}, size), mesh)
        found = fetch(_log_odds(model.decoder, variables, begun, batch["tokens"], batch["lengths"], counts))
        margins[some] = np.asarray(found)[: len(some)]
    return margins


@functools.partial(jax.jit, static_argnums=0)
def _log_odds(
    decoder: Decoder, variables, begun, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], counts: Bool[Array, " V"]
) -> Float[Array, " B"]:
    hidden, _ = prefill(decoder, variables, begun, tokens, lengths)
    logits = unembed(decoder.spec, variables["params"], hidden, decoder.matmul_precision)
    within, beyond = (jax.nn.logsumexp(logits, axis=-1, where=some) for some in (counts, ~counts))
    return within - beyond
