"""Refusal margins against the logits of transformers."""

import dataclasses

import numpy as np
import pytest

from br_jax.adapters.lora import fold
from br_jax.core.mesh import make_mesh, place
from br_jax.data.rows import Row
from br_jax.inference.generate import encode_prompt
from br_jax.models.io.hf import write_hf
from br_jax.scoring.likelihoods import refusal_margins, refusing_tokens

torch = pytest.importorskip("torch", reason="the oracle")
from transformers import AutoModelForCausalLM  # noqa: E402

PROMPTS = ["Why?", "How do I oil a hinge that squeaks?", "Name one.", "a" * 30, "Who?"]
ALIKE = [f"Tell me: {prompt}" for prompt in PROMPTS]  # what they begin with is run once


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
    spread = dataclasses.replace(tiny, params=place(tiny.params, make_mesh(2, 2, 2)))
    np.testing.assert_allclose(refusal_margins(spread, prompts, refusing, adapter), expected, rtol=1e-4)
    assert refusal_margins(tiny, [], refusing).shape == (0,)
    assert np.abs(refusal_margins(tiny, prompts, refusing) - found).max() > 1e-3


def test_refusing_tokens_begin_refusals_rather_than_answers(tiny):
    refusals = [row(text) for text in ("I won't.", "I can't.", "Sorry.", "Never.")]
    benign = [row(text) for text in ("I did.", "I was.", "I am.", "Never mind.", "Because.")]
    letters = [tiny.tokenizer.convert_tokens_to_ids(letter) for letter in "SN"]
    assert refusing_tokens(tiny, refusals, benign) == tuple(sorted(letters))
