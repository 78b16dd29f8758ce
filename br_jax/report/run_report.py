"""What templates/run.md.jinja says of one run: saturation, answers, training, the merge, cost, how to repeat it."""

import itertools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from br_jax.core.io import read_jsonl
from br_jax.core.records import read_record
from br_jax.report import run_figures as figures
from br_jax.report.markdown import literal, number
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


def values(run: Details, results: pd.DataFrame, examples: int) -> dict[str, Any]:
    """What is said of a run, with so many answers of each model and prompt set."""
    saturation, rows = saturation_lines(*run.probes), []
    for line in saturation:
        numbers = *(line["buffer"] or (None, None)), *(line["sft"] or (None, None)), line["ratio"]
        name = f"{line['rows']} rows, {_QUANTITIES[line['quantity']]}"
        rows.append([name, *(number(value, ".3g") for value in numbers)])
    user, sft = (run.stages.get(name, {}).get("step_seconds_median") for name in ("user", "sft"))
    harmful, benign = (line for line in saturation if line["quantity"] == "grad_norm")
    names = {name: {"stage": figures.STAGES.get(name, literal(name))} for name in run.stages}
    return {
        "warnings": warnings(run),
        "harmful": harmful,
        "benign": benign,
        "saturation": rows,
        "examples": _examples(results, examples),
        "slower": user / sft if is_finite(user) and is_finite(sft) and sft > 0 else None,
        "costs": [names[name] | _cost(stage) for name, stage in run.stages.items()],
        "stages": [names[name] | _origin(stage) for name, stage in run.stages.items()],
        "results": run.results,
        "config": json.dumps(run.results.get("config") or {}, indent=2),
    }


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
        line = {"rows": rows, "quantity": quantity}
        line |= {name: (found[0], found[-1]) if found else None for name, found in (("buffer", buffer), ("sft", sft))}
        line |= {"ratio": buffer[0] / start if measured else None, "peak": max(buffer) / start if measured else None}
        lines.append(line)
    return lines


def _examples(results: pd.DataFrame, count: int) -> list[dict[str, str]]:
    lines = []
    for _, cell in results[~results.label.duplicated()].iterrows():
        seen = Counter()
        for example in cell.scores.get("examples") or []:
            kind = str(example.get("set", ""))
            seen[kind] += 1
            if seen[kind] <= count:
                texts = {key: literal(str(example.get(key, ""))) for key in ("prompt", "answer", "verdict")}
                lines.append({"model": cell.label, "prompts": kind} | texts)
    return lines


def _cost(stage: Mapping[str, Any]) -> dict[str, str]:
    step, steps, tokens = (stage.get(key) for key in ("step_seconds_median", "steps", "tokens"))
    timed = is_finite(step) and step > 0 and steps and is_finite(tokens)
    counts = ("rows", "dropped", "steps", "tokens", "answer_tokens")
    return {key.replace("_", " "): number(stage.get(key), ",.0f") for key in counts} | {
        "seconds": number(stage.get("seconds"), ".1f"),
        "compile, s": number(stage.get("compile_seconds"), ".1f"),
        "median step, ms": number(step, ".1f", scale=1000),
        "tokens/s": number(tokens / steps / step if timed else None, ",.0f"),
    }


def _origin(stage: Mapping[str, Any]) -> dict[str, str]:
    inputs = (f"{key} {_short(sha)}" for key, sha in (stage.get("inputs") or {}).items())
    return {
        "config": _short(stage.get("config_hash")),
        "inputs": ", ".join(inputs) or "none",
        "output": _short(stage.get("output")),
        "finished": str(stage.get("finished", "n/a")),
    }


def _short(sha: str | None) -> str:
    return f"`{sha[:12]}`" if sha else "n/a"
