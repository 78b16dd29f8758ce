"""Adapters on disk, in PEFT's layout and names: `peft.PeftModel` loads what we write, and we load theirs.

A folder holds `adapter_model.safetensors` and `adapter_config.json`. What PEFT has no field for (roles, the
base's fingerprint) travels in the safetensors header, where PEFT does not look.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save as serialize

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft_config import PlainLora, read_config
from br_jax.core.errors import UserError, near_names
from br_jax.core.io import PICKLES, make_private, open_safetensors, parse_json, reading, writing

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
_MOST_PADDED = 1 << 28  # numbers: a few layers of high rank in a small file are not to fill the memory with zeros

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
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,9})\.(\w+\.\w+)\.lora_([AB])\.weight", re.ASCII)


def save_adapter(
    folder: str | os.PathLike,
    adapter: Adapter,
    *,
    base_name: str,
    fingerprint: str = "",
    provider: bool = False,
    private: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes an adapter folder that PEFT can load; all of it or nothing.

    Other files in an existing folder stay. The form is uniform, as serving stacks (vLLM for one) read only one rank and
    one alpha: every layer of a path is there, a narrower matrix is padded with zeros to the widest rank (exact), and
    there is no rank or alpha pattern.

    Args:
        base_name: goes into `base_model_name_or_path`.
        fingerprint: the base's content hash; checked again by `load_adapter`.
        provider: the folder is the provider's own and private; only there may a buffer be written.
        private: for its owner alone (mode 0700, files 0600).
        extra: further provenance, JSON values.

    Raises:
        UserError: a buffer, or an adapter of unknown role, outside the provider's folder; an adapter that is empty, not
            finite or not of the decoder's layers; or a folder that cannot be written (full disk included).
    """
    folder = Path(folder)
    (lora.require_roles if provider else lora.refuse_buffer)(folder, adapter.roles)
    if not adapter.weights:
        raise UserError(f"{folder}: the adapter has no matrices; there is nothing to write")
    lora.require_finite(adapter)
    rank = max(pair["a"].shape[-1] for pair in adapter.weights.values())
    adapter = jax.tree.map(lambda leaf: leaf.astype(np.float32), lora.pad_rank(adapter, rank))
    provenance = {
        "format_version": FORMAT_VERSION,
        "roles": list(adapter.roles),
        "fingerprint": lora.fingerprint(adapter),
        "base_fingerprint": fingerprint,
        "extra": dict(extra or {}),
    }
    # one header entry: safetensors writes several in random order, and equal adapters should be equal files
    header = {"br_jax": json.dumps(provenance, sort_keys=True)}
    config = json.dumps(_peft_config(adapter, rank, base_name), indent=2, sort_keys=True) + "\n"
    files = {CONFIG_FILE: config.encode(), WEIGHTS_FILE: serialize(_tensors(adapter), metadata=header)}
    _write_folder(folder, files, private=private or provider)


def load_adapter(
    folder: str | os.PathLike, params: Mapping[str, Any], *, fingerprint: str = "", role: str | None = None
) -> Adapter:
    """Reads an adapter folder made by `save_adapter` or by PEFT; safetensors only.

    Plain LoRA of every form is read: any targets in the layers, some layers only, ranks and alphas by pattern, rsLoRA.
    Where the config lists its targets, a tensor that they do not call for, or one that is missing, is an error (PEFT
    would go on); where it tells them in another way, the tensors say what is adapted.

    Args:
        params: the base's tree, for its shapes; arrays or `jax.ShapeDtypeStruct`.
        fingerprint: the base's content hash; compared when the folder records one too.
        role: what the caller says that it is, made for this base; a folder that says otherwise is refused. Without it,
            the adapter in a folder that records no role (PEFT's own) has the role "unknown".

    Returns:
        The adapter in f32, its layers stacked to [L, ...].

    Raises:
        UserError: a folder that is missing, damaged, pickled, of another model, of more than plain LoRA, or of the
            embedding or the head.
    """
    folder = Path(folder)
    provenance = read_provenance(folder)
    config = read_config(folder / CONFIG_FILE)
    recorded = provenance.get("base_fingerprint", "")
    roles = tuple(sorted(provenance.get("roles", [role or lora.UNKNOWN])))
    if fingerprint and recorded and fingerprint != recorded:
        raise UserError(f"{folder}: made for the base {recorded}, but this base is {fingerprint}; load the other model")
    if role is not None and roles != (role,):
        raise UserError(
            f"{folder}: is {'+'.join(roles)} by its own account, not {role}: give the folder of a {role} adapter"
        )
    weights, scale = _stack_layers(folder / WEIGHTS_FILE, config, lora.kernel_shapes(params))
    adapter = Adapter(weights, jnp.float32(scale), roles, recorded or (fingerprint if role else ""))
    if provenance.get("fingerprint") not in (None, lora.fingerprint(adapter)):
        raise UserError(
            f"{folder}: its numbers are not those that were saved: changed or damaged since; copy or make it again"
        )
    return adapter


