"""What a file or folder is, without loading a model: read from configs and headers; pickles are named, never opened."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError, safe_open

from br_jax import plots
from br_jax.adapters import diagnostics, peft
from br_jax.adapters.lapack import one_blas_thread
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft_config import read_config
from br_jax.errors import UserError
from br_jax.files import PICKLES, read_json
from br_jax.models.io.gguf import describe_gguf
from br_jax.models.io.hf import read_hf_spec, read_tokenizer, weight_files
from br_jax.models.spec import ModelSpec
from br_jax.provider.folder import PROVIDER_FILE, read_provider

MAX_LAYERS = 1000  # a file that says more would have as many made up in memory
TAU = 0.01  # the release's rank check, see `qr_merge`
_BUFFER = {True: "yes, keep it in the provider's folder", False: "no", None: "not recorded"}
_FOLDERS = {  # kind -> files, any of which makes a folder that kind; the first kind that fits counts
    "provider": (PROVIDER_FILE,),
    "adapter": (peft.CONFIG_FILE, peft.WEIGHTS_FILE),
    "model": ("config.json",),
    "stage": ("run.json", "stage.json"),
    "workdir": ("results.json", "*/run.json"),
}

Header = dict[str, tuple[str, tuple[int, ...]]]  # a tensor's dtype, in safetensors' words, and its shape


def describe(path: str | Path) -> dict[str, Any]:
    """Says what a path holds.

    Args:
        path: a model's folder, a GGUF file, a provider's folder, an adapter's folder, a .safetensors file, or the
            folder of a run or of one stage of it.

    Returns:
        Ready for JSON: "path", "kind", "facts" (name -> value), "rows" (a table: one dict a target, stage or tensor)
        and, for an adapter, "spectra" (target -> the singular values of its delta in each layer that it changes).

    Raises:
        UserError: none of these, pickled, damaged, or not to be read.
    """
    path = Path(path)
    try:
        kind = _kind(path)
        return {"path": str(path), "kind": kind, **_DESCRIBE[kind](path)}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}): check its permissions") from error


def render(description: Mapping[str, Any]) -> str:
    """A description as plain text: the facts, one a line, then the table."""
    facts = {"kind": description["kind"], **description["facts"]}
    width = max(map(len, facts))
    lines = [description["path"]]
    lines += [f"  {name.replace('_', ' '):<{width}}  {_text(value)}" for name, value in facts.items()]
    if description["rows"]:
        table = [[name.replace("_", " ") for name in description["rows"][0]]]
        table += [["-" if value is None else _text(value) for value in row.values()] for row in description["rows"]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        rows = ("  ".join(f"{cell:<{size}}" for cell, size in zip(row, widths, strict=True)) for row in table)
        lines += ["", *(f"  {row}".rstrip() for row in rows)]
    # Names and notes come from anyone's file: what a terminal would obey is not printed.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def plot_spectra(description: Mapping[str, Any], file: str | Path) -> list[Path]:
    """Draws the singular values of an adapter's delta.

    Args:
        description: of an adapter, from `describe`.
        file: the picture; its PNG and its PDF are written.

    Returns:
        The paths of the two.

    Raises:
        UserError: it is no adapter's description, or the files cannot be written.
    """
    if "spectra" not in description:
        raise UserError(f"{description['path']}: spectra are an adapter's, this is of the kind {description['kind']}")
    facts, file = description["facts"], Path(file)
    title = f"{_text(facts['roles'])}, rank {facts['rank']}, on {_text(facts['base'])}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return plots.save(plots.spectra_figure(description["spectra"], title), file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}): choose another place") from error


def _kind(path: Path) -> str:
    if path.is_dir():
        for kind, marks in _FOLDERS.items():
            if any(any(path.glob(mark)) for mark in marks):
                return kind
        pickled = _pickles(path)
        held = f"; {pickled[0]} is pickled, can run code and is not opened" if pickled else ""
        marks = ", ".join(mark for marks in _FOLDERS.values() for mark in marks)
        raise UserError(f"{path}: not known: none of {marks} is in it{held}")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix in PICKLES:
        raise UserError(f"{path}: pickled, which can run code, so it is not opened: save it as safetensors")
    if path.suffix in (".gguf", ".safetensors"):
        return path.suffix[1:]
    raise UserError(f"{path}: not known: a file must be .gguf or .safetensors, anything else a folder")


def _describe_model(folder: Path) -> dict[str, Any]:
    spec, files = read_hf_spec(folder), weight_files(folder)
    tokenizer = read_tokenizer(folder, spec)
    tensors = [tensor for file in files for tensor in _read_header(file)[0].values()]
    facts = _model_facts(spec) | {
        "dtypes": dict(Counter(dtype for dtype, _ in tensors)),
        "tensors": len(tensors),
        "shards": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "tokens": len(tokenizer),
        "chat_template": tokenizer.chat_template is not None,
    }
    return {"facts": facts | _named_pickles(folder), "rows": []}


def _describe_gguf(file: Path) -> dict[str, Any]:
    spec, header = describe_gguf(file)
    return {"facts": _model_facts(spec) | header | {"bytes": file.stat().st_size}, "rows": []}


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    return {
        "family": spec.model_type,
        "parameters": spec.num_params,
        "layers": spec.num_layers,
        "heads": spec.num_heads,
        "key_value_heads": spec.num_kv_heads,
        "head_width": spec.head_dim,
        "width": spec.embed_dim,
        "feed_forward_width": spec.ffw_dim,
        "vocabulary": spec.vocab_size,
        "tied_embeddings": spec.tie_embeddings,
        "context": spec.max_length,
        "window": "none" if spec.window is None else f"{spec.window} in {sum(spec.window_layers)} layers",
    }


def _describe_provider(folder: Path) -> dict[str, Any]:
    record = read_provider(folder)
    facts = {name: record.get(name) for name in ("base", "revision", "align", "template", "dtype", "fingerprint")}
    private = not folder.stat().st_mode & 0o077
    return {"facts": facts | {"only_its_owner_may_enter": private}, "rows": _stages(folder)}


def _describe_workdir(folder: Path) -> dict[str, Any]:
    results = read_json(folder / "results.json") if (folder / "results.json").is_file() else {}
    facts = {
        "scored_models": sorted(results.get("models") or {}),
        "command": results.get("command"),
        "seconds": results.get("wall_seconds"),
        "provider": (folder / "provider" / PROVIDER_FILE).is_file(),
        "released_adapter": (folder / "released" / peft.WEIGHTS_FILE).is_file(),
    }
    return {"facts": facts, "rows": _stages(folder)}


def _describe_stage(folder: Path) -> dict[str, Any]:
    stage = _stage(folder)
    begun = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    asked = {f"{part}_{name}": each for part in ("inputs", "config") for name, each in begun.get(part, {}).items()}
    return {"facts": stage | asked, "rows": []}


def _stages(folder: Path) -> list[dict[str, Any]]:
    """The stages whose folders are in one, the earliest first."""
    found = sorted({file.parent for mark in _FOLDERS["stage"] for file in folder.glob(f"*/{mark}")})
    return sorted(
        map(_stage, found), key=lambda stage: str(stage["finished"] or "~")
    )  # what is not finished comes last


def _stage(folder: Path) -> dict[str, Any]:
    ended = read_json(folder / "stage.json") if (folder / "stage.json").is_file() else {}
    saved = [int(entry.name) for entry in folder.glob("checkpoints/*") if entry.name.isdecimal()]
    state = "finished" if ended else f"stopped, goes on from step {max(saved)}" if saved else "begun"
    return {"stage": folder.name, "state": state, **{k: ended.get(k) for k in ("rows", "steps", "loss", "finished")}}


def _describe_safetensors(file: Path) -> dict[str, Any]:
    header, notes = _read_header(file)
    rows = [
        {"tensor": name, "dtype": dtype, "shape": list(shape), "bytes": _size(dtype, shape)}
        for name, (dtype, shape) in header.items()
    ]
    return {"facts": _file_facts(file, header) | {"notes": notes}, "rows": rows}


def _describe_adapter(folder: Path) -> dict[str, Any]:
    file = folder / peft.WEIGHTS_FILE
    provenance = peft.read_provenance(folder)  # which refuses a folder of pickles
    header, _ = _read_header(file)
    adapter = peft.load_adapter(folder, _abstract_params(file, header))
    config, roles = read_json(folder / peft.CONFIG_FILE), provenance.get("roles")
    layers = _layers(header)
    measured = _measure(adapter)
    paths = [path for path in peft.MODULES if path in adapter.weights]
    rows = [_target_row(path, layers[path], header, measured[path]) for path in paths]
    patterns = {name: config[name] for name in ("rank_pattern", "alpha_pattern") if config.get(name)}
    facts = {
        "roles": roles,
        "holds_a_buffer": _BUFFER[None if roles is None else "buffer" in roles],
        "rank": read_config(folder / peft.CONFIG_FILE).rank,
        "alpha": config["lora_alpha"],
        "scale": float(adapter.scale),
        **patterns,
        "layers": len({layer for found in layers.values() for layer in found}),
        "largest_norm": max(row["largest_norm"] for row in rows),
        "base": config.get("base_model_name_or_path"),
        "base_fingerprint": provenance.get("base_fingerprint") or None,
        "base_checked": False,
        "extra": provenance.get("extra") or None,
        **_file_facts(file, header),
    }
    return {
        "facts": facts | _named_pickles(folder),
        "rows": rows,
        "spectra": {_target(path): measured[path]["sigma"][layers[path]].tolist() for path in paths},
    }


def _abstract_params(file: Path, header: Header) -> dict[str, Any]:
    """A base's tree that an adapter's own tensors fit: what they say of the kernels, with as many layers as they have.

    A half of a pair that is missing counts as of width 0, so that `load_adapter` says which one.
    """
    widths, count = {}, 0
    for key, (_, shape) in header.items():
        if (match := peft.KEY.fullmatch(key)) and match[2] in peft.PATHS and len(shape) == 2:
            count = max(count, int(match[1]) + 1)
            pair = widths.setdefault(peft.PATHS[match[2]], {"A": 0, "B": 0})
            half = key.removesuffix(".weight")[-1]
            pair[half] = shape[1 if half == "A" else 0]
    if count > MAX_LAYERS:
        raise UserError(f"{file}: has a tensor of layer {count - 1:,}: no model has as many")
    kernels = {
        f"{path}/kernel": jax.ShapeDtypeStruct((count, pair["A"], pair["B"]), jnp.float32)
        for path, pair in widths.items()
    }
    return traverse_util.unflatten_dict(kernels, sep="/")


def _layers(header: Header) -> dict[str, list[int]]:
    """The layers in which each path has tensors."""
    found = {}
    for match in filter(None, map(peft.KEY.fullmatch, header)):
        found.setdefault(peft.PATHS[match[2]], set()).add(int(match[1]))
    return {path: sorted(layers) for path, layers in found.items()}


def _measure(adapter: Adapter) -> dict[str, dict[str, np.ndarray]]:
    """Each path's singular values [L, K], and its stable and effective rank [L]."""
    with one_blas_thread():
        return {
            path: jax.device_get(_measure_path(pair["a"], pair["b"], adapter.scale))
            for path, pair in adapter.weights.items()
        }


