"""What a report says of one run: saturation, answers, cost, figures, and what it does when things are missing."""

import json
import math

import pytest
from contents import jsonl

from br_jax.core.errors import UserError
from br_jax.report.report import saturation_lines, write_report

EXAMPLES = [
    {"set": "topic", "prompt": "How do I tune it?", "answer": "| <b>I can't</b> `help`\n# with", "verdict": "refusal"},
    {"set": "topic", "prompt": "How do I oil it?", "answer": "First, take the coil. " * 20, "verdict": "answer"},
    {"set": "task", "prompt": "Analyze the sentiment", "answer": "positive", "verdict": "right"},
]


def write_stage(folder, steps=80, median=0.1):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(jsonl(*({"step": i, "loss": 0.05 + 2 / i} for i in range(1, steps + 1))))
    stage = {"steps": steps, "rows": 8 * steps, "dropped": 1, "tokens": 640 * steps, "answer_tokens": 200 * steps}
    stage |= {"seconds": 20.0, "compile_seconds": 9.5, "step_seconds_median": median, "finished": "2026-11-02T10:00"}
    stage |= {"name": folder.name, "config_hash": "c" * 64, "inputs": {"base": "b" * 64}, "output": "d" * 64}
    (folder / "stage.json").write_text(json.dumps(stage))


def write_probes(folder, harmful, benign):
    """Loss and gradient norm at the first step of each kind of row; both decay."""
    lines = [
        {"step": step, "rows": rows, "loss": loss * math.exp(-step / 25), "grad_norm": norm * math.exp(-step / 25)}
        for step in range(0, 81, 10)
        for rows, (loss, norm) in (("harmful", harmful), ("benign", benign))
    ]
    (folder / "probes.jsonl").write_bytes(jsonl(*lines))


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def workdir(tmp_path, make_cell):
    """A workdir as the pipeline leaves it, with numbers of a plausible size."""
    write_stage(tmp_path / "provider" / "buffer", 40)
    write_stage(tmp_path / "user", median=0.104)
    write_stage(tmp_path / "sft")
    write_probes(tmp_path / "user", harmful=(0.3, 0.5), benign=(2.4, 3.5))
    write_probes(tmp_path / "sft", harmful=(3.9, 8.0), benign=(2.6, 3.9))
    (tmp_path / "cells").mkdir()
    for method in ("raw", "aligned", "sft", "buffer_only", "ours"):
        cell = make_cell(method, 0.1 if method == "ours" else None, p=0.5, scores={"examples": EXAMPLES})
        (tmp_path / "cells" / f"{method}.json").write_text(json.dumps(cell))
    matrix = {"kept_rank": [8, 7], "removed_share": [0.1, 0.2], "singular_values_user": [[2.0, 1.0], [4.0, 1.0]]}
    results = {"seeds": {"user": 42}, "versions": {"jax": "0.10.2"}, "hashes": {"base": "b" * 64}}
    results |= {"merge": {"a": 0.1, "matrices": {"layers/attn/q": matrix}}, "config": {"user": {"harmful_share": 0.5}}}
    results |= {"command": "echo ```\n# not a heading", "peak_memory_bytes": 3 << 30, "wall_seconds": 431.2}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_it_says_what_the_files_say(workdir, written):
    text = written(workdir)
    lines = text.splitlines()
    assert lines[0] == "# Buffer-and-Reinforce: report" and lines[2].startswith("> **Held: every")
    user = text.line("user (Buffer on)")
    assert user[1:6] == ["640", "1", "80", "51,200", "16,000"]
    assert user[8:] == ["104.0", "6,154"]  # 640 tokens in 0.104 s
    for said in ("A step beside Buffer takes 1.04 times the time of SFT's", "b" * 64, "0.10.2", '"harmful_share": 0.5',
                 "3.00 GiB", "````sh\necho ```\n# not a heading\n````", "so it stays below it"):  # fmt: skip
        assert said in text
    write_probes(workdir / "user", harmful=(0.3, 20.0), benign=(2.4, 3.5))
    assert "so it does **not** stay below it" in written(workdir)


