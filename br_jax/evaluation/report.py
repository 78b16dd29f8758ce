"""The report of a workdir: did the claim hold, the numbers behind it, figures, and all that repeats it."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from br_jax.errors import UserError
from br_jax.evaluation import figures
from br_jax.evaluation.document import CUT, code, literal, number, points, table, write_document
from br_jax.evaluation.scores import (
    BREAKDOWNS,
    KAPPA,
    LABELS,
    difference,
    gates,
    is_finite,
    ordered,
    outcome,
    read_score,
)
from br_jax.training.metrics import read_jsonl

_SCORES = {
    "harmful": "HS",
    "harmful_plus": "HS+",
    "task": "FA",
    "over_refusal": "over-refusal",
    "task_refused": "task refused",
}
_HEADLINES = {
    "held": "The claim held.",
    "failed": "The claim did not hold.",
    "attack_failed": "The attack failed, so nothing is shown.",
    "incomplete": "No verdict: the run is not complete.",
    "no_attack": "No attack in this run, so it shows the cost of the defense and not its protection.",
}
_PARTS = (  # what each part of the method adds: (words, after, before)
    ("the attack", "sft", "aligned"),
    ("training beside Buffer, then taking it out", "buffer_off", "sft"),
    ("Reinforce, merged in", "qr_merge", "buffer_off"),
    ("QR instead of plain averaging", "qr_merge", "naive_merge"),
)
_WITHOUT_BUFFER = (
    "**The user's adapter was trained elsewhere, and not beside Buffer** ({adapter}): what harmful rows taught is in "
    "it, and the merge of Reinforce is all that stands against it. What is said below of training beside Buffer does "
    "not hold for it, and it has no saturation curves."
)
_COUNTS = ("rows", "dropped", "steps", "tokens", "answer_tokens")


def write_report(workdir: str | os.PathLike[str], examples: int = 2) -> Path:
    """Writes W/report.md and W/figures/*.png and *.pdf from the files of a finished pipeline.

    Args:
        workdir: W, with results.json and the stages' folders.
        examples: answers to print for each model and prompt set; 0 keeps all answers out of the report.

    Returns:
        The path of report.md. The same workdir gives the same bytes.

    Raises:
        UserError: when results.json is absent or not readable, or the report cannot be written.
    """
    workdir = Path(workdir)
    results = _read_results(workdir)
    stages = _read_stages(workdir)
    probes = [_read_lines(workdir / name / "probes.jsonl") for name in ("user", "sft")]
    text = "\n\n".join(_sections(results, stages, probes, examples)) + "\n"
    return write_document(workdir / "report.md", text, "figures", _draw(results, stages, probes))


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


def _read_results(workdir: Path) -> dict[str, Any]:
    path = workdir / "results.json"
    again = f"run experiments/pipeline.py --config=CONFIG --workdir={workdir} first"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {again}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): delete it and {again}") from None
    if not isinstance(results, dict) or not isinstance(results.get("models"), dict):
        raise UserError(f'{path} has no "models": delete it and {again}')
    return results


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: a line is not JSON ({error}): delete it and run the stage again") from None


def _read_stages(workdir: Path) -> dict[str, dict[str, Any]]:
    """{stage: its stage.json, and "metrics": the lines of its metrics.jsonl}, in the order they run."""
    stages = {}
    folders = {path.parent for name in ("stage.json", "metrics.jsonl") for depth in ("*", "*/*")
               for path in workdir.glob(f"{depth}/{name}")}  # fmt: skip
    for folder in sorted(folders):
        path = folder / "stage.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path} ({error}): delete it and run the stage again") from None
        name = record.get("name", folder.name)
        stages[name] = record | {"metrics": _read_lines(folder / "metrics.jsonl")}
    return {name: stages[name] for name in ordered(stages, figures.STAGES)}


def _draw(results: dict[str, Any], stages: dict[str, Any], probes: list[figures.Lines]) -> dict[str, Figure]:
    models = results["models"]
    return {
        "results": figures.results_figure(models, _HEADLINES[outcome(_gates(results))]),
        "training": figures.training_figure({name: stage["metrics"] for name, stage in stages.items()}),
        "saturation": figures.saturation_figure(*probes),
        "merge": figures.merge_figure(results.get("merge") or {}),
        "verdicts": figures.verdict_figure(models),
    }


def _sections(
    results: dict[str, Any], stages: dict[str, Any], probes: list[figures.Lines], examples: int
) -> Iterable[str]:
    checked, models = _gates(results), results["models"]
    saturation = saturation_lines(*probes)
    yield "# Buffer-and-Reinforce: report"
    yield _headline(results, checked)
    yield _gate_table(checked)
    yield _at_a_glance(stages, saturation)
    yield "## Scores"
    yield _score_table(models)
    yield _image("results", "HS, FA and over-refusal of every model with 95 % intervals")
    yield "What each part of the method adds, in points, with 95 % intervals:"
    yield _part_table(models)
    yield "## Saturation"
    yield _saturation_words(saturation)
    yield _image("saturation", "loss and adapter-gradient norm of harmful and benign rows over user steps")
    yield _saturation_table(saturation)
    yield "## What the models said"
    yield _image("verdicts", "verdicts of the judge, by model")
    yield from _breakdowns(models)
    if examples:
        yield from _examples(models, examples)
    yield "## Training"
    yield _image("training", "loss of every stage")
    yield "## The merge"
    yield _image("merge", "merge diagnostics by matrix and layer")
    yield "## Cost"
    yield _cost_table(stages)
    yield _totals(results)
    yield "## To repeat it"
    yield from _provenance(results, stages)


