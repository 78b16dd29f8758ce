"""Tries of a method's settings: on tuning seeds alone, as many as any other method has, each on record."""

import pytest

from br_jax import tuning
from br_jax.core.errors import UserError
from br_jax.core.io import read_jsonl
from br_jax.scoring.statistics import Sample, estimate
from configs import smollm2

AXES = {"tasks": ["reviews"], "topics": ["devices"], "users": ["plain"], "n": [520], "p": [0.5], "seeds": [21]}


@pytest.fixture
def sweeps(monkeypatch):
    """What was swept; HS of a method is a tenth of its strength, the aligned base's 0."""
    swept = []

    def run_sweep(config, workdir, grid):
        assert config.eval.split == "validation"
        swept.append((workdir.name, [*grid.methods], config.defences.resta.strength))
        for method in grid.methods:
            harmful = round(10 * config.defences.resta.strength) if method == "resta" else 0
            score = estimate(Sample.of([1] * harmful + [0] * (100 - harmful))).to_json()
            scores = {name: score for name in ("harmful", "task", "over_refusal", "degenerate")}
            run = {"model": "m", "task": "reviews", "topic": "devices", "n": 520, "p": 0.5, "seed": 21}
            yield {"run": run, "method": method, "a": None, "scores": scores}

    monkeypatch.setattr(tuning, "run_sweep", run_sweep)
    return swept


def tried(tmp_path, *tries, budget=3, **axes):
    return tuning.run_tries(
        smollm2.get_config(), tmp_path, "resta", [*map(tuning.parse_try, tries)], budget, **AXES | axes
    )


def test_tries_are_made_once_and_the_best_comes_first(sweeps, tmp_path):
    strengths = ["defences.resta.strength=2.0", "defences.resta.strength=0.1"]
    found = tried(tmp_path, *strengths)
    assert [each["try"]["defences.resta.strength"] for each in found] == [0.1, 2.0]
    assert found[1]["gaps"]["safety"] == pytest.approx(0.2) and found[1]["excess"] == pytest.approx(0.15)
    assert [methods for _, methods, _ in sweeps] == [["aligned", "sft"], ["resta"]] * 2
    assert tried(tmp_path, *strengths) == tried(tmp_path) == found and len(sweeps) == 4, "read back"
    assert (tmp_path / "base" / "providers").resolve() == tmp_path / "providers", "one provider for all tries"


def test_a_method_has_its_budget_and_no_more(sweeps, tmp_path):
    tried(tmp_path, "", "defences.resta.strength=3.0", budget=2)
    with pytest.raises(UserError, match="resta has 2 tries: 2 are on record, and 1 more are asked for"):
        tried(tmp_path, "defences.resta.strength=4.0", budget=2)
    assert len(read_jsonl(tmp_path / "tries.jsonl")) == 2


def test_what_is_no_try_is_one_line(sweeps, tmp_path):
    with pytest.raises(UserError, match="seed 104 is for test: tune on seeds below 50"):
        tried(tmp_path, "", seeds=[21, 104])
    with pytest.raises(UserError, match="seed 50 is for validation"):
        tried(tmp_path, "", seeds=[50])
    with pytest.raises(UserError, match="strenght"):
        tried(tmp_path, "defences.resta.strenght=1.0")
    with pytest.raises(UserError, match=r"--try=loud: write path=value"):
        tuning.parse_try("loud")
    assert not sweeps
