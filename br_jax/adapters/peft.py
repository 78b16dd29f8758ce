"""Adapters on disk, in PEFT's layout and names: `peft.PeftModel` loads what we write, and we load theirs.

A folder holds `adapter_model.safetensors` and `adapter_config.json`. What PEFT has no field for (roles, the
base's fingerprint) travels in the safetensors header, where PEFT does not look.
"""

import json
import math
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
from br_jax.errors import UserError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1

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
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight")

# LoraConfig fields that, when set, mean more than W + scale * B A
REFUSED_FIELDS = (
    "use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication",
    "fan_in_fan_out", "trainable_token_indices", "target_parameters", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
# the other initializations (pissa, olora, corda, loftq, ...) also rewrite the base's weights
HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


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

    Other files in an existing folder stay. A narrower matrix is padded with zeros to the widest rank (exact),
    as many readers of PEFT's files know only one rank.

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

    Args:
        folder: the adapter's folder.
        params: the base's tree, for its shapes; arrays or `jax.ShapeDtypeStruct`.
        fingerprint: the base's content hash; compared when the folder records one too.
        role: the provenance of a folder that records none (PEFT's own).

    Returns:
        The adapter in f32, its layers stacked to [L, ...].

    Raises:
        UserError: a folder that is missing, damaged, pickled, of another model or of a kind of LoRA not
            supported.
    """
    folder = Path(folder)
    weights_file = _find_weights(folder)
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(weights_file)
    provenance = read_provenance(folder)
    recorded = provenance.get("base_fingerprint", "")
    if fingerprint and recorded and fingerprint != recorded:
        raise UserError(f"{folder}: made for the base {recorded}, but this base is {fingerprint}; load the other model")
    shapes = {path: shape for path, shape in lora.kernel_shapes(params).items() if path in MODULES}
    weights = _stack_layers(weights_file, tensors, shapes, config["r"])
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    roles = tuple(sorted(provenance.get("roles", [role])))
    return Adapter(weights, jnp.float32(config["lora_alpha"] / root), roles)


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
        "target_modules": sorted(_module(path).rsplit(".", 1)[-1] for path in adapter.weights),
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
    for path, pair in jax.device_get(adapter.weights).items():
        missing = rank - pair["a"].shape[-1]
        a = np.pad(pair["a"], ((0, 0), (0, 0), (0, missing)))
        b = np.pad(pair["b"], ((0, 0), (0, missing), (0, 0)))
        for layer in range(a.shape[0]):
            for name, matrix in {"A": a[layer].T, "B": b[layer].T}.items():
                # safetensors copies the buffer as it lies, whatever the strides say
                tensors[_key(layer, _module(path), name)] = np.ascontiguousarray(matrix, dtype=np.float32)
    return tensors


def _key(layer: int, module: str, matrix: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.lora_{matrix}.weight"


def _module(path: str) -> str:
    """Gives PEFT's name of one of our paths."""
    if path not in MODULES:
        raise UserError(f"adapter path {path!r} has no name in PEFT's layout; {lora.near_names(path, MODULES)}")
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
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle") and path.exists():
            raise UserError(f"{path}: pickled weights are refused, they can run code; save the adapter as safetensors")
    raise UserError(f"{folder}: no adapter there ({WEIGHTS_FILE} is missing); give the folder of an adapter")


def _read_config(path: Path) -> dict[str, Any]:
    """Reads adapter_config.json and refuses every kind of LoRA that is more than W + scale * B A."""
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); an adapter folder needs it") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f'{path}: not a LoRA adapter; "peft_type" must be "LORA"')
    for name in REFUSED_FIELDS:
        if config.get(name):
            raise UserError(f"{path}: {name}={config[name]!r} is not supported; merge or retrain as plain LoRA")
    if config.get("bias", "none") != "none":
        raise UserError(f'{path}: bias={config["bias"]!r} is not supported; retrain with bias="none"')
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        raise UserError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} also changes the base; convert to plain LoRA"
        )
    if not _is_number(config.get("r")) or config["r"] < 1 or config["r"] != int(config["r"]):
        raise UserError(f'{path}: "r" is {config.get("r")!r}, but must be a whole number of at least 1')
    if not _is_number(config.get("lora_alpha")):
        raise UserError(f'{path}: "lora_alpha" is {config.get("lora_alpha")!r}, but must be a finite number')
    return {**config, "r": int(config["r"])}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _opened(path: Path):
    """Opens a safetensors file; one that is cut short or not of this format is a `UserError`."""
    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}); copy or save the adapter again") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors as f32 copies (PEFT often stores bf16)."""
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    for key, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"{path}: {key} is {tensor.dtype}, but adapter weights must be floating-point")
        tensors[key] = np.array(tensor, dtype=np.float32)
        if not np.isfinite(tensors[key]).all():
            raise UserError(f"{path}: {key} holds NaN or infinity; the adapter is damaged or its training diverged")
    return tensors


def _stack_layers(
    file: Path, tensors: Mapping[str, np.ndarray], shapes: Mapping[str, lora.Shape], rank: int
) -> dict[str, dict[str, jax.Array]]:
    """Checks every tensor against the base and stacks the layers, to {"a": [L, in, r], "b": [L, r, out]}."""
    found = set()
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        path = PATHS.get(match[2]) if match else None
        if path not in shapes:
            raise UserError(
                f"{file}: {key} is no LoRA matrix of this model's layers; those are "
                f"{sorted(MODULES[p] for p in shapes)}"
            )
        layers, fan_in, fan_out = shapes[path]
        if int(match[1]) >= layers:
            raise UserError(f"{file}: {key} is beyond this model's {layers} layers; was it made for another model?")
        expected = (rank, fan_in) if match[3] == "A" else (fan_out, rank)
        if tensor.shape != expected:
            raise UserError(
                f"{file}: {key} is {list(tensor.shape)}, but r={rank} and this model need {list(expected)}; "
                "was it made for another model?"
            )
        found.add(path)
    if not found:
        raise UserError(f"{file}: holds no matrices; save the adapter again")
    weights = {}
    for path in sorted(found):
        keys = {name: [_key(i, MODULES[path], name) for i in range(shapes[path][0])] for name in "AB"}
        missing = [key for key in keys["A"] + keys["B"] if key not in tensors]
        if missing:
            raise UserError(f"{file}: lacks {missing[0]} ({len(missing)} missing); an adapter must cover every layer")
        a, b = (np.stack([tensors[key].T for key in keys[name]]) for name in "AB")
        weights[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return weights