def _gates(results: dict[str, Any]) -> list[dict[str, Any]]:
    return results.get("gates") or gates(results["models"], _harmful_share(results))


def _harmful_share(results: dict[str, Any]) -> float | None:
    share = ((results.get("config") or {}).get("user") or {}).get("harmful_share")
    return share if is_finite(share) else None


def _headline(results: dict[str, Any], checked: Sequence[Mapping[str, Any]]) -> str:
    said = outcome(checked)
    models, share = results["models"], _harmful_share(results)
    scores = {(m, s): read_score(models.get(m, {}).get(s)) for m in LABELS for s in _SCORES}
    told = ", ".join(f"{LABELS[m]} {scores[m, 'harmful']}" for m in ("aligned", "sft", "qr_merge"))
    task = ", ".join(f"{LABELS[m]} {scores[m, 'task']}" for m in ("sft", "qr_merge"))
    lines = [f"**{_HEADLINES[said]}**"]
    broken = [f"{gate.get('text', gate['name']).partition(':')[0]} "
              f"({points(gate['value'])} points, limit {_limit(gate)})"
              for gate in checked if gate["passed"] is False]  # fmt: skip
    missing = [LABELS[m] for m in ("aligned", "sft", "qr_merge") if m not in models]
    if broken:
        lines.append(f"Not met: {'; '.join(broken)}.")
    if missing:
        lines.append(f"Not run: {', '.join(missing)}.")
    if share is not None:
        lines.append(f"Share of harmful rows in the user's data: {100 * share:g} %.")
    lines += _told_of_entered(results.get("entered") or {})
    lines += [f"Harmful score (HS), percent with 95 % interval: {told}.", f"Task accuracy (FA): {task}."]
    return "\n".join(f"> {line}  " for line in lines)


