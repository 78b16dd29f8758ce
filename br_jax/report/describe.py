"""What a file or folder is, without loading a model: read from configs and headers; pickles are named, never opened."""

import dataclasses
import functools
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from tabulate import tabulate

from br_jax.adapters import lora, peft
from br_jax.adapters.diagnostics import components, measure, similarity
from br_jax.core.errors import UserError
from br_jax.core.io import PICKLES, TensorKinds, safetensors_header, write_bytes
from br_jax.core.records import file_hash, read_record
from br_jax.models.io.gguf import describe_gguf
from br_jax.models.io.hf import read_hf_spec, read_tokenizer, weight_files
from br_jax.models.spec import ModelSpec
from br_jax.provider import PROVIDER_FILE, read_provider
from br_jax.report import plots, run_figures

MAX_LAYERS = 1000  # a file that says more would have as many made up in memory
TAU = 0.01  # the release's rank check, see `qr_merge`
_OTHERS = "its numbers were not compared, see --provider"
_BUFFER = {False: f"no, by its own account: {_OTHERS}", None: f"not recorded: {_OTHERS}"}
_BUFFER |= {True: "yes, keep it in the provider's folder"}


def describe(path: str | Path, provider: str | Path | None = None) -> dict[str, Any]:
    """Says what a path holds, ready for JSON; a `UserError` where it is pickled, damaged, or nothing known.

    A path is a model's folder, a GGUF or .safetensors file, an adapter's folder, a provider's, a run's or one stage's.
    With a provider's folder an adapter is compared with its Buffer. "kind", "facts" (name -> value) and "rows" (a dict
    a target, stage or tensor) are in it; of an adapter "spectra": target -> singular values of its delta by layer.
    """
    path = Path(path)
    if path.is_dir():
        kind = next((kind for kind, (marks, _) in _FOLDERS.items() if any(any(path.glob(m)) for m in marks)), "")
        if not kind:
            marks = ", ".join(mark for marks, _ in _FOLDERS.values() for mark in marks)
            pickled = "".join(f"; {name} is pickled, can run code and is not opened" for name in _pickles(path)[:1])
            raise UserError(f"{path}: not known: none of {marks} is in it{pickled}")
        _, read = _FOLDERS[kind]
    else:
        path.stat()  # an error where nothing is
        kind, read = path.suffix[1:], _FILES.get(path.suffix)
        if read is None:
            files = "a file must be .gguf or .safetensors, anything else a folder"
            raise UserError(f"{path}: not known: {files}; a pickle, which can run code, is not opened")
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
    facts = description["facts"]
    title = f"{_text(facts['roles'])}, rank {facts['rank']}, on {_text(facts['base'])}"
    drawn = plots.encode(run_figures.spectra_figure(description["spectra"], title))
    files = {Path(file).with_suffix(f".{kind}"): content for kind, content in drawn.items()}
    for name, content in files.items():
        write_bytes(name, content)
    return [*files]


def _model(folder: Path) -> dict[str, Any]:
    spec, files = read_hf_spec(folder), weight_files(folder)
    tokenizer = read_tokenizer(folder, spec)
    tensors = {name: tensor for file in files for name, tensor in safetensors_header(file)[0].items()}
    facts = _weights_facts(files, tensors) | {"shards": len(files), "tokens": len(tokenizer)}
    facts |= {"chat_template": tokenizer.chat_template is not None, "pickles_not_opened": _pickles(folder)}
    return {"facts": _spec_facts(spec) | facts}


def _gguf(file: Path) -> dict[str, Any]:
    spec, header = describe_gguf(file)
    return {"facts": _spec_facts(spec) | header | {"bytes": file.stat().st_size}}


def _spec_facts(spec: ModelSpec) -> dict[str, Any]:
    """The spec by its own names, but for what is off."""
    facts = {name: value for name, value in dataclasses.asdict(spec).items() if value not in (None, ())}
    return facts | {"windowed": sum(spec.window_layers), "parameters": spec.num_params}