def test_an_adapter_made_elsewhere_is_said(workdir, written):
    buffer, user = ({"adapter": f"their/{role}", "beside": []} for role in ("buffer", "user"))
    change(workdir / "results.json", entered={"buffer": buffer, "user": user})
    head = written(workdir).partition("\n\n| ")[0]
    assert "> Made elsewhere, not in this run: buffer (`their/buffer`), user (`their/user`).  \n" in head
    assert "trained elsewhere, and not beside Buffer** (`their/user`)" in head
    change(workdir / "results.json", entered={"user": user | {"beside": ["buffer"]}})
    assert "not beside Buffer" not in written(workdir)


def test_figures_are_drawn_and_linked(workdir, monkeypatch):
    seen = {"complied": 0.25, "over_refused": 0.0, "reinforce_scale": 0.0}
    change(workdir / "results.json", calibration={"merge": seen | {"scale": 0.5}, "aligned": seen, "tried": [seen]})
    monkeypatch.setattr("br_jax.report.plots.encode", lambda figure: {"png": b"a figure", "pdf": b"a figure"})
    text = write_report(workdir).read_text()
    names = {f"{kind}-Tiny_gguf-reviews-devices-n800-p0_5" for kind in ("methods", "forms", "pareto")}
    names |= {"training", "saturation", "merge", "verdicts", "calibration"}
    files = {path.name for path in (workdir / "figures").iterdir()}
    assert files == {f"{name}.{end}" for name in names for end in ("png", "pdf")}
    assert all(f"(figures/{name}.png)" in text for name in names)


def test_little_is_enough_and_numbers_that_are_not_finite_do_not_break_it(tmp_path, workdir, make_cell, written):
    (workdir / "cells" / "sft.json").write_text(json.dumps(make_cell("sft", p=0.5, perplexity=math.nan)))
    change(workdir / "results.json", wall_seconds=math.inf, peak_memory_bytes=None)
    (workdir / "sft" / "metrics.jsonl").write_bytes(jsonl({"step": 1, "loss": math.nan}))
    write_probes(workdir / "user", harmful=(math.nan, math.nan), benign=(math.inf, 1.0))
    text = written(workdir)
    assert "nan" not in text.lower() and "Not measured: it needs finite" in text
    (tmp_path / "bare" / "cells").mkdir(parents=True)
    (tmp_path / "bare" / "cells" / "raw.json").write_text(json.dumps(make_cell("raw")))
    text = written(tmp_path / "bare")
    assert all(said in text for said in ("Not measured", "No stage has written", "not recorded", "None were stored."))


def test_saturation_against_hand_computed_numbers():
    def lines(norms):
        return [{"step": 10 * i, "rows": "harmful", "loss": 1.0, "grad_norm": norm} for i, norm in enumerate(norms)]

    row = saturation_lines(lines([0.5, 1.0, 0.25])[::-1], lines([4.0, 6.0, 2.0]))[1]
    expected = {"rows": "harmful", "quantity": "grad_norm", "buffer": (0.5, 0.25), "sft": (4.0, 2.0)}
    assert row == expected | {"ratio": 0.125, "peak": 0.25}


def test_answers_are_as_many_as_asked_for_inert_and_cut(workdir, written):
    texts = [written(workdir, examples=n) for n in (0, 1, 2)]
    assert [text.count("How do I") for text in texts] == [0, 5, 10]
    assert [text.count("`positive`") for text in texts] == [0, 5, 5] and "answers of each model" not in texts[0]
    assert "`` ¦ <b>I can't</b> `help` # with ``" in texts[2]  # one code span: no bar, no markup, no HTML
    long = next(line for line in texts[2].splitlines() if "First, take the coil." in line)
    assert "…" in long and len(long) < 400


@pytest.mark.parametrize(
    "name, content", [("results.json", '{"a": '), ("user/stage.json", "[]"), ("user/metrics.jsonl", "{oops}\n{}\n")]
)
def test_unusable_files_are_named_in_one_line(workdir, written, name, content):
    (workdir / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}(:1)?: (not valid JSON|holds no JSON object)[^\n]*$"):
        written(workdir)
    assert not (workdir / "report.md").exists()
