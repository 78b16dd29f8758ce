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
from br_jax.adapters.diagnostics import measure
from br_jax.adapters.guard import is_buffer
from br_jax.adapters.likeness import Reference
from br_jax.adapters.peft_config import read_config
from br_jax.core.errors import UserError
from br_jax.core.io import PICKLES, TensorKinds, read_json, reading, safetensors_header, writing
from br_jax.core.records import file_hash, read_record
from br_jax.models.io.gguf import describe_gguf
from br_jax.models.io.hf import read_hf_spec, read_tokenizer, weight_files
from br_jax.models.spec import ModelSpec
from br_jax.provider.folder import PROVIDER_FILE, read_provider
from br_jax.report import plots

MAX_LAYERS = 1000  # a file that says more would have as many made up in memory
TAU = 0.01  # the release's rank check, see `qr_merge`
_BUFFER = {
    True: "yes, keep it in the provider's folder",
    False: "no, by its own account: its numbers were not compared, see --provider",
    None: "not recorded: its numbers were not compared, see --provider",
}


def describe(path: str | Path, provider: str | Path | None = None) -> dict[str, Any]:
    """Says what a path holds.

    Args:
        path: a model's folder, a GGUF file, a provider's folder, an adapter's folder, a .safetensors file, or the
            folder of a run or of one stage of it.
        provider: a provider's folder, with whose Buffer an adapter is compared.

    Returns:
        Ready for JSON: "path", "kind", "facts" (name -> value), "rows" (a table: one dict a target, stage or tensor)
        and, for an adapter, "spectra" (target -> the singular values of its delta in each layer that it changes).

    Raises:
        UserError: none of these, pickled, damaged, or not to be read.
    """
    path = Path(path)
    with reading(path):
        kind, read = _find_reader(path)
        found = {"path": str(path), "kind": kind, "rows": [], **read(path)}
        if kind == "adapter" and provider is not None:
            found["facts"] |= _compared(path, Path(provider))
        return found


def render(description: Mapping[str, Any]) -> str:
    """A description as plain text: the facts, one a line, then the table."""
    facts, rows = {"kind": description["kind"], **description["facts"]}, description["rows"]
    spaced = lambda names: [name.replace("_", " ") for name in names]  # noqa: E731
    table = functools.partial(tabulate, tablefmt="plain", disable_numparse=True)
    text = table(zip(spaced(facts), map(_text, facts.values()), strict=True))
    if rows:
        cells = [["-" if value is None else _text(value) for value in row.values()] for row in rows]
        text += "\n\n" + table(cells, headers=spaced(rows[0]))
    return _text(description["path"]) + "\n" + textwrap.indent(text, "  ")


def plot_spectra(description: Mapping[str, Any], file: str | Path) -> list[Path]:
    """Draws the singular values of an adapter that was described, as a PNG and a PDF; gives their paths."""
    if "spectra" not in description:
        raise UserError(f"{description['path']}: spectra are an adapter's, this is of the kind {description['kind']}")
    facts, file = description["facts"], Path(file)
    title = f"{_text(facts['roles'])}, rank {facts['rank']}, on {_text(facts['base'])}"
    with writing(file, "choose another place"):
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
        raise UserError(
            f"{path}: not known: a file must be .gguf or .safetensors, anything else a folder; a pickle, which can run "
            "code, is not opened"
        )
    return path.suffix[1:], _FILES[path.suffix]


def _describe_model(folder: Path) -> dict[str, Any]:
    spec, files = read_hf_spec(folder), weight_files(folder)
    tokenizer = read_tokenizer(folder, spec)
    tensors = {name: tensor for file in files for name, tensor in safetensors_header(file)[0].items()}
    facts = {
        "shards": len(files),
        "tokens": len(tokenizer),
        "chat_template": tokenizer.chat_template is not None,
        "pickles_not_opened": _pickles(folder),
    }
    return {"facts": _model_facts(spec) | _weights_facts(files, tensors) | facts}


def _describe_gguf(file: Path) -> dict[str, Any]:
    spec, header = describe_gguf(file)
    return {"facts": _model_facts(spec) | header | {"bytes": file.stat().st_size}}


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    """The spec by its own names, but for what is off."""
    facts = {name: value for name, value in dataclasses.asdict(spec).items() if value not in (None, ())}
    return facts | {"windowed": sum(spec.window_layers), "parameters": spec.num_params}


def _describe_provider(folder: Path) -> dict[str, Any]:
    record = read_provider(folder)
    names = ("base", "revision", "align", "buffer", "reinforce", "template", "dtype", "fingerprint")
    facts = {name: record.get(name) for name in names}
    private = not folder.stat().st_mode & 0o077
    return {"facts": facts | {"only_its_owner_may_enter": private}, "rows": _stages(folder)}


def _describe_workdir(folder: Path) -> dict[str, Any]:
    results = _record(folder / "results.json")
    facts = {
        "scored": sorted(file.stem for file in folder.glob("cells/*.json")),
        "command": results.get("command"),
        "seconds": results.get("wall_seconds"),
    }
    return {"facts": facts, "rows": _stages(folder)}


def _describe_stage(folder: Path) -> dict[str, Any]:
    begun = _record(folder / "run.json")
    parts = {part: begun.get(part, {}) for part in ("inputs", "config")}
    if not all(isinstance(part, dict) for part in parts.values()):
        raise UserError(f"{folder / 'run.json'}: inputs and config must be objects: run the stage again")
    asked = {f"{part}_{name}": each for part in parts for name, each in parts[part].items()}
    return {"facts": _stage(folder) | asked}