def _safetensors(file: Path) -> dict[str, Any]:
    header, notes = safetensors_header(file)
    rows = [{"tensor": name, "dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in header.items()]
    return {"facts": _weights_facts([file], header) | {"sha256": file_hash(file), "notes": notes}, "rows": rows}


def _provider(folder: Path) -> dict[str, Any]:
    record = read_provider(folder)
    names = ("base", "revision", "align", "buffer", "reinforce", "template", "dtype", "fingerprint")
    private = {"only_its_owner_may_enter": not folder.stat().st_mode & 0o077}
    return {"facts": {name: record.get(name) for name in names} | private, "rows": _stages(folder)}


def _workdir(folder: Path) -> dict[str, Any]:
    results, scored = _record(folder / "results.json"), sorted(file.stem for file in folder.glob("cells/*.json"))
    facts = {"scored": scored, "command": results.get("command"), "seconds": results.get("wall_seconds")}
    return {"facts": facts, "rows": _stages(folder)}


def _stages(folder: Path) -> list[dict[str, Any]]:
    """The stages whose folders are in one, the earliest first; what is not finished comes last."""
    found = sorted({file.parent for name in ("run.json", "stage.json") for file in folder.glob(f"*/{name}")})
    return sorted((_stage(each)["facts"] for each in found), key=lambda stage: str(stage["finished"] or "~"))


def _stage(folder: Path, details: Sequence[str] = ()) -> dict[str, Any]:
    ended = _record(folder / "stage.json")
    saved = [int(entry.name) for entry in folder.glob("checkpoints/*") if entry.name.isdecimal()]
    state = "finished" if ended else f"stopped, goes on from step {max(saved)}" if saved else "begun"
    facts = {"stage": folder.name, "state": state, **{k: ended.get(k) for k in ("rows", "steps", "loss", "finished")}}
    for part in details:
        if not isinstance(settings := _record(folder / "run.json").get(part, {}), dict):
            raise UserError(f"{folder / 'run.json'}: {part} must be an object: run the stage again")
        facts |= {f"{part}_{name}": value for name, value in settings.items()}
    return {"facts": facts}


def _record(file: Path) -> dict[str, Any]:
    return read_record(file) if file.exists() else {}


def _load_adapter(folder: Path) -> tuple[lora.Adapter, TensorKinds, dict[str, dict[int, int]]]:
    """An adapter without its base, whose sizes are taken from its own; its header; and path -> layer -> rank.

    A half of a pair that is missing counts as of width 0, so that `peft.load_adapter` says which one.
    """
    peft.read_provenance(folder)  # which refuses a folder of pickles
    header, _ = safetensors_header(file := folder / peft.WEIGHTS_FILE)
    widths, ranks = defaultdict(lambda: {"A": 0, "B": 0}), defaultdict(dict)
    for key, (_, shape) in header.items():
        match = peft.KEY.fullmatch(key)
        if match and match[2] in peft.PATHS and len(shape) == 2:
            path, layer, half = peft.PATHS[match[2]], int(match[1]), match[3]
            if layer >= MAX_LAYERS:
                raise UserError(f"{file}: has a tensor of layer {layer:,}: no model has as many")
            ranks[path][layer], widths[path][half] = shape if half == "A" else reversed(shape)
    layers = 1 + max((layer for of_layer in ranks.values() for layer in of_layer), default=-1)
    kernels = {f"{p}/kernel": jax.ShapeDtypeStruct((layers, *each.values()), np.float32) for p, each in widths.items()}
    return peft.load_adapter(folder, traverse_util.unflatten_dict(kernels, sep="/")), header, ranks


def _adapter(folder: Path) -> dict[str, Any]:
    file = folder / peft.WEIGHTS_FILE
    (adapter, header, ranks), provenance = _load_adapter(folder), peft.read_provenance(folder)
    config, roles, rows, spectra = peft.read_config(folder / peft.CONFIG_FILE), provenance.get("roles"), [], {}
    figures = measure(adapter, TAU)
    for path in filter(figures.get, peft.MODULES):
        layers, target, pair = sorted(ranks[path]), path.rsplit("/", 1)[-1], adapter.weights[path]
        measured = {name: values[layers] for name, values in figures[path].items()}
        norms = np.linalg.norm(measured["sigma"], axis=-1)
        spectra[target] = measured["sigma"].tolist()
        row = {"target": target, "in": pair["a"].shape[1], "out": pair["b"].shape[2], "layers": len(layers)}
        row |= {"rank": sorted(set(ranks[path].values())), "mean_norm": float(norms.mean())}
        row |= {"largest_norm": float(norms.max()), "at_layer": layers[int(norms.argmax())]}
        rows.append(row | {name: float(measured[name].mean()) for name in ("stable_rank", "effective_rank")})
    facts = {"roles": roles, "holds_a_buffer": _BUFFER[None if roles is None else "buffer" in roles]}
    facts |= {"rank": int(config["r"]), "alpha": config["lora_alpha"]}
    facts |= {"scale": float(adapter.scale), "layers": len(set().union(*ranks.values()))}
    facts |= {"base": config.get("base_model_name_or_path")}
    facts |= {name: provenance.get(name) or None for name in ("base_fingerprint", "extra")}
    facts |= {"sha256": file_hash(file), "pickles_not_opened": _pickles(folder)} | _weights_facts([file], header)
    return {"facts": facts, "rows": rows, "spectra": spectra}


def _weights_facts(files: Sequence[Path], header: TensorKinds) -> dict[str, Any]:
    sizes = {"tensors": len(header), "parameters": sum(math.prod(shape) for _, shape in header.values())}
    dtypes = Counter(dtype for dtype, _ in header.values())
    return sizes | {"dtypes": dict(dtypes), "bytes": sum(file.stat().st_size for file in files)}


def _pickles(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "not recorded", True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_text(name)} {_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    # names and notes come from anyone's file: what a terminal would obey is not printed
    return "".join(c if c.isprintable() else "?" for c in str(value))


_FILES = {".gguf": _gguf, ".safetensors": _safetensors}
_FOLDERS = {  # kind -> files, any of which makes a folder that kind, and what reads it; the first kind that fits counts
    "provider": ([PROVIDER_FILE], _provider),
    "adapter": ([peft.CONFIG_FILE, peft.WEIGHTS_FILE], _adapter),
    "model": (["config.json"], _model),
    "stage": (["run.json", "stage.json"], functools.partial(_stage, details=("inputs", "config"))),
    "workdir": (["results.json", "*/run.json"], _workdir),
}
