"""A model's own answers as training rows (self-distillation), kept in a file so that they are made once."""

import json
import pathlib
import re
from collections.abc import Sequence

from br_jax.evaluation.generate import generate
from br_jax.files import write_text
from br_jax.models.model import Model
from br_jax.training.metrics import read_jsonl


def self_answers(model: Model, prompts: Sequence[str], path: pathlib.Path, *, max_new_tokens: int) -> dict[str, str]:
    """Greedy answers to prompts; those that the file holds from this model are read, the others added to it.

    An answer that ran into the limit is cut after its last whole sentence, so that what is learnt from it does not
    stop in mid-air.

    Args:
        model: who answers.
        prompts: instructions; repeated ones are answered once.
        path: JSONL file; each line says which model gave it.
        max_new_tokens: longest answer, in tokens.

    Returns:
        Prompt -> answer (may be empty).
    """
    source = f"{model.fingerprint}/{model.template}/{max_new_tokens}"
    known = {r["prompt"]: r["answer"] for r in read_jsonl(path) if r["source"] == source}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if missing:
        answers = generate(model, missing, max_new_tokens=max_new_tokens, name="distill")
        new = dict(zip(missing, (whole_sentences(answer) for answer in answers), strict=True))
        known |= new
        lines = [json.dumps({"source": source, "prompt": p, "answer": a}, ensure_ascii=False) for p, a in known.items()]
        write_text(path, "\n".join(lines) + "\n")
    return known


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end; all of it when it has none."""
    text = text.strip()
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)|[.!?][\"')](?=\s|$)", text)]
    # "1." begins a list item, it ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\s)\d+\.$", text[:end])]
    return text[: ends[-1]] if ends else text
