"""Refusal margins against the logits of transformers; perplexity against float64 numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from br_jax.adapters import lora
from br_jax.adapters.lora import fold
from br_jax.core.mesh import make_mesh, shard
from br_jax.data.rows import Row
from br_jax.inference.generate import encode_prompt
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.io.hf import write_hf
from br_jax.scoring.likelihoods import perplexity, refusal_margins, refusing_tokens, row_losses
from br_jax.scoring.suite import Suite, evaluate

torch = pytest.importorskip("torch", reason="the oracle")
from transformers import AutoModelForCausalLM  # noqa: E402

PROMPTS = ["Why?", "How do I oil a hinge that squeaks?", "Name one.", "a" * 30, "Who?"]
ALIKE = [f"Tell me, if you can: {prompt}" for prompt in PROMPTS]  # what they begin with is run once


def row(answer):
    return Row((("user", "Why?"), ("assistant", answer)))


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE])
def test_margins_are_log_odds_of_the_first_token(tmp_path, tiny, make_adapter, prompts):
    adapter, refusing = make_adapter("user"), (5, 97, 200)
    write_hf(tmp_path, tiny.spec, fold(tiny.params, adapter), tiny.tokenizer)
    theirs, expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), []
    for prompt in prompts:
        logits = theirs(torch.tensor([encode_prompt(tiny, prompt)])).logits[0, -1].detach().numpy().astype(np.float64)
        p = np.exp(logits - logits.max())
        expected.append(np.log(p[[*refusing]].sum()) - np.log(np.delete(p, refusing).sum()))
    found = refusal_margins(tiny, prompts, refusing, adapter, batch_size=2)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    if prompts is ALIKE:
        spread = dataclasses.replace(tiny, params=shard(tiny.params, make_mesh(2, 2, 2)))
        np.testing.assert_allclose(refusal_margins(spread, prompts, refusing, adapter), expected, rtol=1e-4)
    assert refusal_margins(tiny, [], refusing).shape == (0,)
    assert np.abs(refusal_margins(tiny, prompts, refusing) - found).max() > 1e-3


def test_refusing_tokens_begin_refusals_rather_than_answers(tiny):
    refusals = [row(text) for text in ("I won't.", "I can't.", "Sorry.", "Never.")]
    benign = [row(text) for text in ("I did.", "I was.", "I am.", "Never mind.", "Because.")]
    letters = [tiny.tokenizer.convert_tokens_to_ids(letter) for letter in "SN"]
    assert refusing_tokens(tiny, refusals, benign) == tuple(sorted(letters))


def test_perplexity_and_the_losses_of_rows_are_numpy_s(tiny, rows, make_adapter):
    adapter = make_adapter("user")
    variables = {"params": tiny.params, "lora": lora.collection(adapter)}
    length, means, total, count = 48, [], 0.0, 0
    forward = jax.jit(
        lambda tokens: Decoder(tiny.spec).apply(variables, tokens, jnp.arange(length)[None], tokens * 0 + 1)[0]
    )
    for row in rows:
        (_, question), (_, answer) = row.turns
        prompt = [*question.encode(), tiny.tokenizer.convert_tokens_to_ids("<sep>")]
        ids = [*prompt, *answer.encode(), tiny.tokenizer.eos_token_id]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        log_p = log_softmax(np.float64(unembed(tiny.spec, tiny.params, forward(tokens))[0]), axis=-1)
        losses = [-log_p[i - 1, ids[i]] for i in range(len(prompt), len(ids))]
        total, count, means = total + sum(losses), count + len(losses), [*means, np.mean(losses)]
    assert perplexity(tiny, rows, adapter) == pytest.approx(np.exp(total / count), rel=1e-4)
    assert evaluate(tiny, Suite(health=rows), adapter)["perplexity"] == perplexity(tiny, rows, adapter)
    np.testing.assert_allclose(sorted(row_losses(tiny, rows, adapter)), sorted(means), rtol=1e-4)
    assert len(row_losses(tiny, rows, adapter, max_length=8)) < len(rows), "rows too long for an answer are left out"
