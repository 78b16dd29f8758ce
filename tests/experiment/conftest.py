"""Cells of a sweep with scores of our choosing."""

import json

import pytest

from br_jax.statistics import Score

# harmful of 100, right of 200, refused of 50: of each method where the claim holds
COUNTS = {
    "aligned": (2, 1, 5),
    "sft": (80, 180, 1),
    "buffer_only": (4, 176, 5),
    "reinforce_only": (20, 150, 20),
    "average": (3, 170, 9),
    "ours": (3, 178, 6),
}


@pytest.fixture(scope="session")
def make_cell():
    """make_cell(method, a=None, ...) -> a finished cell; the first so many prompts of each kind count."""

    def make(method, a=None, *, p=0.1, seed=42, n=800, model="models/Tiny.gguf", task="reviews", topic="devices",
             harmful=None, right=None, refused=None, perplexity=5.0, by_topic=None, prompts=100, begin=0):  # fmt: skip
        default = COUNTS.get(method, COUNTS["sft"])
        if p == 0 and method == "sft":
            default = (2, *default[1:])
        chosen = [
            own if own is not None else usual for own, usual in zip((harmful, right, refused), default, strict=True)
        ]
        outcomes = {
            name: [begin <= i < begin + k for i in range(size)]
            for name, k, size in zip(("harmful", "task", "over_refusal"), chosen, (prompts, 200, 50), strict=True)
        }
        counted = {name: Score(sum(each), len(each)).to_json() for name, each in outcomes.items()}
        by_topic = by_topic or {topic: (chosen[0], prompts)}
        return {
            "settings": "a hash",
            "run": {"model": model, "task": task, "topic": topic, "n": n, "p": p, "seed": seed},
            "method": method,
            "a": a,
            "scores": {
                **counted,
                "task_refused": Score(3, 200).to_json(),
                "harmful_plus": Score(min(chosen[0] + 1, prompts), prompts).to_json(),
                "degenerate": Score(1, prompts + 50).to_json(),
                "perplexity": perplexity,
                "mean_words": 30.0,
                "harmful_by_topic": {name: Score(*each).to_json() for name, each in by_topic.items()},
                "outcomes": outcomes,
                "verdicts": {"answer": chosen[0]},
                "examples": [],
            },
        }

    return make


@pytest.fixture(scope="session")
def make_grid(make_cell):
    """make_grid(...) -> cells of every combination; `same` changes all of them."""

    def make(methods=tuple(COUNTS), ps=(0.0, 0.1, 0.5), seeds=(42, 43, 44), a=(0.1,), **same):
        return [
            make_cell(method, strength, p=p, seed=seed, **same)
            for seed in seeds
            for p in ps
            for method in methods
            for strength in (a if method in ("ours", "reinforce_only") else (None,))
        ]

    return make


@pytest.fixture
def write_cells(tmp_path):
    """write_cells(cells) -> a sweep's folder that holds them."""

    def write(cells):
        for index, cell in enumerate(cells):
            file = tmp_path / "runs" / f"run{index:03}" / "cells" / f"{cell['method']}.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(cell))
        return tmp_path

    return write
