"""What a report says of one run beside its scores: saturation, answers, training, the merge, cost, how to repeat it."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from br_jax.core.io import read_jsonl
from br_jax.core.records import read_record
from br_jax.report import run_figures as figures
from br_jax.report.markdown import CUT, code, image, literal, number, table
from br_jax.scoring.statistics import is_finite
from br_jax.training.folder import read_finished

_WITHOUT_BUFFER = (
    "**The user's adapter was trained elsewhere, and not beside Buffer** ({adapter}): what harmful rows taught is in "
    "it, and the merge of Reinforce is all that stands against it. What is said below of training beside Buffer does "
    "not hold for it, and it has no saturation curves."
)
_QUANTITIES = {"loss": "loss", "grad_norm": "gradient norm"}


class Details(NamedTuple):
    """The files of one run."""

    results: Mapping[str, Any]  # results.json; empty when the run was not scored by experiments/pipeline.py
    stages: Mapping[str, Mapping[str, Any]]  # name -> its stage.json, and "metrics": the lines of its metrics.jsonl
    probes: tuple[figures.Lines, figures.Lines]  # lines of probes.jsonl, of the user stage and of SFT


def read(workdir: Path) -> Details:
    """Reads a run's folder; a `UserError` where a file is damaged."""
    names = [f"{depth}/{name}" for name in ("stage.json", "metrics.jsonl") for depth in ("*", "*/*")]
    stages = {}
    for folder in sorted({path.parent for name in names for path in workdir.glob(name)}):
        stage = read_finished(folder) if (folder / "stage.json").exists() else {}
        stages[str(stage.get("name", folder.name))] = stage | {"metrics": read_jsonl(folder / "metrics.jsonl")}
    results = workdir / "results.json"
    return Details(
        results=read_record(results, "delete it and run the same command again") if results.exists() else {},
        stages={name: stages[name] for name in figures.in_order(stages)},
        probes=tuple(read_jsonl(workdir / name / "probes.jsonl") for name in ("user", "sft")),
    )


def draw(run: Details, results: pd.DataFrame) -> dict[str, Figure]:
    """The figures of a run by name."""
    verdicts = {
        label: scores.get("verdicts") or {} for label, scores in zip(results.label, results.scores, strict=True)
    }
    calibration = run.results.get("calibration")
    return {
        "training": figures.training_figure({name: stage["metrics"] for name, stage in run.stages.items()}),
        "saturation": figures.saturation_figure(*run.probes),
        "merge": figures.merge_figure(run.results.get("merge") or {}),
        **({"calibration": figures.calibration_figure(calibration)} if calibration else {}),
        "verdicts": figures.verdict_figure(verdicts),
    }


def warnings(run: Details) -> list[str]:
    """What a reader must know of adapters that were not made in this run."""
    entered = run.results.get("entered") or {}
    others = [f"{stage} ({literal(each['adapter'])})" for stage, each in entered.items()]
    lines = [f"Made elsewhere, not in this run: {', '.join(others)}."] if others else []
    user = entered.get("user")
    if user and "buffer" not in user["beside"]:
        lines.append(_WITHOUT_BUFFER.format(adapter=literal(user["adapter"])))
    return lines


def sections(run: Details, results: pd.DataFrame, examples: int) -> Iterable[str]:
    """The sections of a run, with so many answers of each model and prompt set."""
    saturation = saturation_lines(*run.probes)
    yield "## Saturation"
    yield _saturation_words(saturation)
    yield image("saturation", "loss and adapter-gradient norm of harmful and benign rows over user steps")
    yield _saturation_table(saturation)
    yield "## What the models said"
    yield image("verdicts", "verdicts of the judge, by model")
    if examples:
        yield f"A few answers of each model, cut at {CUT} characters:"
        yield _examples(results, examples)
    yield "## Training"
    yield image("training", "loss of every stage")
    yield "## The merge"
    yield image("merge", "merge diagnostics by matrix and layer")
    if run.results.get("calibration"):
        yield image("calibration", "answered harmful and refused benign prompts against the strength of Reinforce")
    yield "## Cost"
    user, sft = (run.stages.get(name, {}).get("step_seconds_median") for name in ("user", "sft"))
    if is_finite(user) and is_finite(sft) and sft > 0:
        yield f"A step beside Buffer takes {user / sft:.2f} times the time of SFT's (medians)."
    yield _cost_table(run.stages)
    wall = number(run.results.get("wall_seconds"), ".0f")
    memory = number(run.results.get("peak_memory_bytes"), ".2f", scale=2**-30)
    yield f"The last call took {wall} s (what it read back is not counted); peak memory {memory} GiB."
    yield "## To repeat it"
    yield from _provenance(run)


