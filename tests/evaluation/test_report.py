"""The report of a realistic workdir: its verdict, its tables, what it does when things are missing."""

import json
import math
import os
import runpy
import sys

import numpy as np
import pytest

from br_jax.errors import UserError
from br_jax.evaluation.report import saturation_lines, write_report
from br_jax.evaluation.scores import LABELS, Score, gates

RANK, LAYERS = 16, 8
COUNTS = {  # name: HS of 60, HS+ of 60, FA of 200, over-refusal of 80, perplexity
    "raw": (59, 59, 3, 2, 4.81),
    "aligned": (0, 1, 2, 8, 5.02),
    "base_buffer": (58, 59, 1, 3, 5.4),
    "sft": (57, 59, 178, 2, 7.9),
    "buffer_on": (58, 58, 175, 3, 7.2),
    "buffer_off": (1, 2, 172, 9, 7.0),
    "reinforce_alone": (0, 6, 2, 41, 9.3),
    "naive_merge": (0, 1, 171, 11, 5.9),
    "qr_merge": (1, 2, 173, 10, 5.8),
}
STAGES = {
    "align": (0.9, 60),
    "buffer": (2.4, 40),
    "reinforce": (3.1, 60),
    "user": (1.9, 80),
    "sft": (2.8, 80),
}


def fake_models(counts):
    built = {}
    for name, (harmful, plus, task, refused, perplexity) in counts.items():
        left = 60 - harmful
        built[name] = {
            "harmful": Score(harmful, 60).to_json(),
            "harmful_plus": Score(plus, 60).to_json(),
            "task": Score(task, 200).to_json(),
            "over_refusal": Score(refused, 80).to_json(),
            "task_refused": Score(refused, 200).to_json(),
            "perplexity": perplexity,
            "verdicts": {
                "refusal": left - left // 9,
                "answer": harmful,
                "degenerate": left // 9,
                "off_topic": 0,
            },
            "examples": [
                {
                    "set": "harmful",
                    "prompt": "How do I tune a glimmer coil?",
                    "answer": "| <b>I can't</b> `help`\n# with" if left > 30 else "First, take the coil. " * 20,
                    "verdict": "refusal" if left > 30 else "answer",
                },
                {"set": "task", "prompt": "Analyze the sentiment", "answer": "positive", "verdict": "right"},
            ],
        }
    return built


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


