"""Answers of models to prompts, through a store: each is generated once."""

import itertools
from collections.abc import Mapping, Sequence

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.records import key_of
from br_jax.core.store import Store
from br_jax.data.rows import Row
from br_jax.inference.generate import decode_answer, encode_prompts, generate_batches
from br_jax.models.model import Model


def answer(
    model: Model,
    prompts: Sequence[str | Row],
    adapters: Mapping[str, Adapter | None],
    store: Store,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
    together: int = 1,
    name: str = "answer",
) -> dict[str, list[str]]:
    """Answers of a base with each of several adapters; those that the store holds are not generated again.

    Args:
        prompts: as for `generate`; equal ones are answered once.
        adapters: by a name for the progress bar; None is the base alone.
        temperature, seed: as for `generate`; without them answers are greedy.
        store: answers are added to it batch by batch, keyed by base, adapter, prompt (as tokens) and settings.
        together: how many adapters of the same targets are run in one pass; the rows of a batch are divided among them.
        name: what is answered, for the progress bar.

    Returns:
        {name of the adapter: its answers, in the order of prompts}.
    """
    encoded = [tuple(ids) for ids in encode_prompts(model, prompts)]
    texts = {ids: _text(prompt) for ids, prompt in zip(encoded, prompts, strict=True)}
    unique, keys = list(texts), {}
    for label, adapter in adapters.items():
        source = model.key, lora.fingerprint(adapter) if adapter else "", max_new_tokens
        source += (temperature, seed) if temperature else ()
        source += (sorted(model.stop_tokens),) if len(model.stop_tokens) > 1 else ()
        keys[label] = {ids: key_of(*source, ids) for ids in unique}
    for group in _groups(adapters, together):
        places = [(a, i) for a in range(len(group)) for i in range(len(unique))]
        held = store.holds([keys[group[a]][unique[i]] for a, i in places])
        for batch in generate_batches(
            model,
            unique,
            [adapters[label] for label in group],
            stops=model.stop_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            name=f"{', '.join(group)}: {name}",
            known=set(itertools.compress(places, held)),
        ):
            records = {}
            for (a, i), row in batch.items():
                records[keys[group[a]][unique[i]]] = {
                    "model": model.fingerprint[:12],
                    "adapter": group[a] if adapters[group[a]] else "",
                    "prompt": texts[unique[i]],
                    "answer": decode_answer(model, row),
                }
            store.add(records)
    return {label: [store[keys[label][ids]]["answer"] for ids in encoded] for label in adapters}


def _groups(adapters: Mapping[str, Adapter | None], together: int) -> list[list[str]]:
    """Names of adapters that can be run in one pass, at most `together` of them."""
    by_targets: dict[tuple, list[str]] = {}
    for label, adapter in adapters.items():
        targets = (label,) if adapter is None else tuple(sorted(adapter.weights))
        by_targets.setdefault(targets, []).append(label)
    return [names[i : i + together] for names in by_targets.values() for i in range(0, len(names), together)]


def _text(prompt: str | Row) -> str:
    if isinstance(prompt, str):
        return prompt
    asked = next(text for role, text in reversed(prompt.turns) if role == "user")
    return f"{asked}\n{prompt.input}" if prompt.input else asked
