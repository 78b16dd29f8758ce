"""Greedy answers to a batch of prompts, ours against transformers' `generate`: the same tokens, how fast?"""

import numpy as np

from benchmarks.inputs import HERE, Setup, require_torch
from benchmarks.pairing import Contender
from benchmarks.report import Case
from br_jax.data.rows import Row
from br_jax.inference.generate import encode_prompt, generate_ids
from br_jax.provider import load_model


def cases(setup: Setup) -> list[Case]:
    """A batch answered at length and in one token, as FA's are; batches that end by themselves; a task of labels."""
    require_torch("generation")
    count, new = setup.prompts, setup.new_tokens
    stops = setup.exported["stops"]
    return [
        _case("generation", setup, count, new, ()),
        _case("one token", setup, count, 1, ()),
        _case("own ends", setup, 4 * count, new, stops),
        _case("labels", setup, len(setup.prompt_rows), 1, ()),
    ]


def _case(name: str, setup: Setup, count: int, new: int, stops: tuple[int, ...]) -> Case:
    """`count` prompts in batches of `setup.prompts`; without stops no token ends an answer, on neither side."""
    shared = {"new": new, "stops": stops, "batch": setup.prompts}
    ours = {"model": setup.model, "rows": setup.prompt_rows[:count]}
    other = {
        "model": setup.exported["model"],
        "prompts": setup.exported["prompts"][:count],
        "threads": setup.threads,
        "dtype": setup.model["dtype"],
        "precision": setup.model["matmul_precision"],
    }
    return Case(
        name,
        f"{setup.model['source']}, {setup.model['dtype']}, products in {setup.model['matmul_precision']}, {count} "
        f"prompts in template {setup.model['template']}, batches of {setup.prompts}, "
        f"{'at most ' if stops else ''}{new} new tokens each, greedy{'' if stops else ', EOS ends nothing'}; "
        "transformers' generate with prompts sorted by length, left padding, KV cache and sdpa attention on "
        f"{setup.threads} threads (bf16 products by autocast)",
        [
            Contender("br_jax", HERE / "generation.py", "answer", ours | shared),
            Contender("transformers", HERE / "torch_generation.py", "answer", other | shared),
        ],
        "answer",
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


def answer(model: dict, rows: list[Row], new: int, stops: tuple[int, ...], batch: int):
    """A contender's work: all prompts, every time; its outcome the token ids [prompts, new]."""
    base = load_model(**model)
    encoded = [encode_prompt(base, row) for row in rows]

    def unit(index: int):
        out = generate_ids(base, encoded, stops=stops, max_new_tokens=new, batch_size=batch)
        return len(encoded), {"tokens": np.stack(out)}

    return unit