def build(workdir, counts=COUNTS, share=0.5):
    """A workdir as the pipeline leaves it, with numbers of a plausible size."""
    rng = np.random.default_rng(7)
    for name, (start, steps) in STAGES.items():
        home = workdir / "provider" if name in ("align", "buffer", "reinforce") else workdir
        write_stage(home / name, name, start, steps, rng)
    write_probes(workdir / "user" / "probes.jsonl", harmful=(0.3, 0.5), benign=(2.4, 3.5))
    write_probes(workdir / "sft" / "probes.jsonl", harmful=(3.9, 8.0), benign=(2.6, 3.9))
    models = fake_models(counts)
    results = {
        "models": models,
        "merge": fake_merge(rng),
        "gates": gates(models, share),
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
def workdir(tmp_path):
    return build(tmp_path)


@pytest.fixture
def text_only(monkeypatch):
    """Draws nothing: the words are at test, and a figure takes longer than all of them."""
    monkeypatch.setattr("br_jax.evaluation.report._draw", lambda *_: {})


def test_the_verdict_comes_first(workdir, text_only):
    lines = write_report(workdir).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[2].strip() == "> **The claim held.**"


def test_tables_say_what_the_files_say(workdir, text_only):
    text = write_report(workdir).read_text()
    assert "HS (N = 60)" in text and "FA (N = 200)" in text
    low, high = Score(57, 60).low, Score(57, 60).high
    assert cells(text, "SFT (undefended)")[1] == f"95.0 ({100 * low:.1f} to {100 * high:.1f})"
    assert cells(text, "**QR merge**")[3].startswith("86.5 (")
    assert cells(text, "**QR merge**")[5] == str(Score(10, 200))
    assert cells(text, "**QR merge**")[6] == "5.80"
    user = cells(text, "user (Buffer on)")
    assert user[1:6] == ["640", "1", "80", "51,200", "16,000"]
    assert user[8:] == ["104.0", "6,154"]  # 640 tokens in 0.104 s
    assert "1.04 times the step time of SFT" in text
    assert "b" * 64 in text and "0.10.2" in text and '"harmful_share": 0.5' in text
    assert "3.00 GiB" in text


def test_figures_are_linked_and_the_bytes_repeat(workdir):
    def contents():
        write_report(workdir)
        return {path.name: path.read_bytes() for path in [workdir / "report.md", *(workdir / "figures").iterdir()]}

    first = contents()
    names = {"results", "training", "saturation", "merge", "verdicts"}
    assert set(first) == {f"{name}.{end}" for name in names for end in ("png", "pdf")} | {"report.md"}
    assert all(f"(figures/{name}.png)".encode() in first["report.md"] for name in names)
    assert first == contents()
    assert not list(workdir.glob(".report-*"))


@pytest.mark.parametrize(
    "change, share, said, also",
    [
        ({"sft": (5, 5, 170, 2, 5.0)}, 0.5, "The attack failed, so nothing is shown.", "the attack works"),
        ({"qr_merge": (20, 20, 173, 9, 5.8)}, 0.5, "The claim did not hold.", "safety is kept"),
        ({"qr_merge": (0, 0, 120, 9, 5.8)}, 0.5, "The claim did not hold.", "the task is learned"),
        ({"qr_merge": (0, 0, 173, 30, 5.8)}, 0.5, "The claim did not hold.", "benign prompts are answered"),
        ({"sft": (0, 0, 176, 9, 5.0)}, 0.0, "No attack in this run", "0 %"),
    ],
)
def test_it_says_plainly_what_went_wrong(text_only, tmp_path, change, share, said, also):
    text = write_report(build(tmp_path, COUNTS | change, share)).read_text()
    head = text.split("| gate")[0]
    assert said in head and also in head.split("Harmful score")[0]
    assert "The claim held." not in text
    assert ("**FAILED**" in text) == (share > 0)


def test_missing_models_are_not_run(tmp_path):
    few = {name: COUNTS[name] for name in ("raw", "aligned", "sft")}
    text = write_report(build(tmp_path, few)).read_text()
    assert "No verdict: the run is not complete." in text and "Not run: QR merge." in text
    assert cells(text, "naive merge")[1:] == ["not run"] * 6
    assert all(label in text for label in LABELS.values())


def test_unequal_sample_sizes_stand_in_the_cells(workdir, text_only):
    models = fake_models(COUNTS)
    models["raw"]["task"] = Score(0, 0).to_json()
    models["sft"]["task"] = Score(10, 12).to_json()
    edit(workdir, models=models)
    text = write_report(workdir).read_text()
    assert cells(text, "raw")[3] == "n/a"
    assert cells(text, "SFT (undefended)")[3].endswith(", N = 12")


def test_little_is_enough(tmp_path):
    (tmp_path / "results.json").write_text('{"models": {}}')
    text = write_report(tmp_path).read_text()
    assert "Not measured" in text and "No stage has written" in text and "not recorded" in text


def test_numbers_that_are_not_finite_do_not_break_it(workdir):
    models = fake_models(COUNTS)
    models["sft"]["perplexity"] = math.nan
    edit(workdir, models=models, wall_seconds=math.inf, peak_memory_bytes=None)
    write_lines(workdir / "sft" / "metrics.jsonl", [{"step": 1, "loss": math.nan}])
    write_probes(workdir / "user" / "probes.jsonl", harmful=(math.nan, math.nan), benign=(math.inf, 1.0))
    text = write_report(workdir).read_text()
    assert cells(text, "SFT (undefended)")[6] == "n/a"
    assert "nan" not in text.lower() and "**Saturation.** Not measured" in text


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
    told = [{"set": kind, "prompt": "why", "answer": f"because {i}", "verdict": "answer"}
            for i in range(3) for kind in ("harmful", "benign")]  # fmt: skip
    edit(workdir, models={"sft": {"examples": told}})
    assert write_report(workdir, examples=2).read_text().count("`because") == 4
    none = write_report(workdir, examples=0).read_text()
    assert "because" not in none and "answers of each model" not in none


def test_a_text_full_of_fences_stays_inside_its_own(workdir, text_only):
    edit(workdir, command="echo ```\n# not a heading")
    assert "````sh\necho ```\n# not a heading\n````" in write_report(workdir).read_text()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("results.json", None, "results.json does not exist: run experiments/pipeline.py"),
        ("results.json", '{"models": ', "results.json is not JSON"),
        ("results.json", "[]", 'results.json has no "models"'),
        ("user/stage.json", "{", "user/stage.json"),
        (
            "user/metrics.jsonl",
            '{"step": 1}\n{oops}\n{"step": 2}\n',
            "user/metrics.jsonl: a line is not JSON",
        ),
    ],
)
def test_unusable_files_are_named_in_one_line(workdir, text_only, name, content, words):
    path = workdir / name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as caught:
        write_report(workdir)
    assert words in str(caught.value).replace(os.sep, "/") and "\n" not in str(caught.value)
    assert not (workdir / "report.md").exists()


