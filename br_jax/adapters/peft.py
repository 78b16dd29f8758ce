"""Adapters on disk, in PEFT's layout and names: `peft.PeftModel` loads what we write, and we load theirs.

A folder holds `adapter_model.safetensors` and `adapter_config.json`. What PEFT has no field for (roles, the
base's fingerprint) travels in the safetensors header, where PEFT does not look.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft_config import PlainLora, adapted_modules, read_config
from br_jax.errors import UserError, near_names
from br_jax.files import PICKLES

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names

MODULES = {
    "layers/attn/q": "self_attn.q_proj",
    "layers/attn/k": "self_attn.k_proj",
    "layers/attn/v": "self_attn.v_proj",
    "layers/attn/o": "self_attn.o_proj",
    "layers/mlp/gate": "mlp.gate_proj",
    "layers/mlp/up": "mlp.up_proj",
    "layers/mlp/down": "mlp.down_proj",
}
PATHS = {module: path for path, module in MODULES.items()}
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,9})\.(\w+\.\w+)\.lora_[AB]\.weight", re.ASCII)

# PEFT's name of a module, e.g. "model.layers.0.self_attn.q_proj" -> our path and the layer
Modules = dict[str, tuple[str, int]]


def save_adapter(
    folder: str | os.PathLike,
    adapter: Adapter,
    *,
    base_name: str,
    fingerprint: str = "",
    provider: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that PEFT can load; all of it or nothing.

    Other files in an existing folder stay. The form is uniform, as serving stacks (vLLM for one) read only one rank and
    one alpha: every layer of a path is there, a narrower matrix is padded with zeros to the widest rank (exact), and
    there is no rank or alpha pattern.

    Args:
        folder: where to; made, parents included, if it does not exist.
        adapter: at least one matrix, finite.
        base_name: goes into `base_model_name_or_path`.
        fingerprint: the base's content hash; checked again by `load_adapter`.
        provider: the folder is the provider's own (mode 0700, files 0600); only there may a buffer be
            written.
        extra: further provenance, JSON values.

    Raises:
        UserError: a buffer outside the provider's folder, an adapter that is empty, not finite or not of the
            decoder's layers, or a folder that cannot be written (full disk included).
    """
    folder = Path(folder)
    if "buffer" in adapter.roles and not provider:
        raise UserError(
            f"{folder}: refused to write an adapter that holds a buffer (roles {'+'.join(adapter.roles)}): "
            "it undoes the model's alignment; detach it, or keep it in the provider's folder"
        )
    if not adapter.weights:
        raise UserError(f"{folder}: the adapter has no matrices; there is nothing to write")
    lora.require_finite(adapter)
    rank = max(pair["a"].shape[-1] for pair in adapter.weights.values())
    provenance = {
        "format_version": FORMAT_VERSION,
        "roles": list(adapter.roles),
        "base_fingerprint": fingerprint,
        "extra": dict(extra or {}),
    }
    # one header entry: safetensors writes several in random order, and equal adapters should be equal files
    header = {"br_jax": json.dumps(provenance, sort_keys=True)}
    config = json.dumps(_peft_config(adapter, rank, base_name), indent=2, sort_keys=True) + "\n"
    files = {CONFIG_FILE: config.encode(), WEIGHTS_FILE: serialize(_tensors(adapter, rank), metadata=header)}
    _write_folder(folder, files, private=provider)


def load_adapter(
    folder: str | os.PathLike, params: Mapping[str, Any], *, fingerprint: str = "", role: str = "user"
) -> Adapter:
    """Reads an adapter folder made by `save_adapter` or by PEFT; safetensors only.

    Plain LoRA of every form is read: targets as PEFT matches them, some layers only, ranks and alphas by pattern,
    rsLoRA. A tensor that the config does not call for, or one that is missing, is an error; PEFT would go on.

    Args:
        folder: the adapter's folder.
        params: the base's tree, for its shapes; arrays or `jax.ShapeDtypeStruct`.
        fingerprint: the base's content hash; compared when the folder records one too.
        role: the provenance of a folder that records none (PEFT's own).

    Returns:
        The adapter in f32, its layers stacked to [L, ...].

    Raises:
        UserError: a folder that is missing, damaged, pickled, of another model, of more than plain LoRA, or of the
            embedding or the head.
    """
    folder = Path(folder)
    weights_file = _find_weights(folder)
    config = read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(weights_file)
    provenance = read_provenance(folder)
    recorded = provenance.get("base_fingerprint", "")
    if fingerprint and recorded and fingerprint != recorded:
        raise UserError(f"{folder}: made for the base {recorded}, but this base is {fingerprint}; load the other model")
    shapes = {path: shape for path, shape in lora.kernel_shapes(params).items() if path in MODULES}
    if not tensors:
        raise UserError(f"{weights_file}: holds no matrices; save the adapter again")
    adapted = _find_modules(config, tensors, shapes)
    _check_tensors(weights_file, config, tensors, shapes, adapted)
    weights, scale = _stack_layers(config, tensors, shapes, adapted)
    roles = tuple(sorted(provenance.get("roles", [role])))
    return Adapter(weights, jnp.float32(scale), roles)