def read_provenance(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_adapter` recorded beside the weights.

    Returns:
        "format_version", "roles", "fingerprint" (of the numbers), "base_fingerprint" and "extra"; empty for a folder
        that PEFT made.

    Raises:
        UserError: a folder that is missing, damaged or pickled, or made by a later version.
    """
    path = _find_weights(Path(folder))
    with open_safetensors(path) as file:
        text = (file.metadata() or {}).get("br_jax", "{}")
    provenance = parse_json(text, f"{path}: its br_jax header", "save the adapter again")
    try:
        version, roles = provenance.get("format_version", FORMAT_VERSION), provenance.get("roles", [lora.UNKNOWN])
        well_formed = isinstance(version, int) and isinstance(roles, list) and len({*roles}) == len(roles)
        well_formed = well_formed and isinstance(provenance.get("base_fingerprint", ""), str)
    except (AttributeError, TypeError):
        well_formed = False
    if not well_formed or version > FORMAT_VERSION:
        raise UserError(
            f"{path}: its br_jax header is damaged, or of a later version than this br_jax reads; save the adapter "
            "again, or update br_jax"
        )
    lora.require_roles(path, roles)
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


def _tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """Splits the layers and turns the matrices into PEFT's A [r, in] and B [out, r]."""
    tensors = {}
    for path, pair in jax.device_get(adapter.weights).items():
        for layer in range(pair["a"].shape[0]):
            for name, matrix in {"A": pair["a"][layer].T, "B": pair["b"][layer].T}.items():
                # safetensors copies the buffer as it lies, whatever the strides say
                tensors[_key(_module(layer, path), name)] = np.ascontiguousarray(matrix)
    return tensors


def _key(module: str, matrix: str) -> str:
    return f"base_model.model.{module}.lora_{matrix}.weight"


def _module(layer: int, path: str) -> str:
    """PEFT's name of one layer of one of our paths, e.g. "model.layers.0.self_attn.q_proj"."""
    return f"model.layers.{layer}.{_name(path)}"


def _name(path: str) -> str:
    if path not in MODULES:
        raise UserError(f"adapter path {path!r} has no name in PEFT's layout; {near_names(path, MODULES)}")
    return MODULES[path]


def _write_folder(folder: Path, files: Mapping[str, bytes], private: bool) -> None:
    """Writes files into a folder by way of a temporary one, so that a crash or a full disk leaves no half.

    At every moment the folder holds a pair that belongs together, or no weights.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder if folder.is_dir() else folder.parent  # on the same disk
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=beside) as new:  # its mode is 0700
            for name, data in files.items():
                _write_file(Path(new, name), data, mode=0o600 if private else 0o666)
            if private:
                make_private(folder)
            folder.mkdir(exist_ok=True)
            (folder / WEIGHTS_FILE).unlink(missing_ok=True)
            for name in files:
                os.replace(Path(new, name), folder / name)


def _write_file(path: Path, data: bytes, mode: int) -> None:
    """Writes a new file of this mode, through to the disk."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _find_weights(folder: Path) -> Path:
    """Gives the folder's weights file; pickled ones are refused by name, as loading one can run any code."""
    with reading(folder, "give a folder that you may read"):
        candidates = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    if folder / WEIGHTS_FILE in candidates:
        return folder / WEIGHTS_FILE
    for path in candidates:
        if path.suffix in PICKLES and path.exists():
            raise UserError(f"{path}: pickled weights are refused, they can run code; save the adapter as safetensors")
    raise UserError(f"{folder}: no adapter there ({WEIGHTS_FILE} is missing); give the folder of an adapter")


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads all tensors as f32 copies (PEFT often stores bf16)."""
    tensors = {}
    with open_safetensors(path) as file:
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            kind = file.get_slice(key).get_dtype()
            if kind not in FLOATS:
                raise UserError(f"{path}: {key} is {kind}, but adapter weights must be {', '.join(FLOATS)}")
            with np.errstate(over="ignore"):  # what f32 cannot hold becomes infinity, and is refused as that
                tensors[key] = np.array(file.get_tensor(key), dtype=np.float32)
            if not np.isfinite(tensors[key]).all():
                raise UserError(f"{path}: {key} holds NaN or infinity; the adapter is damaged or its training diverged")
    return tensors


def _stack_layers(
    file: Path, config: PlainLora, shapes: Mapping[str, lora.Shape]
) -> tuple[dict[str, dict[str, jax.Array]], float]:
    """Reads and stacks the layers to {"a": [L, in, R], "b": [L, R, out]}, and gives the one scale of all.

    R is a path's widest rank: a narrower one is padded with zeros, and a layer that is not adapted is all zeros (both
    exact). Where a module's scale is not the config's, the ratio of the two goes into its b.
    """
    tensors = _read_tensors(file)
    shapes = {path: shapes[path] for path in sorted(shapes.keys() & MODULES.keys())}
    modules = {path: [_module(layer, path) for layer in range(shape[0])] for path, shape in shapes.items()}
    adapted = {module for names in modules.values() for module in names if _is_adapted(config, module, tensors)}
    if not adapted and not tensors:
        raise UserError(f"{file}: holds no matrices; save the adapter again")
    # nothing is a multiple of a zero scale
    scale = config.scale if config.scale or not any(map(config.scale_of, adapted)) else 1.0
    weights, stored, padded = {}, sum(tensor.size for tensor in tensors.values()), 0
    for path, (layers, fan_in, fan_out) in shapes.items():
        factors = {}  # layer -> A [r, in] and B [out, r]
        for layer, module in enumerate(modules[path]):
            if module in adapted:
                rank = config.rank_of(module)
                sides = {"A": (rank, fan_in), "B": (fan_out, rank)}
                factors[layer] = [_take(file, tensors, _key(module, half), shape) for half, shape in sides.items()]
        if not factors:
            continue
        widest = max(len(a) for a, _ in factors.values())
        padded += layers * widest * (fan_in + fan_out)
        if padded > _MOST_PADDED + 16 * stored:
            raise UserError(f"{file}: its {stored:,} numbers, padded to all layers and one rank, would be {padded:,}")
        a, b = np.zeros((layers, fan_in, widest), np.float32), np.zeros((layers, widest, fan_out), np.float32)
        for layer, (theirs_a, theirs_b) in factors.items():
            ratio = config.scale_of(modules[path][layer]) / scale if scale else 1.0
            a[layer, :, : len(theirs_a)] = theirs_a.T
            b[layer, : len(theirs_a)] = theirs_b.T * ratio
        weights[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    if tensors:
        names = ", ".join(MODULES[path].rsplit(".", 1)[-1] for path in shapes)
        raise UserError(
            f"{file}: {min(tensors)!r} is no LoRA matrix that {CONFIG_FILE} calls for in this model's layers, where "
            f"{names} can be adapted; was it made for another model?"
        )
    return weights, scale


def _is_adapted(config: PlainLora, module: str, tensors: Mapping[str, np.ndarray]) -> bool:
    if config.targets is None:
        return any(_key(module, half) in tensors for half in "AB")
    parts = module.split(".")
    return any(".".join(parts[i:]) in config.targets for i in range(len(parts)))


def _take(file: Path, tensors: dict[str, np.ndarray], key: str, shape: tuple[int, int]) -> np.ndarray:
    """Takes one tensor out of those read, and checks that it is there and of this shape."""
    if key not in tensors:
        raise UserError(f"{file}: lacks {key}, which {CONFIG_FILE} calls for; save the adapter again")
    if tensors[key].shape != shape:
        raise UserError(
            f"{file}: {key} is {list(tensors[key].shape)}, but its rank in {CONFIG_FILE} and this model need "
            f"{list(shape)}; was it made for another model?"
        )
    return tensors.pop(key)
