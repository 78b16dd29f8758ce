"""Answers forty prompts into a store, to be killed: python killed_run.py FILE."""

import sys

import jax

from br_jax.inference.answers import answer
from br_jax.models.decoder import init_params
from br_jax.models.model import make_model
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.store import Store

SPEC = ModelSpec(
    vocab_size=264, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffw_dim=40, max_length=128
)

if __name__ == "__main__":
    model = make_model(SPEC, init_params(SPEC, jax.random.key(0)), byte_tokenizer(), "tiny", "chat")
    prompts = [f"{'count ' * (i % 5)}to {i}" for i in range(40)]
    answer(model, prompts, {"base": None}, Store(sys.argv[1]), max_new_tokens=60, batch_size=4)
