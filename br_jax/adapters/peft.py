"""Adapters on disk, in PEFT's layout and names: `peft.PeftModel` loads what we write, and we load theirs.

A folder holds `adapter_model.safetensors` and `adapter_config.json`. What PEFT has no field for (roles, the base's
fingerprint) travels in the safetensors header, where PEFT does not look.
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
from absl import logging
from safetensors.numpy import save as serialize

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft_config import PlainLora, ends_of, read_config
from br_jax.core.errors import UserError, near_names, one_line
from br_jax.core.io import PICKLES, make_private, open_safetensors, parse_json, write_bytes

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
    lora.require_adapter(adapter, folder)
    folder = as_folder(folder)
    (lora.require_roles if provider else lora.refuse_buffer)(folder, adapter.roles)
    if not adapter.weights:
        raise UserError(f"{folder}: the adapter has no matrices; there is nothing to write")
    lora.require_finite(adapter)
    for path in adapter.weights.keys() - MODULES.keys():
        raise UserError(f"adapter path {path!r} has no name in PEFT's layout; {near_names(path, MODULES)}")
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
    tensors = {}  # PEFT's A [r, in] and B [out, r] of each layer
    for path, pair in jax.device_get(adapter.weights).items():
        for layer in range(pair["a"].shape[0]):
            for key, side in zip(_keys(_module(layer, path)), "ab", strict=True):
                # safetensors copies the buffer as it lies, whatever the strides say
                tensors[key] = np.ascontiguousarray(pair[side][layer].T)
    files = {CONFIG_FILE: config.encode(), WEIGHTS_FILE: serialize(tensors, metadata=header)}
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
    folder = as_folder(folder)
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


def as_folder(folder: Any, call: str = "") -> Path:
    """The path of a folder; a `UserError` for what is none, such as another argument of `call`."""
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"needs the path of a folder, got {type(folder).__name__}{call and f': the order is {call}'}")
    if "\0" in os.fspath(folder):
        raise UserError(f"{folder}: a null character is in the folder's name: choose another")
    return Path(folder)


def read_provenance(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads what `save_adapter` recorded beside the weights.

    Returns:
        "format_version", "roles", "fingerprint" (of the numbers), "base_fingerprint" and "extra"; empty for a folder
        that PEFT made.

    Raises:
        UserError: a folder that is missing, damaged or pickled, or made by a later version.
    """
    folder = as_folder(folder)
    candidates = sorted(folder.iterdir()) if folder.is_dir() else [folder]
    if (path := folder / WEIGHTS_FILE) not in candidates:
        for each in candidates:
            if each.suffix in PICKLES and each.exists():
                raise UserError(
                    f"{each}: pickled weights are refused, they can run code; save the adapter as safetensors"
                )
        raise UserError(f"{folder}: no adapter there ({WEIGHTS_FILE} is missing); give the folder of an adapter")
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
        "target_modules": sorted(MODULES[path].rsplit(".", 1)[-1] for path in adapter.weights),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }


def _module(layer: int, path: str) -> str:
    return f"model.layers.{layer}.{MODULES[path]}"


def _keys(module: str) -> list[str]:
    """The names of a module's A and B."""
    return [f"base_model.model.{module}.lora_{half}.weight" for half in "AB"]


def _write_folder(folder: Path, files: Mapping[str, bytes], private: bool) -> None:
    """Writes files into a folder by way of a temporary one, so that a crash or a full disk leaves no half.

    At every moment the folder holds a pair that belongs together, or no weights.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    near = folder if folder.is_dir() else folder.parent  # on the same disk
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=near) as new:  # its mode is 0700
        for name, data in files.items():
            write_bytes(Path(new, name), data, mode=0o600 if private else 0o666)
        if private:
            make_private(folder)
        folder.mkdir(exist_ok=True)
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        for name in files:
            os.replace(Path(new, name), folder / name)


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
    stored = sum(tensor.size for tensor in tensors.values())
    shapes = {path: shapes[path] for path in sorted(shapes.keys() & MODULES.keys())}
    taken = {path: {} for path in shapes}  # path -> layer -> A [r, in], B [out, r] and the scale
    for path, (layers, *widths) in shapes.items():
        for layer in range(layers):
            module = _module(layer, path)
            adapted = config.adapts(module)
            if adapted or (adapted is None and any(key in tensors for key in _keys(module))):
                taken[path][layer] = _take_module(file, tensors, config, module, widths)
    if not stored and not any(taken.values()):
        raise UserError(f"{file}: holds no matrices; save the adapter again")
    if tensors:
        names = ", ".join(MODULES[path].rsplit(".", 1)[-1] for path in shapes)
        raise UserError(
            f"{file}: {min(tensors)!r} is no LoRA matrix that {CONFIG_FILE} calls for in this model's layers, where "
            f"{names} can be adapted; was it made for another model?"
        )
    ends = {end for path in shapes for layer in range(shapes[path][0]) for end in ends_of(_module(layer, path))}
    if unknown := sorted((config.targets or set()) - ends):
        logging.warning("%s: no layer of this model has its targets %s", file, one_line(", ".join(unknown)))
    # nothing is a multiple of a zero scale
    scale = config.scale or (1.0 if any(each for path in taken.values() for *_, each in path.values()) else 0.0)
    weights, padded = {}, 0
    for path, (layers, fan_in, fan_out) in shapes.items():
        widest = max((len(a) for a, _, _ in taken[path].values()), default=0)
        padded += layers * widest * (fan_in + fan_out)
        if padded > _MOST_PADDED + 16 * stored:
            raise UserError(f"{file}: its {stored:,} numbers, padded to all layers and one rank, would be {padded:,}")
        if not widest:
            continue
        a, b = np.zeros((layers, fan_in, widest), np.float32), np.zeros((layers, widest, fan_out), np.float32)
        for layer, (theirs_a, theirs_b, own_scale) in taken[path].items():
            a[layer, :, : len(theirs_a)] = theirs_a.T
            b[layer, : len(theirs_a)] = theirs_b.T * (own_scale / scale if scale else 1.0)
        weights[path] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    return weights, scale


def _take_module(
    file: Path, tensors: dict[str, np.ndarray], config: PlainLora, module: str, widths: list[int]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Takes A and B of a module out of the tensors, checks that they fit, and gives its scale too."""
    for key in (keys := _keys(module)):
        if key not in tensors:
            raise UserError(f"{file}: lacks {key}, which {CONFIG_FILE} calls for; save the adapter again")
    a, b = map(tensors.pop, keys)
    rank = config.rank_of(module) or max(1, len(a) if a.ndim else 1)
    for key, matrix, shape in zip(keys, (a, b), ([rank, widths[0]], [widths[1], rank]), strict=True):
        if list(matrix.shape) != shape:
            raise UserError(
                f"{file}: {key} is {list(matrix.shape)}, but its rank in {CONFIG_FILE} and this model need {shape}; "
                "was it made for another model?"
            )
    return a, b, config.scale_of(module, rank)
