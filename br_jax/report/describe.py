"""What a file or folder is, without loading a model: read from configs and headers; pickles are named, never opened."""

import dataclasses
import functools
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from tabulate import tabulate

from br_jax.adapters import lora, peft
from br_jax.adapters.diagnostics import components, measure, similarity
from br_jax.core.errors import UserError
from br_jax.core.io import PICKLES, TensorKinds, safetensors_header
from br_jax.core.records import file_hash, read_record
from br_jax.models.io.gguf import describe_gguf
from br_jax.models.io.hf import read_hf_spec, read_tokenizer, weight_files
from br_jax.models.spec import ModelSpec
from br_jax.provider import PROVIDER_FILE, read_provider
from br_jax.report import plots

MAX_LAYERS = 1000  # a file that says more would have as many made up in memory
TAU = 0.01  # the release's rank check, see `qr_merge`
_BUFFER = {
    True: "yes, keep it in the provider's folder",
    False: "no, by its own account: its numbers were not compared, see --provider",
    None: "not recorded: its numbers were not compared, see --provider",
}


def describe(path: str | Path, provider: str | Path | None = None) -> dict[str, Any]:
    """Says what a path holds, ready for JSON; a `UserError` where it is pickled, damaged, or nothing known.

    Args:
        path: a model's folder, a GGUF file, a provider's folder, an adapter's folder, a .safetensors file, or the
            folder of a run or of one stage of it.
        provider: a provider's folder, with whose Buffer an adapter is compared.

    Returns:
        "path", "kind", "facts" (name -> value), "rows" (a table: one dict a target, stage or tensor) and, for an
        adapter, "spectra" (target -> the singular values of its delta in each layer that it changes).
    """
    path, (kind, read) = Path(path), _find_reader(Path(path))
    found = {"path": str(path), "kind": kind, "rows": [], **read(path)}
    if kind == "adapter" and provider is not None:
        known = read_provider(Path(provider)).get("buffer")
        if known is None:
            raise UserError(f"{provider}: records no Buffer to compare with: give the folder in which it was trained")
        buffer, adapter = (_load_adapter(each)[0] for each in (Path(provider, known["folder"]), path))
        found_in_it = similarity(components(buffer), adapter)
        found["facts"] |= {"holds_a_buffer": found_in_it.is_buffer, "like_the_buffer": found_in_it._asdict()}
    return found


def render(description: Mapping[str, Any]) -> str:
    """A description as plain text: the facts, one a line, then the table."""
    facts, rows = {"kind": description["kind"], **description["facts"]}, description["rows"]
    table = functools.partial(tabulate, tablefmt="plain", disable_numparse=True)
    text = table([(name.replace("_", " "), _text(value)) for name, value in facts.items()])
    if rows:
        cells = [["-" if value is None else _text(value) for value in row.values()] for row in rows]
        text += "\n\n" + table(cells, headers=[name.replace("_", " ") for name in rows[0]])
    return _text(description["path"]) + "\n" + textwrap.indent(text, "  ")


def plot_spectra(description: Mapping[str, Any], file: str | Path) -> list[Path]:
    """Draws the singular values of an adapter that was described, as a PNG and a PDF; gives their paths."""
    if "spectra" not in description:
        raise UserError(f"{description['path']}: spectra are an adapter's, this is of the kind {description['kind']}")
    facts, file = description["facts"], Path(file)
    title = f"{_text(facts['roles'])}, rank {facts['rank']}, on {_text(facts['base'])}"
    file.parent.mkdir(parents=True, exist_ok=True)
    return plots.save(plots.spectra_figure(description["spectra"], title), file)


def _find_reader(path: Path) -> tuple[str, Callable[[Path], dict[str, Any]]]:
    """The kind of what a path is, and what describes it."""
    if path.is_dir():
        for kind, (marks, read) in _FOLDERS.items():
            if any(any(path.glob(mark)) for mark in marks):
                return kind, read
        marks = ", ".join(mark for marks, _ in _FOLDERS.values() for mark in marks)
        pickled = f"; {_pickles(path)[0]} is pickled, can run code and is not opened" if _pickles(path) else ""
        raise UserError(f"{path}: not known: none of {marks} is in it{pickled}")
    path.stat()  # an error where nothing is
    if path.suffix not in _FILES:
        files = "a file must be .gguf or .safetensors, anything else a folder"
        raise UserError(f"{path}: not known: {files}; a pickle, which can run code, is not opened")
    return path.suffix[1:], _FILES[path.suffix]