def _stages(folder: Path) -> list[dict[str, Any]]:
    """The stages whose folders are in one, the earliest first; what is not finished comes last."""
    found = {file.parent for name in ("run.json", "stage.json") for file in folder.glob(f"*/{name}")}
    return sorted(map(_stage, sorted(found)), key=lambda stage: str(stage["finished"] or "~"))


def _stage(folder: Path) -> dict[str, Any]:
    ended = _record(folder / "stage.json")
    saved = [int(entry.name) for entry in folder.glob("checkpoints/*") if entry.name.isdecimal()]
    state = "finished" if ended else f"stopped, goes on from step {max(saved)}" if saved else "begun"
    return {"stage": folder.name, "state": state, **{k: ended.get(k) for k in ("rows", "steps", "loss", "finished")}}


def _record(file: Path) -> dict[str, Any]:
    return read_record(file) if file.exists() else {}


def _describe_safetensors(file: Path) -> dict[str, Any]:
    header, notes = safetensors_header(file)
    rows = [{"tensor": name, "dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in header.items()]
    return {"facts": _weights_facts([file], header) | {"sha256": file_hash(file), "notes": notes}, "rows": rows}


def _compared(folder: Path, provider: Path) -> dict[str, Any]:
    """Whether a Buffer is in an adapter, by its numbers."""
    said = read_provider(provider).get("buffer")
    if said is None:
        raise UserError(f"{provider}: records no Buffer to compare with: give the folder in which it was trained")
    buffer, adapter = (_load_adapter(each)[0] for each in (provider / said["folder"], folder))
    likeness = Reference.of(buffer).likeness(adapter)
    return {"holds_a_buffer": is_buffer(likeness), "like_the_buffer": likeness._asdict()}


def _load_adapter(folder: Path) -> tuple[lora.Adapter, dict[str, dict[str, int]], dict[str, dict[int, int]]]:
    """An adapter without its base, whose sizes are taken from its own; and these, as `_sizes` gives them."""
    peft.read_provenance(folder)  # which refuses a folder of pickles
    file = folder / peft.WEIGHTS_FILE
    widths, ranks = _sizes(file, safetensors_header(file)[0])
    count = 1 + max((layer for of_layer in ranks.values() for layer in of_layer), default=-1)
    kernels = {
        f"{path}/kernel": jax.ShapeDtypeStruct((count, *each.values()), np.float32) for path, each in widths.items()
    }
    return peft.load_adapter(folder, traverse_util.unflatten_dict(kernels, sep="/")), widths, ranks


def _describe_adapter(folder: Path) -> dict[str, Any]:
    file, config_file = folder / peft.WEIGHTS_FILE, folder / peft.CONFIG_FILE
    adapter, widths, ranks = _load_adapter(folder)
    provenance, (header, _) = peft.read_provenance(folder), safetensors_header(file)
    rank, config, roles = read_config(config_file).rank, read_json(config_file), provenance.get("roles")
    rows, spectra, figures = [], {}, measure(adapter, TAU)
    for path in filter(figures.get, peft.MODULES):
        layers, target = sorted(ranks[path]), path.rsplit("/", 1)[-1]
        measured = {name: values[layers] for name, values in figures[path].items()}
        # squares in float64: in f32 those of a small adapter would be 0
        norms = np.sqrt(np.square(measured["sigma"], dtype=np.float64).sum(axis=-1))
        spectra[target] = measured["sigma"].tolist()
        row = {
            "target": target,
            "in": widths[path]["A"],
            "out": widths[path]["B"],
            "layers": len(layers),
            "rank": sorted(set(ranks[path].values())),
            "mean_norm": float(norms.mean()),
            "largest_norm": float(norms.max()),
            "at_layer": layers[int(norms.argmax())],
            "stable_rank": float(measured["stable_rank"].mean()),
            "effective_rank": float(measured["effective_rank"].mean()),
        }
        rows.append(row)
    facts = {
        "roles": roles,
        "holds_a_buffer": _BUFFER[None if roles is None else "buffer" in roles],
        "rank": rank,
        "alpha": config["lora_alpha"],
        "scale": float(adapter.scale),
        "layers": len({layer for of_layer in ranks.values() for layer in of_layer}),
        "base": config.get("base_model_name_or_path"),
        "base_fingerprint": provenance.get("base_fingerprint") or None,
        "extra": provenance.get("extra") or None,
        "sha256": file_hash(file),
        "pickles_not_opened": _pickles(folder),
    }
    return {"facts": facts | _weights_facts([file], header), "rows": rows, "spectra": spectra}


def _sizes(file: Path, header: TensorKinds) -> tuple[dict[str, dict[str, int]], dict[str, dict[int, int]]]:
    """What an adapter's own tensors say: path -> {"A": in, "B": out}, and path -> layer -> rank.

    A half of a pair that is missing counts as of width 0, so that `load_adapter` says which one.
    """
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
    return widths, ranks


def _weights_facts(files: Sequence[Path], header: TensorKinds) -> dict[str, Any]:
    return {
        "tensors": len(header),
        "parameters": sum(math.prod(shape) for _, shape in header.values()),
        "dtypes": dict(Counter(dtype for dtype, _ in header.values())),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _pickles(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)


def _text(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_text(name)} {_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
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