def saturation_lines(with_buffer: figures.Lines, without: figures.Lines) -> list[dict[str, Any]]:
    """First and last probe of each kind of row and quantity, with and without Buffer, from lines of probes.jsonl.

    Returns:
        Dicts with "rows", "quantity", "buffer" and "sft" (each (first, last), None where there is no probe),
        "ratio" (buffer's first over sft's first) and "peak" (buffer's largest over sft's first), both None
        where a number they need is absent or not finite.
    """
    lines = []
    for rows, quantity in itertools.product(("harmful", "benign"), _QUANTITIES):
        buffer, sft = (
            [line.get(quantity) for line in sorted(probes, key=lambda line: line["step"]) if line.get("rows") == rows]
            for probes in (with_buffer, without)
        )
        start = sft[0] if sft and is_finite(sft[0]) and sft[0] > 0 else None
        measured = start and buffer and all(map(is_finite, buffer))
        ratios = (
            {"ratio": buffer[0] / start, "peak": max(buffer) / start} if measured else {"ratio": None, "peak": None}
        )
        ends = {name: (found[0], found[-1]) if found else None for name, found in (("buffer", buffer), ("sft", sft))}
        lines.append({"rows": rows, "quantity": quantity} | ends | ratios)
    return lines


def _saturation_words(saturation: Sequence[Mapping[str, Any]]) -> str:
    harmful, benign = (row for row in saturation if row["quantity"] == "grad_norm")
    if harmful["ratio"] is None:
        return "Not measured: it needs finite harmful-row probes of both the user stage and SFT."
    stays = "stays" if harmful["peak"] < 1 else "does **not** stay"
    words = (
        f"At the first step the gradient of harmful rows with Buffer is {harmful['ratio']:.3g} times the one "
        f"without; over the run it reaches at most {harmful['peak']:.3g} times that start, so it {stays} below it."
    )
    if benign["ratio"] is not None:
        words += f" The gradient of benign rows starts at {benign['ratio']:.3g} times theirs without Buffer."
    return words


def _saturation_table(saturation: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for line in saturation:
        numbers = *(line["buffer"] or (None, None)), *(line["sft"] or (None, None)), line["ratio"]
        name = f"{line['rows']} rows, {_QUANTITIES[line['quantity']]}"
        lines.append([name, *(number(value, ".3g") for value in numbers)])
    return table(lines, ["", "with Buffer, first", "last", "without, first", "last", "ratio of the first"])


def _examples(results: pd.DataFrame, count: int) -> str:
    lines = []
    for _, cell in results[~results.label.duplicated()].iterrows():
        seen = Counter()
        for example in cell.scores.get("examples") or []:
            kind = str(example.get("set", ""))
            seen[kind] += 1
            if seen[kind] <= count:
                texts = {key: literal(str(example.get(key, ""))) for key in ("prompt", "answer", "verdict")}
                lines.append({"model": cell.label, "prompts": kind} | texts)
    return table(lines) if lines else "None were stored."


def _cost_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, stage in stages.items():
        step, steps, tokens = (stage.get(key) for key in ("step_seconds_median", "steps", "tokens"))
        timed = is_finite(step) and step > 0 and steps and is_finite(tokens)
        counts = [number(stage.get(key), ",.0f") for key in ("rows", "dropped", "steps", "tokens", "answer_tokens")]
        times = [number(stage.get(key), ".1f") for key in ("seconds", "compile_seconds")]
        rate = number(tokens / steps / step if timed else None, ",.0f")
        lines.append([_name(name), *counts, *times, number(step, ".1f", scale=1000), rate])
    header = ["stage", "rows", "dropped", "steps", "tokens", "answer tokens", "seconds", "compile, s",
              "median step, ms", "tokens/s"]  # fmt: skip
    return table(lines, header) if lines else "No stage has written its stage.json."


def _provenance(run: Details) -> Iterable[str]:
    for title, key in (("Seeds", "seeds"), ("Versions", "versions"), ("Hashes (sha256)", "hashes")):
        entries = run.results.get(key) or {}
        listed = ", ".join(f"{entry} {literal(str(value))}" for entry, value in entries.items())
        yield f"{title}: {listed or 'not recorded'}."
    lines = []
    for name, stage in run.stages.items():
        inputs = ", ".join(f"{key} {_short(sha)}" for key, sha in (stage.get("inputs") or {}).items()) or "none"
        ends = _short(stage.get("output")), str(stage.get("finished", "n/a"))
        lines.append([_name(name), _short(stage.get("config_hash")), inputs, *ends])
    if lines:
        yield "Stages (the first 12 digits of each sha256; the stage.json files hold them whole):"
        yield table(lines, ["stage", "config", "inputs", "output", "finished"])
    yield "Which rows each stage trained on is in `rows.json`: where each comes from, and a hash of what it asks."
    yield "Configuration:"
    yield code(json.dumps(run.results.get("config") or {}, indent=2), "json")


def _name(stage: str) -> str:
    return figures.STAGES.get(stage, literal(stage))


def _short(sha: str | None) -> str:
    return f"`{sha[:12]}`" if sha else "n/a"