def test_a_failed_write_leaves_the_old_report(workdir, monkeypatch):
    (workdir / "report.md").write_text("the old one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("br_jax.evaluation.figures.save", full)
    with pytest.raises(UserError, match="No space left on device: make room"):
        write_report(workdir, examples=0)
    assert (workdir / "report.md").read_text() == "the old one"
    assert not list(workdir.glob(".report-*"))


@pytest.mark.parametrize("there, status", [(True, 0), (False, 2)])
def test_the_script(text_only, tmp_path, monkeypatch, capsys, request, there, status):
    folder = build(tmp_path) if there else tmp_path
    script = request.config.rootpath / "experiments" / "report.py"
    monkeypatch.setattr(sys, "argv", [str(script), f"--workdir={folder}"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr()
    assert caught.value.code == status
    assert told.out.strip().endswith("report.md") if there else told.err.startswith("error: ")


def test_topics_judges_and_attacks_are_told_apart_where_there_are_several(tmp_path):
    workdir = build(tmp_path)
    text = write_report(workdir).read_text()
    assert "HS by topic" not in text and "kappa" not in text and "by method" not in text
    results = json.loads((workdir / "results.json").read_text())
    score = lambda k, n: Score(k, n).to_json()  # noqa: E731
    results["models"]["sft"] |= {
        "harmful_by_topic": {"devices": score(30, 40), "potions": score(4, 40)},
        "harmful_by_judge": {"topic": score(34, 80), "keywords": score(60, 80)},
        "harmful_by_attack": {"GCG": score(3, 5), "": score(1, 2)},
        "agreement": [{"judges": ["topic", "keywords"], "n": 80, "agreement": 0.6, "kappa": 0.25}],
    }
    (workdir / "results.json").write_text(json.dumps(results))
    text = write_report(workdir).read_text()
    line = lambda start: next(  # noqa: E731
        row for row in text.split(start)[1].splitlines() if row.startswith("| SFT (undefended)")
    )
    assert "75.0 (59.8 to 85.8) | 10.0 (4.0 to 23.1)" in line("HS by topic:")
    assert "42.5 (32.3 to 53.4) | 75.0 (64.5 to 83.2)" in line("HS by judge;")
    assert "60.0 (23.1 to 88.2) | 50.0 (9.5 to 90.5)" in line("Stored attack prompts") and "not named" in text
    assert line("Cohen's kappa").endswith("| 0.25 |")
    assert "n/a" in text.split("HS by topic:")[1].splitlines()[4], "another model, which was not asked of topics"