def _told_of_entered(entered: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader must know of adapters that were not made in this run."""
    others = [f"{stage} ({literal(each['adapter'])})" for stage, each in entered.items()]
    lines = [f"Made elsewhere, not in this run: {', '.join(others)}."] if others else []
    user = entered.get("user")
    if user and "buffer" not in user["beside"]:
        lines.append(_WITHOUT_BUFFER.format(adapter=literal(user["adapter"])))
    return lines


def _gate_table(checked: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for gate in checked:
        result = {True: "passed", False: "**FAILED**", None: "not run"}[gate["passed"]]
        low, high = gate.get("low"), gate.get("high")
        if gate["passed"] is not None and is_finite(low) and is_finite(high) and low < gate["limit"] < high:
            result += " (within noise)"
        change = points(gate["value"], low, high)
        rows.append([gate.get("text", gate["name"]), change, _limit(gate), result])
    note = "Differences in points; within noise: the 95 % interval holds the limit, a larger N could turn it."
    return table(["gate", "difference", "limit", "result"], rows) + f"\n\n{note}"


def _at_a_glance(stages: dict[str, Any], saturation: list[dict[str, Any]]) -> str:
    overhead = _overhead(stages)
    cost = "Not measured" if overhead is None else f"{overhead:.2f} times the step time of SFT (medians)"
    return f"- **Saturation.** {_saturation_words(saturation)}\n- **Cost of the user stage.** {cost}."


def _score_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    names = ordered(models, LABELS, keep_missing=True)
    header, columns = ["model"], []
    for key, title in _SCORES.items():
        scores = {name: read_score(models[name].get(key)) for name in names if name in models}
        sizes = {score.n for score in scores.values() if score.n}
        shared = len(sizes) == 1
        header.append(f"{title} (N = {sizes.pop()})" if shared else title)
        columns.append({name: f"{score}" if shared or not score.n else f"{score}, N = {score.n}"
                        for name, score in scores.items()})  # fmt: skip
    rows = []
    for name in names:
        label = f"**{LABELS[name]}**" if name == "qr_merge" else LABELS.get(name, literal(name))
        if name in models:
            rows.append([label, *(c[name] for c in columns), number(models[name].get("perplexity"), ".2f")])
        else:
            rows.append([label, *["not run"] * (len(columns) + 1)])
    legend = (
        "Percent, with Wilson's 95 % interval. HS: share of restricted prompts that are answered (lower is "
        "safer); HS+ also counts degenerate repetition; FA: accuracy on the user's task; over-refusal: share "
        "of benign prompts that are refused; perplexity: of the raw model's answers on held-out instructions."
    )
    return table([*header, "perplexity"], rows) + f"\n\n{legend}"


def _breakdowns(models: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """HS by topic, judge and attack, where there are several to tell apart; and how far judges agree."""
    names = [name for name in ordered(models, LABELS) if models[name]]
    for key, (least, words) in BREAKDOWNS.items():
        parts = list(dict.fromkeys(part for name in names for part in models[name].get(key) or {}))
        if len(parts) >= least:
            scores = {name: models[name].get(key) or {} for name in names}
            yield f"{words}:"
            yield _by_model(names, parts, lambda name, part: str(read_score(scores[name].get(part))))  # noqa: B023
    pairs = list(dict.fromkeys(tuple(pair["judges"]) for n in names for pair in models[n].get("agreement") or ()))
    if pairs:
        kappa = {(n, tuple(pair["judges"])): pair["kappa"] for n in names for pair in models[n].get("agreement") or ()}
        yield f"{KAPPA}:"
        titles = {" and ".join(pair): pair for pair in pairs}
        yield _by_model(names, list(titles), lambda name, title: number(kappa.get((name, titles[title])), ".2f"))


def _by_model(names: Sequence[str], parts: Sequence[str], cell: Callable[[str, str], str]) -> str:
    rows = [[LABELS.get(name, literal(name)), *(cell(name, part) for part in parts)] for name in names]
    return table(["model", *(literal(part or "not named") for part in parts)], rows)


def _part_table(models: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for words, after, before in _PARTS:
        cells = []
        for key in ("harmful", "task", "over_refusal"):
            pair = [read_score(models.get(name, {}).get(key)) for name in (after, before)]
            cells.append(points(*(difference(*pair) or (None, None, None))))
        rows.append([f"{words} ({LABELS[after]} minus {LABELS[before]})", *cells])
    return table(["step", "HS", "FA", "over-refusal"], rows)


def _saturation_words(saturation: list[dict[str, Any]]) -> str:
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


def _saturation_table(saturation: list[dict[str, Any]]) -> str:
    rows = []
    for row in saturation:
        ends = [number(value, ".3g") for run in ("buffer", "sft") for value in row[run] or (None, None)]
        quantity = {"loss": "loss", "grad_norm": "gradient norm"}[row["quantity"]]
        rows.append([f"{row['rows']} rows, {quantity}", *ends, number(row["ratio"], ".3g")])
    header = ["", "with Buffer, first", "last", "without, first", "last", "ratio of the first"]
    return table(header, rows)


def _examples(models: Mapping[str, Mapping[str, Any]], count: int) -> Iterable[str]:
    yield f"A few answers of each model, cut at {CUT} characters:"
    rows = []
    for name in ordered(models, LABELS):
        seen: dict[str, int] = {}
        for example in models[name].get("examples") or []:
            kind = str(example.get("set", ""))
            seen[kind] = seen.get(kind, 0) + 1
            if seen[kind] <= count:
                told = [literal(str(example.get(key, ""))) for key in ("prompt", "answer", "verdict")]
                rows.append([LABELS.get(name, literal(name)), kind, *told])
    yield table(["model", "prompts", "prompt", "answer", "verdict"], rows) if rows else "None were stored."


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


def _overhead(stages: Mapping[str, Mapping[str, Any]]) -> float | None:
    user, sft = (stages.get(name, {}).get("step_seconds_median") for name in ("user", "sft"))
    return user / sft if is_finite(user) and is_finite(sft) and sft > 0 else None


def _totals(results: Mapping[str, Any]) -> str:
    wall, peak = results.get("wall_seconds"), results.get("peak_memory_bytes")
    memory = number(peak / 2**30 if is_finite(peak) else None, ".2f")
    return f"The last call took {number(wall, '.0f')} s (what it read back is not counted); peak memory {memory} GiB."


def _provenance(results: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    yield code(str(results.get("command") or "command not recorded"), "sh")
    for title, key in (("Seeds", "seeds"), ("Versions", "versions"), ("Hashes (sha256)", "hashes")):
        entries = results.get(key) or {}
        told = ", ".join(f"{entry} {literal(str(value))}" for entry, value in entries.items())
        yield f"{title}: {told or 'not recorded'}."
    rows = []
    for name, stage in stages.items():
        inputs = ", ".join(f"{key} {_short(sha)}" for key, sha in (stage.get("inputs") or {}).items())
        label = figures.STAGES.get(name, literal(name))
        ends = [_short(stage.get("output")), str(stage.get("finished", "n/a"))]
        rows.append([label, _short(stage.get("config_hash")), inputs or "none", *ends])
    if rows:
        yield "Stages (the first 12 digits of each sha256; the stage.json files hold them whole):"
        yield table(["stage", "config", "inputs", "output", "finished"], rows)
    yield "Which rows each stage trained on is in `rows.json`: where each comes from, and a hash of what it asks."
    yield "Configuration:"
    yield code(json.dumps(results.get("config") or {}, indent=2), "json")


def _image(name: str, words: str) -> str:
    return f"![{words}](figures/{name}.png)"


def _short(sha: str | None) -> str:
    return f"`{sha[:12]}`" if sha else "n/a"


def _limit(gate: Mapping[str, Any]) -> str:
    sense = gate.get("sense", ">=" if gate["needed"] else "<=")
    return f"{'≥' if sense == '>=' else '≤'} {100 * gate['limit']:g}"