def _describe_model(folder: Path) -> dict[str, Any]:
    spec, files = read_hf_spec(folder), weight_files(folder)
    tokenizer = read_tokenizer(folder, spec)
    tensors = {name: tensor for file in files for name, tensor in safetensors_header(file)[0].items()}
    facts = _model_facts(spec) | _weights_facts(files, tensors) | {"shards": len(files), "tokens": len(tokenizer)}
    facts |= {"chat_template": tokenizer.chat_template is not None, "pickles_not_opened": _pickles(folder)}
    return {"facts": facts}


def _describe_gguf(file: Path) -> dict[str, Any]:
    spec, header = describe_gguf(file)
    return {"facts": _model_facts(spec) | header | {"bytes": file.stat().st_size}}


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    """The spec by its own names, but for what is off."""
    facts = {name: value for name, value in dataclasses.asdict(spec).items() if value not in (None, ())}
    return facts | {"windowed": sum(spec.window_layers), "parameters": spec.num_params}


def _describe_safetensors(file: Path) -> dict[str, Any]:
    header, notes = safetensors_header(file)
    rows = [{"tensor": name, "dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in header.items()]
    return {"facts": _weights_facts([file], header) | {"sha256": file_hash(file), "notes": notes}, "rows": rows}


def _describe_provider(folder: Path) -> dict[str, Any]:
    record = read_provider(folder)
    names = ("base", "revision", "align", "buffer", "reinforce", "template", "dtype", "fingerprint")
    private = {"only_its_owner_may_enter": not folder.stat().st_mode & 0o077}
    return {"facts": {name: record.get(name) for name in names} | private, "rows": _stages(folder)}


def _describe_workdir(folder: Path) -> dict[str, Any]:
    results, scored = _record(folder / "results.json"), sorted(file.stem for file in folder.glob("cells/*.json"))
    facts = {"scored": scored, "command": results.get("command"), "seconds": results.get("wall_seconds")}
    return {"facts": facts, "rows": _stages(folder)}


def _describe_stage(folder: Path) -> dict[str, Any]:
    run, facts = _record(folder / "run.json"), _stage(folder)
    for part in ("inputs", "config"):
        if not isinstance(settings := run.get(part, {}), dict):
            raise UserError(f"{folder / 'run.json'}: {part} must be an object: run the stage again")
        facts |= {f"{part}_{name}": value for name, value in settings.items()}
    return {"facts": facts}


def _stages(folder: Path) -> list[dict[str, Any]]:
    """The stages whose folders are in one, the earliest first; what is not finished comes last."""
    found = sorted({file.parent for name in ("run.json", "stage.json") for file in folder.glob(f"*/{name}")})
    return sorted(map(_stage, found), key=lambda stage: str(stage["finished"] or "~"))


def _stage(folder: Path) -> dict[str, Any]:
    ended = _record(folder / "stage.json")
    saved = [int(entry.name) for entry in folder.glob("checkpoints/*") if entry.name.isdecimal()]
    state = "finished" if ended else f"stopped, goes on from step {max(saved)}" if saved else "begun"
    return {"stage": folder.name, "state": state, **{k: ended.get(k) for k in ("rows", "steps", "loss", "finished")}}


def _record(file: Path) -> dict[str, Any]:
    return read_record(file) if file.exists() else {}


def _load_adapter(folder: Path) -> tuple[lora.Adapter, TensorKinds, dict[str, dict[int, int]]]:
    """An adapter without its base, whose sizes are taken from its own; its header; and path -> layer -> rank.

    A half of a pair that is missing counts as of width 0, so that `peft.load_adapter` says which one.
    """
    peft.read_provenance(folder)  # which refuses a folder of pickles
    header, _ = safetensors_header(file := folder / peft.WEIGHTS_FILE)
    widths, ranks = {}, {}
    for key, (_, shape) in header.items():
        match = peft.KEY.fullmatch(key)
        if match and match[2] in peft.PATHS and len(shape) == 2:
            path, layer, half = peft.PATHS[match[2]], int(match[1]), match[3]
            if layer >= MAX_LAYERS:
                raise UserError(f"{file}: has a tensor of layer {layer:,}: no model has as many")
            rank, width = shape if half == "A" else reversed(shape)
            widths.setdefault(path, {"A": 0, "B": 0})[half] = width
            ranks.setdefault(path, {})[layer] = rank
    layers = 1 + max((layer for of_layer in ranks.values() for layer in of_layer), default=-1)
    kernels = {f"{p}/kernel": jax.ShapeDtypeStruct((layers, *each.values()), np.float32) for p, each in widths.items()}
    return peft.load_adapter(folder, traverse_util.unflatten_dict(kernels, sep="/")), header, ranks


def _describe_adapter(folder: Path) -> dict[str, Any]:
    file, config_file = folder / peft.WEIGHTS_FILE, folder / peft.CONFIG_FILE
    (adapter, header, ranks), provenance = _load_adapter(folder), peft.read_provenance(folder)
    config, roles = peft.read_config(config_file), provenance.get("roles")
    rows, spectra, figures = [], {}, measure(adapter, TAU)
    for path in filter(figures.get, peft.MODULES):
        layers, target, pair = sorted(ranks[path]), path.rsplit("/", 1)[-1], adapter.weights[path]
        measured = {name: values[layers] for name, values in figures[path].items()}
        # squares in float64: in f32 those of a small adapter would be 0
        norms = np.sqrt(np.square(measured["sigma"], dtype=np.float64).sum(axis=-1))
        spectra[target] = measured["sigma"].tolist()
        row = {"target": target, "in": pair["a"].shape[1], "out": pair["b"].shape[2], "layers": len(layers)}
        row |= {"rank": sorted(set(ranks[path].values())), "mean_norm": float(norms.mean())}
        row |= {"largest_norm": float(norms.max()), "at_layer": layers[int(norms.argmax())]}
        rows.append(row | {name: float(measured[name].mean()) for name in ("stable_rank", "effective_rank")})
    facts = {
        "roles": roles,
        "holds_a_buffer": _BUFFER[None if roles is None else "buffer" in roles],
        "rank": int(config["r"]),
    }
    facts |= {"alpha": config["lora_alpha"], "scale": float(adapter.scale), "layers": len(set().union(*ranks.values()))}
    facts |= {"base": config.get("base_model_name_or_path")}
    facts |= {name: provenance.get(name) or None for name in ("base_fingerprint", "extra")}
    facts |= {"sha256": file_hash(file), "pickles_not_opened": _pickles(folder)}
    return {"facts": facts | _weights_facts([file], header), "rows": rows, "spectra": spectra}


def _weights_facts(files: Sequence[Path], header: TensorKinds) -> dict[str, Any]:
    sizes = {"tensors": len(header), "parameters": sum(math.prod(shape) for _, shape in header.values())}
    dtypes = Counter(dtype for dtype, _ in header.values())
    return sizes | {"dtypes": dict(dtypes), "bytes": sum(file.stat().st_size for file in files)}


def _pickles(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)


def _text(value: Any) -> str:
    match value:
        case None:
            return "not recorded"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case dict():
            return ", ".join(f"{_text(name)} {_text(each)}" for name, each in value.items()) or "none"
        case list() | tuple():
            return ", ".join(map(_text, value)) or "none"
    # names and notes come from anyone's file: what a terminal would obey is not printed
    return "".join(c if c.isprintable() else "?" for c in str(value))


_FILES = {".gguf": _describe_gguf, ".safetensors": _describe_safetensors}
_FOLDERS = {  # kind -> files, any of which makes a folder that kind, and what reads it; the first kind that fits counts
    "provider": ([PROVIDER_FILE], _describe_provider),
    "adapter": ([peft.CONFIG_FILE, peft.WEIGHTS_FILE], _describe_adapter),
    "model": (["config.json"], _describe_model),
    "stage": (["run.json", "stage.json"], _describe_stage),
    "workdir": (["results.json", "*/run.json"], _describe_workdir),
}
