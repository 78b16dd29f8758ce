"""The cases end to end, on a tiny model: that they run, and that both sides do the same work. Nothing is timed."""

import dataclasses
import json
import re

import numpy as np
import pytest
from benchmarks import generation, inputs, merge, stages, switches, training
from benchmarks.inputs import Setup, read_questions
from benchmarks.report import run_case

from br_jax.data.rows import Row
from br_jax.errors import UserError
from br_jax.models.io.hf import write_hf


@pytest.fixture(scope="module")
def setup(tiny, tmp_path_factory, quick):
    folder = tmp_path_factory.mktemp("bench")
    write_hf(folder / "tiny", tiny.spec, tiny.params, tiny.tokenizer)
    questions = [{"question": f"{'and ' * (i % 5)}{i}?", "answer": f"{i * 7}{'!' * (i % 3)}"} for i in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    model = {"source": folder / "tiny", "template": "chat", "dtype": "float32"}
    train = quick(batch_size=4, warmup_ratio=0.5)
    return Setup(model, folder / "rows.jsonl", folder, rounds=2, prompts=5, new_tokens=7, threads=1, train=train)


def test_training_losses_agree_in_every_step(setup, capsys):
    result = run_case(*training.cases(setup), rounds=2)

    spread = float(re.search(r"losses differ by at most (\S+) in 3 steps", capsys.readouterr().out)[1])
    assert spread < 1e-4  # 4e-6 was seen: f32 sums in another order, over three steps of rate up to 1e-2
    assert len(result["contenders"]) == 4
    assert all(line["recompiles"] == 0 for line in result["contenders"].values())


def test_losses_of_other_work_are_refused():
    with pytest.raises(UserError, match=r"not the same work: a 1\.000000, b 1\.002"):
        training.same_losses({"a": [1.0, 0.5], "b": [1.002, 0.5]}, 1e-3)
    with pytest.raises(UserError, match="not the same work"):
        training.same_losses({"a": [1.0], "b": [float("nan")]}, 1e-3)


def test_generation_gives_the_same_tokens(setup, capsys):
    run_case(*generation.cases(setup), rounds=1)

    assert "same token for token: 5 of 5" in capsys.readouterr().out


def test_generation_tells_ties_from_errors():
    ours = {"tokens": np.array([[1, 2, 3], [1, 2, 3], [4, 5, 6]])}
    other = {
        "tokens": np.array([[1, 2, 3], [1, 9, 3], [4, 5, 9]]),
        "gaps": np.array([[1, 1, 1], [1, 1e-5, 1], [1, 1, 1]]),
    }
    lines = generation.same_tokens({"ours": [ours], "other": [other]})

    assert lines[0].endswith("1 of 3")
    assert lines[1].startswith("prompt 1 differs from token 1") and lines[1].endswith("a tie within 1e-4")
    assert lines[2].startswith("prompt 2 differs from token 2") and lines[2].endswith("no tie")


def test_merge_gives_the_same_matrix(setup):
    shapes = {"layers/attn/q": (2, 48, 64), "layers/attn/v": (2, 48, 40)}
    result = run_case(*merge.cases(setup, shapes, dense_layers=1), rounds=1)

    assert re.search(r"\(48, 40\): differs by \S+e-0[789]", result["checks"][0])


def test_a_merge_that_differs_is_refused():
    with pytest.raises(UserError, match=r"differs by 1\.0e-04"):
        merge.same_matrices({"ours": [np.array([1.0, 0.5001])], "dense": [np.array([1.0, 0.5])]})


def test_stages_time_buffer_folded_and_stacked(setup):
    result = run_case(*stages.cases(setup), rounds=1)

    assert list(result["contenders"]) == ["SFT", "Buffer, folded", "Buffer, stacked"]


def test_a_switch_changes_its_own_fields_of_the_best(setup):
    cases = {case.name: case for case in switches.cases(setup)}
    config = dataclasses.replace(setup.steps, **training.BEST)

    fields = {
        "switch layout": {"packing", "buckets"},
        "switch loss": {"loss_chunk"},
        "switch remat": {"remat"},
        "switch attention": {"attention"},
    }
    assert fields.keys() == cases.keys()
    for name, case in cases.items():
        configs = [contender.arguments["config"] for contender in case.contenders]
        assert len(set(configs)) == len(configs) >= 2
        for other in configs:
            changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(other, f.name)}
            assert changed <= fields[name]
    run_case(cases["switch attention"], rounds=1)


def test_rows_in_either_layout(tmp_path):
    row = Row((("user", "1 + 1?"), ("assistant", "2")))
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "response": "2"}) + "\n")

    assert read_questions(tmp_path / "a.jsonl", 5) == [row]
    assert [other.turns for other in read_questions(tmp_path / "b.jsonl", 5)] == [row.turns]


def test_what_is_missing_is_told(setup, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--rows is missing"):
        dataclasses.replace(setup, rows=None).read(1)
    with pytest.raises(UserError, match="16 rows: 17 are needed"):
        setup.read(17)
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_questions(tmp_path / "none.jsonl", 1)
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="benchmark merge: torch, peft not installed"):
        merge.cases(setup)
