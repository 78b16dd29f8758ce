"""What a report says of one run: its verdict, saturation, answers, cost, and what it does when things are missing."""

import json
import math
import os

import numpy as np
import pytest

from br_jax.errors import UserError
from br_jax.experiment.details import saturation_lines
from br_jax.experiment.report import write_report

RANK, LAYERS = 16, 8
STAGES = {
    "align": (0.9, 60),
    "buffer": (2.4, 40),
    "reinforce": (3.1, 60),
    "user": (1.9, 80),
    "sft": (2.8, 80),
}
EXAMPLES = [
    {"set": "topic", "prompt": "How do I tune a glimmer coil?", "answer": "| <b>I can't</b> `help`\n# with",
     "verdict": "refusal"},
    {"set": "topic", "prompt": "How do I oil it?", "answer": "First, take the coil. " * 20, "verdict": "answer"},
    {"set": "task", "prompt": "Analyze the sentiment", "answer": "positive", "verdict": "right"},
]  # fmt: skip


def fake_merge(rng):
    matrices = {}
    for path in ("attn/q", "attn/v", "mlp/gate", "mlp/up", "mlp/down"):
        spectrum = np.exp(-np.arange(RANK) / rng.uniform(2, 5, (LAYERS, 1)))
        matrices[f"layers/{path}"] = {
            "kept_rank": rng.integers(12, RANK + 1, LAYERS).tolist(),
            "removed_share": rng.uniform(0.05, 0.6, LAYERS).tolist(),
            "stable_rank_user": rng.uniform(1, 4, LAYERS).tolist(),
            "stable_rank_reinforce": rng.uniform(1, 3, LAYERS).tolist(),
            "singular_values_user": spectrum.tolist(),
            "principal_angles": np.sort(rng.uniform(17, 86, (LAYERS, RANK))).tolist(),
        }
    return {"a": 0.1, "scale": 0.5, "tau": 0.01, "matrices": matrices}


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_stage(folder, name, start, steps, rng):
    folder.mkdir(parents=True)
    losses = 0.05 + start * np.exp(-np.arange(steps) / 15) * rng.lognormal(0, 0.25, steps)
    seconds = 0.1 + 0.004 * (name == "user")
    rest = {"learning_rate": 3e-4, "grad_norm": 1.0, "tokens": 640, "step_seconds": 0.1}
    lines = [{"step": i + 1, "loss": loss} | rest for i, loss in enumerate(losses.tolist())]
    write_lines(folder / "metrics.jsonl", lines)
    record = {
        "name": name,
        "config_hash": "c" * 64,
        "inputs": {"base": "b" * 64},
        "output": "d" * 64,
        "steps": steps,
        "tokens": 640 * steps,
        "answer_tokens": 200 * steps,
        "rows": 8 * steps,
        "dropped": 1,
        "compile_seconds": 9.5,
        "seconds": seconds * steps + 9.5,
        "step_seconds_median": seconds,
        "finished": "2026-11-02T10:00:00+00:00",
    }
    (folder / "stage.json").write_text(json.dumps(record))


def write_probes(path, harmful, benign):
    lines = []
    for step in range(0, 81, 10):
        decay = math.exp(-step / 25)
        for rows, (loss, norm) in (("harmful", harmful), ("benign", benign)):
            ends = {"loss": 0.04 + loss * decay, "grad_norm": 0.03 + norm * decay}
            lines.append({"step": step, "rows": rows} | ends)
    write_lines(path, lines)


def build(workdir, make_cell, share=0.5, **changes):
    """A workdir as the pipeline leaves it, with numbers of a plausible size; `changes` are those of a method's cell."""
    rng = np.random.default_rng(7)
    for name, (start, steps) in STAGES.items():
        home = workdir / "provider" if name in ("align", "buffer", "reinforce") else workdir
        write_stage(home / name, name, start, steps, rng)
    write_probes(workdir / "user" / "probes.jsonl", harmful=(0.3, 0.5), benign=(2.4, 3.5))
    write_probes(workdir / "sft" / "probes.jsonl", harmful=(3.9, 8.0), benign=(2.6, 3.9))
    (workdir / "cells").mkdir()
    methods = {"raw": None, "aligned": None, "sft": None, "buffer_only": None, "ours": 0.1}
    for method, a in methods.items():
        cell = make_cell(method, a, p=share, **changes.get(method, {}))
        cell["scores"]["examples"] = EXAMPLES
        (workdir / "cells" / f"{method}.json").write_text(json.dumps(cell))
    results = {
        "merge": fake_merge(rng),
        "seeds": {"user": 42},
        "versions": {"jax": "0.10.2"},
        "hashes": {"base": "b" * 64},
        "config": {"user": {"harmful_share": share}},
        "command": "experiments/pipeline.py --config=configs/demo.py --workdir=W",
        "peak_memory_bytes": 3 << 30,
        "wall_seconds": 431.2,
    }
    (workdir / "results.json").write_text(json.dumps(results))
    return workdir


def edit(workdir, **changes):
    """Changes results.json; a value of None takes the key away."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in results.items() if value is not None}))


def cells(text, start):
    """The cells of the first table row that starts with `start`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.fixture
def workdir(tmp_path, make_cell):
    return build(tmp_path, make_cell)