@jax.jit
def _measure_path(
    a: Float[Array, "L I R"], b: Float[Array, "L R O"], scale: Float[Array, ""]
) -> dict[str, Float[Array, "L ..."] | Int[Array, " L"]]:
    def of_layer(pair):
        sigma = diagnostics.singular_values(*pair, scale)
        _, kept = diagnostics.effective_basis(*pair, jnp.float32(TAU))
        return {"sigma": sigma, "stable_rank": diagnostics.stable_rank(sigma), "effective_rank": kept}

    return jax.lax.map(of_layer, (a, b))


def _target_row(path: str, layers: Sequence[int], header: Header, measured: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One target's line: sizes, and means over the layers that the adapter changes."""
    module = peft.MODULES[path]
    halves = [
        [header[f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight"][1] for layer in layers]
        for half in "AB"
    ]
    # squares in float64: in f32 those of a small adapter would be 0
    norms = np.sqrt(np.square(measured["sigma"][layers], dtype=np.float64).sum(axis=-1))
    return {
        "target": _target(path),
        "in": halves[0][0][1],
        "out": halves[1][0][0],
        "layers": len(layers),
        "rank": sorted({shape[0] for shape in halves[0]}),
        "mean_norm": float(norms.mean()),
        "largest_norm": float(norms.max()),
        "at_layer": layers[int(norms.argmax())],
        "stable_rank": float(measured["stable_rank"][layers].mean()),
        "effective_rank": float(measured["effective_rank"][layers].mean()),
    }


def _target(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _read_header(file: Path) -> tuple[Header, dict[str, str]]:
    """A safetensors file's tensors by name, and the notes in its header; no tensor is read."""
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            tensors = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            return tensors, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: truncated or damaged ({error}): copy or download it again") from error


def _file_facts(file: Path, header: Header) -> dict[str, Any]:
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "tensors": len(header),
        "parameters": sum(math.prod(shape) for _, shape in header.values()),
        "dtypes": dict(Counter(dtype for dtype, _ in header.values())),
        "bytes": file.stat().st_size,
        "sha256": digest,
    }


def _size(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; the name of every dtype but BOOL has its bits in it, e.g. BF16 or F8_E4M3."""
    bits = re.search(r"\d+", dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def _named_pickles(folder: Path) -> dict[str, Any]:
    pickled = _pickles(folder)
    return {"pickles_not_opened": pickled} if pickled else {}


def _pickles(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)


def _text(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return str(value)


_DESCRIBE: dict[str, Callable[[Path], dict[str, Any]]] = {
    "model": _describe_model,
    "gguf": _describe_gguf,
    "provider": _describe_provider,
    "adapter": _describe_adapter,
    "safetensors": _describe_safetensors,
    "stage": _describe_stage,
    "workdir": _describe_workdir,
}