def read_provenance(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_adapter` recorded beside the weights.

    Returns:
        "format_version", "roles", "base_fingerprint" and "extra"; empty for a folder that PEFT made.

    Raises:
        UserError: a folder that is missing or damaged, or made by a later version.
    """
    path = _find_weights(Path(folder))
    with _opened(path) as file:
        text = (file.metadata() or {}).get("br_jax", "{}")
    try:
        provenance = json.loads(text)
        version, roles = provenance.get("format_version", FORMAT_VERSION), provenance.get("roles", [])
        well_formed = isinstance(version, int) and isinstance(roles, list) and all(isinstance(r, str) for r in roles)
    except (ValueError, AttributeError):
        well_formed = False
    if not well_formed:
        raise UserError(f"{path}: its br_jax header is damaged; save the adapter again")
    if version > FORMAT_VERSION:
        raise UserError(f"{path}: format {version}, but this br_jax reads up to {FORMAT_VERSION}; update br_jax")
    return provenance


def _peft_config(adapter: Adapter, rank: int, base_name: str) -> dict[str, Any]:
    """Builds adapter_config.json; alpha is taken from the adapter, so that alpha / r comes back exactly."""
    alpha = float(adapter.scale) * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(_name(path).rsplit(".", 1)[-1] for path in adapter.weights),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def _tensors(adapter: Adapter, rank: int) -> dict[str, np.ndarray]:
    """Splits the layers and turns the matrices into PEFT's A [r, in] and B [out, r]."""
    tensors = {}
    for path, pair in jax.device_get(lora.pad_rank(adapter, rank).weights).items():
        for layer in range(pair["a"].shape[0]):
            for name, matrix in {"A": pair["a"][layer].T, "B": pair["b"][layer].T}.items():
                # safetensors copies the buffer as it lies, whatever the strides say
                tensors[_key(_module(layer, path), name)] = np.ascontiguousarray(matrix, dtype=np.float32)
    return tensors


def _key(module: str, matrix: str) -> str:
    return f"base_model.model.{module}.lora_{matrix}.weight"


def _module(layer: int, path: str) -> str:
    """Gives PEFT's name of one layer of one of our paths."""
    return f"model.layers.{layer}.{_name(path)}"


def _name(path: str) -> str:
    """Gives PEFT's name, inside a layer, of one of our paths."""
    if path not in MODULES:
        raise UserError(f"adapter path {path!r} has no name in PEFT's layout; {near_names(path, MODULES)}")
    return MODULES[path]


def _write_folder(folder: Path, files: Mapping[str, bytes], private: bool) -> None:
    """Writes files into a folder by way of a temporary one, so that a crash or a full disk leaves no half.

    At every moment an existing folder holds a pair that belongs together, or no weights.
    """
    partial = folder / ".partial" if folder.is_dir() else folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # what a killed run may have left
        partial.mkdir(mode=0o700 if private else 0o777)
        for name, data in files.items():
            _write_file(partial / name, data, mode=0o600 if private else 0o666)
        if folder.is_dir():
            if private:
                folder.chmod(0o700)
            (folder / WEIGHTS_FILE).unlink(missing_ok=True)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                os.replace(partial / name, folder / name)
            partial.rmdir()
            _sync(folder)
        else:
            _sync(partial)
            os.rename(partial, folder)
            _sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder}: cannot write the adapter ({error.strerror or error}); free space or choose another folder"
        ) from error


def _write_file(path: Path, data: bytes, mode: int) -> None:
    """Writes a new file with this mode from its first byte on, through to the disk."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_weights(folder: Path) -> Path:
    """Gives the folder's weights file; pickled ones are refused by name, as loading one can run any code."""
    try:
        candidates = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); give a folder that you may read") from error
    weights_file = folder / WEIGHTS_FILE
    if weights_file in candidates:
        return weights_file
    for path in candidates:
        if path.suffix in PICKLES and path.exists():
            raise UserError(f"{path}: pickled weights are refused, they can run code; save the adapter as safetensors")
    raise UserError(f"{folder}: no adapter there ({WEIGHTS_FILE} is missing); give the folder of an adapter")


def _opened(path: Path):
    """Opens a safetensors file; one that is cut short or not of this format is a `UserError`."""
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or save the adapter again") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors as f32 copies (PEFT often stores bf16)."""
    tensors = {}
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            kind = file.get_slice(key).get_dtype()
            if kind not in FLOATS:
                raise UserError(f"{path}: {key} is {kind}, but adapter weights must be {', '.join(FLOATS)}")
            with np.errstate(over="ignore"):  # what f32 cannot hold becomes infinity, and is refused as that
                tensors[key] = np.array(file.get_tensor(key), dtype=np.float32)
            if not np.isfinite(tensors[key]).all():
                raise UserError(f"{path}: {key} holds NaN or infinity; the adapter is damaged or its training diverged")
    return tensors


def _find_modules(config: PlainLora, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, lora.Shape]) -> Modules:
    """Finds the modules of this model that the adapter changes."""
    if config.target_modules is None:
        # PEFT always writes its targets; without, what has a tensor is a target
        found = {match[2] for match in map(KEY.fullmatch, tensors) if match}
        config = dataclasses.replace(config, target_modules=tuple(sorted(found)))
    modules = {_module(layer, path): (path, layer) for path, shape in shapes.items() for layer in range(shape[0])}
    return {module: modules[module] for module in adapted_modules(config, modules)}


def _check_tensors(
    file: Path, config: PlainLora, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, lora.Shape], adapted: Modules
) -> None:
    """Raises a `UserError` that names a tensor which is unexpected, of the wrong shape or missing."""
    expected = {}
    for module, (path, _) in adapted.items():
        rank, (_, fan_in, fan_out) = config.rank_of(module), shapes[path]
        expected |= {_key(module, "A"): (rank, [rank, fan_in]), _key(module, "B"): (rank, [fan_out, rank])}
    for key, tensor in tensors.items():
        if key not in expected:
            raise UserError(f"{file}: {key!r} {_why_unexpected(key, config, shapes)}")
        rank, shape = expected[key]
        if list(tensor.shape) != shape:
            raise UserError(
                f"{file}: {key} is {list(tensor.shape)}, but r={rank} in {CONFIG_FILE} and this model need {shape}; "
                "was it made for another model?"
            )
    missing = [key for key in expected if key not in tensors]
    if missing:
        raise UserError(
            f"{file}: lacks {missing[0]} ({len(missing)} missing), which {CONFIG_FILE} says is there; save the adapter "
            "again"
        )


def _why_unexpected(key: str, config: PlainLora, shapes: Mapping[str, lora.Shape]) -> str:
    """Phrases what is wrong with a tensor that no adapted module has."""
    match = KEY.fullmatch(key)
    path = PATHS.get(match[2]) if match else None
    if path not in shapes:
        names = ", ".join(MODULES[path].rsplit(".", 1)[-1] for path in shapes)
        return f"is no LoRA matrix of this model's layers; retrain with target_modules among {names}"
    if int(match[1]) >= shapes[path][0]:
        return f"is beyond this model's {shapes[path][0]} layers; was it made for another model?"
    return (
        f'is of a module that {config.file} does not adapt ("target_modules", "exclude_modules", '
        '"layers_to_transform"); save the adapter again'
    )


def _stack_layers(
    config: PlainLora, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, lora.Shape], adapted: Modules
) -> tuple[dict[str, dict[str, jax.Array]], float]:
    """Stacks the layers to {"a": [L, in, R], "b": [L, R, out]} and gives the one scale of all.

    R is a path's widest rank: a narrower one is padded with zeros, and a layer that is not adapted is all zeros (both
    exact). Where a module's scale is not the config's, the ratio of the two goes into its b.
    """
    # nothing is a multiple of a zero scale
    scale = config.scale if config.scale or not any(map(config.scale_of, adapted)) else 1.0
    weights = {}
    for path in sorted({path for path, _ in adapted.values()}):
        modules = {layer: module for module, (of, layer) in adapted.items() if of == path}
        layers, fan_in, fan_out = shapes[path]
        widest = max(map(config.rank_of, modules.values()))
        a, b = np.zeros((layers, fan_in, widest), np.float32), np.zeros((layers, widest, fan_out), np.float32)
        for layer, module in modules.items():
            rank, ratio = config.rank_of(module), config.scale_of(module) / scale if scale else 1.0
            a[layer, :, :rank] = tensors[_key(module, "A")].T
            b[layer, :rank] = tensors[_key(module, "B")].T * ratio
        weights[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return weights, scale
