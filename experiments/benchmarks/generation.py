"""Greedy answers to a batch of prompts, ours against transformers' `generate`: the same tokens, how fast?"""

import numpy as np

from benchmarks.inputs import HERE, Setup, require_torch
from benchmarks.pairing import Contender
from benchmarks.report import Case
from br_jax.data.rows import Row
from br_jax.inference.generate import encode_prompt, generate_ids
from br_jax.provider import load_model


def cases(setup: Setup) -> list[Case]:
    """One batch of prompts, answered at length and in one token, as FA's are."""
    require_torch("generation")
    return [_case("generation", setup, setup.new_tokens), _case("one token", setup, 1)]


def _case(name: str, setup: Setup, new: int) -> Case:
    """No token ends an answer early, on neither side."""
    ours = {"model": setup.model, "rows": setup.prompt_rows, "new": new}
    other = {
        "model": setup.exported["model"],
        "prompts": setup.exported["prompts"],
        "new": new,
        "threads": setup.threads,
        "dtype": setup.model["dtype"],
        "precision": setup.model["matmul_precision"],
    }
    return Case(
        name,
        f"{setup.model['source']}, {setup.model['dtype']}, products in {setup.model['matmul_precision']}, one batch of "
        f"{setup.prompts} prompts in template {setup.model['template']}, {new} new tokens each, greedy, EOS ends "
        f"nothing; transformers' generate with left padding, KV cache and sdpa attention on {setup.threads} threads "
        "(bf16 products by autocast); tokens are the new ones",
        [
            Contender("br_jax", HERE / "generation.py", "answer", ours),
            Contender("transformers", HERE / "torch_generation.py", "answer", other),
        ],
        "token",
        same_tokens,
    )


def same_tokens(outcomes: dict[str, list[dict]]) -> list[str]:
    """Says whether the answers are the same, and if not, whether the first difference of each is a tie of logits."""
    first, other = (units[0] for units in outcomes.values())
    ours, theirs = first["tokens"], other["tokens"]
    same = ours == theirs
    differing = np.flatnonzero(~same.all(axis=1))
    lines = [f"answers that are the same token for token: {len(ours) - len(differing)} of {len(ours)}"]
    for i in differing:
        at = int(np.argmin(same[i]))
        gap = other["gaps"][i, at]
        told = "a tie within 1e-4" if gap < 1e-4 else "no tie"
        lines.append(f"prompt {i} differs from token {at} on: the two likeliest logits are {gap:.1e} apart: {told}")
    return lines


def answer(model: dict, rows: list[Row], new: int):
    """A contender's work: all prompts in one batch, every time; its outcome the token ids [prompts, new]."""
    base = load_model(**model)
    encoded = [encode_prompt(base, row) for row in rows]

    def unit(index: int):
        out = generate_ids(base, encoded, stops=(), max_new_tokens=new, batch_size=len(encoded))
        return len(encoded) * new, {"tokens": np.stack(out)}

    return unit