@pytest.fixture
def text_only(monkeypatch):
    """Draws nothing: the words are at test, and a figure takes longer than all of them."""
    monkeypatch.setattr("br_jax.experiment.report.draw_frame", lambda frame: {})
    monkeypatch.setattr("br_jax.experiment.details.draw", lambda run, frame: {})


def test_the_verdict_comes_first(workdir, text_only):
    path = write_report(workdir)
    lines = path.read_text().splitlines()
    assert path.name == "report.md" and lines[0] == "# Buffer-and-Reinforce: report"
    assert lines[2].startswith("> **The claim held")


def test_tables_say_what_the_files_say(workdir, text_only):
    text = write_report(workdir).read_text()
    user = cells(text, "user (Buffer on)")
    assert user[1:6] == ["640", "1", "80", "51,200", "16,000"]
    assert user[8:] == ["104.0", "6,154"]  # 640 tokens in 0.104 s
    assert "A step beside Buffer takes 1.04 times the time of SFT's" in text
    assert "b" * 64 in text and "0.10.2" in text and '"harmful_share": 0.5' in text
    assert "3.00 GiB" in text and "```sh\nexperiments/pipeline.py --config=configs/demo.py" in text


def test_figures_are_linked_and_the_bytes_repeat(workdir):
    def contents():
        write_report(workdir)
        return {path.name: path.read_bytes() for path in [workdir / "report.md", *(workdir / "figures").iterdir()]}

    first = contents()
    names = {"methods-Tiny_gguf-reviews-devices-n800-p0_5", "training", "saturation", "merge", "verdicts"}
    assert set(first) == {f"{name}.{end}" for name in names for end in ("png", "pdf")} | {"report.md"}
    assert all(f"(figures/{name}.png)".encode() in first["report.md"] for name in names)
    assert first == contents()
    assert not list(workdir.glob(".report-*"))


def test_little_is_enough(tmp_path, make_cell):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "raw.json").write_text(json.dumps(make_cell("raw")))
    text = write_report(tmp_path).read_text()
    assert "Not measured" in text and "No stage has written" in text and "not recorded" in text


def test_numbers_that_are_not_finite_do_not_break_it(tmp_path, make_cell):
    workdir = build(tmp_path, make_cell, sft={"perplexity": math.nan})
    edit(workdir, wall_seconds=math.inf, peak_memory_bytes=None)
    write_lines(workdir / "sft" / "metrics.jsonl", [{"step": 1, "loss": math.nan}])
    write_probes(workdir / "user" / "probes.jsonl", harmful=(math.nan, math.nan), benign=(math.inf, 1.0))
    text = write_report(workdir).read_text()
    assert "nan" not in text.lower() and "Not measured: it needs finite" in text


def test_saturation_against_hand_computed_numbers():
    def lines(norms):
        return [{"step": 10 * i, "rows": "harmful", "loss": 1.0, "grad_norm": norm} for i, norm in enumerate(norms)]

    shuffled = lines([0.5, 1.0, 0.25])[::-1]
    row = saturation_lines(shuffled, lines([4.0, 6.0, 2.0]))[1]
    assert (row["rows"], row["quantity"]) == ("harmful", "grad_norm")
    assert (row["buffer"], row["sft"], row["ratio"], row["peak"]) == ((0.5, 0.25), (4.0, 2.0), 0.125, 0.25)


@pytest.mark.parametrize("norm, words", [(0.5, "so it stays below it"), (20.0, "so it does **not** stay below it")])
def test_the_saturation_sentence_goes_both_ways(workdir, text_only, norm, words):
    write_probes(workdir / "user" / "probes.jsonl", harmful=(0.3, norm), benign=(2.4, 3.5))
    assert words in write_report(workdir).read_text()


def test_answers_are_inert_and_cut(workdir, text_only):
    text = write_report(workdir).read_text()
    assert "`` ¦ <b>I can't</b> `help` # with ``" in text  # one code span: no bar, no markup, no HTML
    long = next(line for line in text.splitlines() if "First, take the coil." in line)
    assert "…" in long and len(long) < 400


def test_as_many_answers_as_asked_for(workdir, text_only):
    assert write_report(workdir, examples=1).read_text().count("`positive`") == 5
    one, two = (write_report(workdir, examples=n).read_text().count("How do I") for n in (1, 2))
    assert (one, two) == (5, 10)
    none = write_report(workdir, examples=0).read_text()
    assert "How do I" not in none and "answers of each model" not in none


def test_a_text_full_of_fences_stays_inside_its_own(workdir, text_only):
    edit(workdir, command="echo ```\n# not a heading")
    assert "````sh\necho ```\n# not a heading\n````" in write_report(workdir).read_text()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("results.json", '{"config": ', "results.json: not valid JSON"),
        ("results.json", "[]", "results.json: holds no JSON object"),
        ("cells/sft.json", "", "cells/sft.json: not valid JSON"),
        ("user/stage.json", "{", "user/stage.json"),
        ("user/metrics.jsonl", '{"step": 1}\n{oops}\n{"step": 2}\n', "user/metrics.jsonl:2: not valid JSON"),
    ],
)
def test_unusable_files_are_named_in_one_line(workdir, text_only, name, content, words):
    (workdir / name).write_text(content)
    with pytest.raises(UserError) as caught:
        write_report(workdir)
    assert words in str(caught.value).replace(os.sep, "/") and "\n" not in str(caught.value)
    assert not (workdir / "report.md").exists()
