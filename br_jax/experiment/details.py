"""What a report says of one run beside its scores: saturation, answers, training, the merge, cost, how to repeat it."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from br_jax.experiment import run_figures as figures
from br_jax.experiment.document import CUT, code, literal, number, table
from br_jax.experiment.frame import Frame
from br_jax.files import read_json, read_jsonl
from br_jax.statistics import is_finite

_WITHOUT_BUFFER = (
    "**The user's adapter was trained elsewhere, and not beside Buffer** ({adapter}): what harmful rows taught is in "
    "it, and the merge of Reinforce is all that stands against it. What is said below of training beside Buffer does "
    "not hold for it, and it has no saturation curves."
)
_COUNTS = ("rows", "dropped", "steps", "tokens", "answer_tokens")


@dataclasses.dataclass(frozen=True)
class Details:
    """The files of one run.

    Attributes:
        results: results.json; empty when the run was not scored by experiments/pipeline.py.
        stages: name -> its stage.json, and "metrics": the lines of its metrics.jsonl.
        probes: lines of probes.jsonl, of the user stage and of SFT.
    """

    results: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    probes: tuple[figures.Lines, figures.Lines]

    @property
    def command(self) -> str:
        """That made it; "" where that is not recorded."""
        return str(self.results.get("command") or "")


def read(workdir: Path) -> Details:
    """Reads a run's folder.

    Raises:
        UserError: a file is damaged.
    """
    cure = "delete it and run the same command again"
    results = read_json(workdir / "results.json", cure) if (workdir / "results.json").exists() else {}
    stages = {}
    folders = {path.parent for name in ("stage.json", "metrics.jsonl") for depth in ("*", "*/*")
               for path in workdir.glob(f"{depth}/{name}")}  # fmt: skip
    for folder in sorted(folders):
        record = read_json(folder / "stage.json", cure) if (folder / "stage.json").exists() else {}
        stages[record.get("name", folder.name)] = record | {"metrics": read_jsonl(folder / "metrics.jsonl")}
    probes = (read_jsonl(workdir / name / "probes.jsonl") for name in ("user", "sft"))
    return Details(results, {name: stages[name] for name in figures.in_order(stages)}, tuple(probes))


def draw(run: Details, frame: Frame) -> dict[str, Figure]:
    """The figures of a run by name."""
    counts = {row.label: one.get("verdicts") or {} for rows in frame.values() for row in rows
              for one in row.scores.values()}  # fmt: skip
    return {
        "training": figures.training_figure({name: stage["metrics"] for name, stage in run.stages.items()}),
        "saturation": figures.saturation_figure(*run.probes),
        "merge": figures.merge_figure(run.results.get("merge") or {}),
        "verdicts": figures.verdict_figure(counts),
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


def sections(run: Details, frame: Frame, examples: int) -> Iterable[str]:
    """The sections of a run.

    Args:
        run: its files.
        frame: its cells.
        examples: answers to print for each model and prompt set.
    """
    saturation = saturation_lines(*run.probes)
    yield "## Saturation"
    yield _saturation_words(saturation)
    yield _image("saturation", "loss and adapter-gradient norm of harmful and benign rows over user steps")
    yield _saturation_table(saturation)
    yield "## What the models said"
    yield _image("verdicts", "verdicts of the judge, by model")
    if examples:
        yield from _examples(frame, examples)
    yield "## Training"
    yield _image("training", "loss of every stage")
    yield "## The merge"
    yield _image("merge", "merge diagnostics by matrix and layer")
    yield "## Cost"
    user, sft = (run.stages.get(name, {}).get("step_seconds_median") for name in ("user", "sft"))
    if is_finite(user) and is_finite(sft) and sft > 0:
        yield f"A step beside Buffer takes {user / sft:.2f} times the time of SFT's (medians)."
    yield _cost_table(run.stages)
    wall, peak = run.results.get("wall_seconds"), run.results.get("peak_memory_bytes")
    memory = number(peak / 2**30 if is_finite(peak) else None, ".2f")
    yield f"The last call took {number(wall, '.0f')} s (what it read back is not counted); peak memory {memory} GiB."
    yield "## To repeat it"
    yield from _provenance(run)


def saturation_lines(with_buffer: figures.Lines, without: figures.Lines) -> list[dict[str, Any]]:
    """First and last probe of each kind of row and quantity, with and without Buffer.

    Args:
        with_buffer: lines of the user stage's probes.jsonl ("step", "rows", "loss", "grad_norm").
        without: the same of plain SFT.

    Returns:
        Dicts with "rows", "quantity", "buffer" and "sft" (each (first, last), None where there is no probe),
        "ratio" (buffer's first over sft's first) and "peak" (buffer's largest over sft's first), both None
        where a number they need is absent or not finite.
    """
    found = []
    for rows in ("harmful", "benign"):
        for quantity in ("loss", "grad_norm"):
            buffer, sft = ([line.get(quantity) for line in sorted(lines, key=lambda line: line["step"])
                            if line.get("rows") == rows] for lines in (with_buffer, without))  # fmt: skip
            start = sft[0] if sft and is_finite(sft[0]) and sft[0] > 0 else None
            whole = start and buffer and all(is_finite(value) for value in buffer)
            found.append({"rows": rows, "quantity": quantity,
                          "buffer": (buffer[0], buffer[-1]) if buffer else None,
                          "sft": (sft[0], sft[-1]) if sft else None,
                          "ratio": buffer[0] / start if whole else None,
                          "peak": max(buffer) / start if whole else None})  # fmt: skip
    return found


def _saturation_words(saturation: Sequence[Mapping[str, Any]]) -> str:
    found = {(row["rows"], row["quantity"]): row for row in saturation}
    harmful, benign = found["harmful", "grad_norm"], found["benign", "grad_norm"]
    if harmful["ratio"] is None:
        return "Not measured: it needs finite harmful-row probes of both the user stage and SFT."
    below = harmful["peak"] < 1
    words = (
        f"At the first step the gradient of harmful rows with Buffer is {harmful['ratio']:.3g} times the one "
        f"without; over the run it reaches at most {harmful['peak']:.3g} times that start, so it "
        f"{'stays' if below else 'does **not** stay'} below it."
    )
    if benign["ratio"] is not None:
        words += f" The gradient of benign rows starts at {benign['ratio']:.3g} times theirs without Buffer."
    return words


def _saturation_table(saturation: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in saturation:
        ends = [number(value, ".3g") for run in ("buffer", "sft") for value in row[run] or (None, None)]
        quantity = {"loss": "loss", "grad_norm": "gradient norm"}[row["quantity"]]
        rows.append([f"{row['rows']} rows, {quantity}", *ends, number(row["ratio"], ".3g")])
    header = ["", "with Buffer, first", "last", "without, first", "last", "ratio of the first"]
    return table(header, rows)


def _examples(frame: Frame, count: int) -> Iterable[str]:
    yield f"A few answers of each model, cut at {CUT} characters:"
    lines = []
    for row in (row for rows in frame.values() for row in rows):
        seen: dict[str, int] = {}
        for example in next(iter(row.scores.values())).get("examples") or []:
            kind = str(example.get("set", ""))
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= count:
                told = [literal(str(example.get(key, ""))) for key in ("prompt", "answer", "verdict")]
                lines.append([row.label, kind, *told])
    yield table(["model", "prompts", "prompt", "answer", "verdict"], lines) if lines else "None were stored."


def _cost_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, stage in stages.items():
        step = stage.get("step_seconds_median")
        timed = is_finite(step) and step > 0 and stage.get("steps") and is_finite(stage.get("tokens"))
        rate = stage["tokens"] / stage["steps"] / step if timed else None
        counts = [number(stage.get(key), ",.0f") for key in _COUNTS]
        times = [number(stage.get("seconds"), ".1f"), number(stage.get("compile_seconds"), ".1f"),
                 number(1000 * step if is_finite(step) else None, ".1f"), number(rate, ",.0f")]  # fmt: skip
        rows.append([figures.STAGES.get(name, literal(name)), *counts, *times])
    header = ["stage", "rows", "dropped", "steps", "tokens", "answer tokens", "seconds", "compile, s",
              "median step, ms", "tokens/s"]  # fmt: skip
    return table(header, rows) if rows else "No stage has written its stage.json."


def _provenance(run: Details) -> Iterable[str]:
    for title, key in (("Seeds", "seeds"), ("Versions", "versions"), ("Hashes (sha256)", "hashes")):
        entries = run.results.get(key) or {}
        told = ", ".join(f"{entry} {literal(str(value))}" for entry, value in entries.items())
        yield f"{title}: {told or 'not recorded'}."
    rows = []
    for name, stage in run.stages.items():
        inputs = ", ".join(f"{key} {_short(sha)}" for key, sha in (stage.get("inputs") or {}).items())
        label = figures.STAGES.get(name, literal(name))
        ends = [_short(stage.get("output")), str(stage.get("finished", "n/a"))]
        rows.append([label, _short(stage.get("config_hash")), inputs or "none", *ends])
    if rows:
        yield "Stages (the first 12 digits of each sha256; the stage.json files hold them whole):"
        yield table(["stage", "config", "inputs", "output", "finished"], rows)
    yield "Which rows each stage trained on is in `rows.json`: where each comes from, and a hash of what it asks."
    yield "Configuration:"
    yield code(json.dumps(run.results.get("config") or {}, indent=2), "json")


def _image(name: str, words: str) -> str:
    return f"![{words}](figures/{name}.png)"


def _short(sha: str | None) -> str:
    return f"`{sha[:12]}`" if sha else "n/a"
