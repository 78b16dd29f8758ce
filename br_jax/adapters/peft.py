"""Adapters on disk, in PEFT's layout and names: `peft.PeftModel` loads what we write, and we load theirs.

A folder holds `adapter_model.safetensors` and `adapter_config.json`. What PEFT has no field for (roles, the base's
fingerprint) travels in the safetensors header, where PEFT does not look. A module's name is PEFT's, for example
"model.layers.0.self_attn.q_proj".
"""

import fnmatch
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors.numpy import save as serialize

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError, near_names, one_line
from br_jax.core.io import PICKLES, make_private, open_safetensors, parse_json, read_json, write_bytes

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 1
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
_MOST_PADDED = 1 << 28  # numbers: a few layers of high rank in a small file are not to fill the memory with zeros
_F32_MAX = float(np.finfo(np.float32).max)

MODULES = {f"layers/attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"}
MODULES |= {f"layers/mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
PATHS = {module: path for path, module in MODULES.items()}
KEY = re.compile(r"base_model\.model\.model\.layers\.(\d{1,9})\.(\w+\.\w+)\.lora_([AB])\.weight", re.ASCII)

# Fields of PEFT's config. Set, these mean more than W + scale * B A, or another base; {} is not nothing: to PEFT it is
# a kind of LoRA with every setting at its default.
REFUSED_FIELDS = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "fan_in_fan_out", "trainable_token_indices",
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# Bookkeeping, what only training reads, and settings of what a field above turns on.
HARMLESS_FIELDS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip
# The other initializations (pissa, olora, corda, loftq, ...) also rewrite the base's weights.
_HARMLESS_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _F32_MAX


def _is_whole(value: Any, least: int = 1) -> bool:
    return _is_number(value) and value >= least and value == int(value)


def _is_pattern_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    # Llama-3.1 405B has 882 modules
    return lambda value: (
        not value or (isinstance(value, dict) and len(value) <= 2000 and all(map(fits, value.values())))
    )


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # field -> what it must be, and whether a value is that
    **dict.fromkeys(REFUSED_FIELDS, ("unset", lambda value: not value and value != {})),
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "bias": ("'none'", lambda value: value in (None, "none")),
    "init_lora_weights": ("one that leaves the base as it is", lambda value: value in _HARMLESS_INITS),
    "r": ("a whole number of at least 1", _is_whole),
    "lora_alpha": ("a finite number", _is_number),
    "rank_pattern": ("an object of at most 2,000 whole numbers of at least 1", _is_pattern_of(_is_whole)),
    "alpha_pattern": ("an object of at most 2,000 finite numbers", _is_pattern_of(_is_number)),
    "layers_to_transform": (
        "a layer's number or a list of them",
        lambda value: all(_is_whole(i, 0) for i in _list(value)),
    ),
}
KNOWN_FIELDS = (*_RULES, *HARMLESS_FIELDS, "target_modules", "exclude_modules", "layers_pattern", "use_rslora")


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
    """Writes an adapter folder that PEFT can load, all of it or nothing; other files there stay.

    The form is uniform, as serving stacks (vLLM for one) read only one rank and one alpha: every layer of a path is
    there, a narrower matrix is padded with zeros to the widest rank (exact), and there is no rank or alpha pattern.
    `fingerprint` is the base's. Only in the `provider`'s folder may a Buffer be written; that folder, and one that is
    `private`, is for its owner alone. `extra` is further provenance, JSON values.
    """
    lora.require_adapter(adapter, folder)
    folder, private = as_folder(folder), private or provider
    (lora.require_roles if provider else lora.refuse_buffer)(folder, adapter.roles)
    if not adapter.weights:
        raise UserError(f"{folder}: the adapter has no matrices; there is nothing to write")
    lora.require_finite(adapter)
    for path in adapter.weights.keys() - MODULES.keys():
        raise UserError(f"adapter path {path!r} has no name in PEFT's layout; {near_names(path, MODULES)}")
    rank = max(pair["a"].shape[-1] for pair in adapter.weights.values())
    adapter = lora.pad_rank(jax.device_get(adapter), rank)
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), adapter)
    provenance = {"format_version": FORMAT_VERSION, "roles": list(adapter.roles), "extra": dict(extra or {})}
    provenance |= {"fingerprint": lora.fingerprint(adapter), "base_fingerprint": fingerprint}
    alpha = float(adapter.scale) * rank  # so that alpha / r comes back exactly
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "bias": "none"}
    config |= {"r": rank, "lora_alpha": int(alpha) if alpha.is_integer() else alpha, "lora_dropout": 0.0}
    config |= {"target_modules": sorted(MODULES[path].rsplit(".", 1)[-1] for path in adapter.weights)}
    config |= {"modules_to_save": None, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}}
    config |= {"inference_mode": True} | dict.fromkeys(("fan_in_fan_out", "use_dora", "use_rslora"), False)
    tensors = {}  # PEFT's A [r, in] and B [out, r] of each layer
    for path, pair in adapter.weights.items():
        for layer in range(pair["a"].shape[0]):
            for key, side in zip(_keys(_module(layer, path)), "ab", strict=True):
                # safetensors copies the buffer as it lies, whatever the strides say
                tensors[key] = np.ascontiguousarray(pair[side][layer].T)
    # one header entry: safetensors writes several in random order, and equal adapters should be equal files
    weights = serialize(tensors, metadata={"br_jax": json.dumps(provenance, sort_keys=True)})
    files = {CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), WEIGHTS_FILE: weights}
    folder.parent.mkdir(parents=True, exist_ok=True)
    near = folder if folder.is_dir() else folder.parent  # on the same disk
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=near) as new:  # its mode is 0700
        for name, data in files.items():
            write_bytes(Path(new, name), data, mode=0o600 if private else 0o666)
        if private:
            make_private(folder)
        folder.mkdir(exist_ok=True)
        # At every moment the folder holds a pair that belongs together, or no weights.
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)
        for name in files:
            os.replace(Path(new, name), folder / name)


def load_adapter(
    folder: str | os.PathLike, params: Mapping[str, Any], *, fingerprint: str = "", role: str | None = None
) -> Adapter:
    """Reads an adapter folder made by `save_adapter` or by PEFT, to f32 and [L, ...]; safetensors only.

    Plain LoRA of every form is read: any targets in the layers, some layers only, ranks and alphas by pattern, rsLoRA.
    Where the config lists its targets, a tensor that they do not call for, or one that is missing, is an error (PEFT
    would go on); else the tensors say what is adapted. `params` is the base's tree, of arrays or shapes; `fingerprint`
    and `role` are what the caller says: one that says otherwise is refused. Where neither says a role, it is "unknown".
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
    """What `save_adapter` recorded beside the weights; {} of a folder that PEFT made."""
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
    found = parse_json(text, f"{path}: its br_jax header", "save the adapter again")
    known = {"format_version": FORMAT_VERSION, "roles": [lora.UNKNOWN], "base_fingerprint": ""}
    known |= found if isinstance(found, dict) else {"roles": None}
    version, roles = known["format_version"], known["roles"]
    are_roles = isinstance(roles, list) and all(isinstance(role, str) and roles.count(role) == 1 for role in roles)
    if not (are_roles and isinstance(known["base_fingerprint"], str) and version in range(FORMAT_VERSION + 1)):
        raise UserError(
            f"{path}: its br_jax header is damaged, or of a later version than this br_jax reads; save the adapter "
            "again, or update br_jax"
        )
    lora.require_roles(path, roles)
    return found


def read_config(file: Path) -> dict[str, Any]:
    """The content of adapter_config.json; a `UserError` where it is, or may be, more than plain LoRA."""
    config = read_json(file, "save the adapter again")
    for name, (needed, fits) in _RULES.items():
        if not fits(config.get(name)):
            value = one_line(repr(config.get(name)))
            raise UserError(f'{file}: "{name}" is {value}, but must be {needed}; save the adapter again as plain LoRA')
    for name in sorted(config.keys() - set(KNOWN_FIELDS)):
        if config[name]:
            raise UserError(
                f"{file}: the field {name!r} is not known and may change what the adapter does; update br_jax, or take "
                "the field out if it is a note"
            )
    for key in config.get("alpha_pattern") or {}:
        if _matcher(key) is None:
            raise UserError(
                f'{file}: "alpha_pattern" holds {one_line(repr(key), 60)}, more than names, ".*", "\\d" and '
                "[ranges]; list the modules by name"
            )
    return config


# What of regular expressions PEFT writes and people use: the rest can take years to match.
_READ = re.compile(r"\^?((?:\w|\\?\.|\.\*|\\d|\[[\w-]+\])*)\$?", re.ASCII)
_AS_GLOB = {r"\.": ".", ".": "?", ".*": "*", r"\d": "[0-9]"}


@functools.lru_cache(4096)
def _matcher(key: str) -> Callable[[str], Any] | None:
    """What matches a module's name with a pattern's key, as PEFT's `(.*\\.)?(KEY)$`, in linear time; None: not read."""
    match = _READ.fullmatch(key)
    if match is None:
        return None
    glob = re.sub(r"\\\.|\.\*|\.|\\d", lambda part: _AS_GLOB[part[0]], match[1])
    globs = [glob] if key.startswith("^") else [glob, f"*.{glob}"]
    return re.compile("|".join(map(fnmatch.translate, globs))).match


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _module(layer: int, path: str) -> str:
    return f"model.layers.{layer}.{MODULES[path]}"


def _keys(module: str) -> list[str]:
    """The names of a module's A and B."""
    return [f"base_model.model.{module}.lora_{half}.weight" for half in "AB"]


def _ends(module: str) -> list[str]:
    """The names by which a target can call for a module: its own, and what follows each dot of it."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def is_adapted(config: Mapping[str, Any], module: str) -> bool | None:
    """Whether a config calls for a module, by peft's `check_target_module_exists`; None: the tensors say it."""
    targets, layers = config.get("target_modules"), _list(config.get("layers_to_transform"))
    listed = isinstance(targets, list) and not config.get("exclude_modules")
    if listed and module in targets:
        return True
    if layers and int(module.split(".")[2]) not in layers:
        return False
    return not set(_ends(module)).isdisjoint(map(str, targets)) if listed else None


def by_pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """A module's rank or alpha: the first key that matches counts, as in peft's `get_pattern_key`.

    None where a key before that is not read.
    """
    for key, value in (config.get(field) or {}).items():
        if (matches := _matcher(key)) is None or matches(module):
            return matches and value
    return default


def _stack_layers(
    file: Path, config: Mapping[str, Any], shapes: Mapping[str, lora.Shape]
) -> tuple[lora.Weights, float]:
    """The layers as {"a": [L, in, R], "b": [L, R, out]}, narrow or absent ones padded with zeros, and one scale of all.

    Where a module's scale is not the config's, the ratio of the two goes into its b.
    """
    tensors = {}
    with open_safetensors(file) as opened:
        for key in opened.keys():  # noqa: SIM118 (it is no mapping)
            if (kind := opened.get_slice(key).get_dtype()) not in _FLOATS:
                raise UserError(f"{file}: {key} is {kind}, but adapter weights must be {', '.join(_FLOATS)}")
            with np.errstate(over="ignore"):  # what f32 cannot hold becomes infinity, and is refused as that
                tensors[key] = np.array(opened.get_tensor(key), dtype=np.float32)
            if not np.isfinite(tensors[key]).all():
                raise UserError(f"{file}: {key} holds NaN or infinity; the adapter is damaged or its training diverged")
    stored = sum(tensor.size for tensor in tensors.values())
    shapes = {path: shapes[path] for path in sorted(shapes.keys() & MODULES.keys())}
    root = math.sqrt if config.get("use_rslora") else float
    taken = {path: {} for path in shapes}  # path -> layer -> A [r, in], B [out, r] and the scale
    for path, (layers, *widths) in shapes.items():
        for layer in range(layers):
            keys = _keys(module := _module(layer, path))
            there = [key in tensors for key in keys]
            if not (any(there) if (adapted := is_adapted(config, module)) is None else adapted):
                continue
            if not all(there):
                missing = keys[there.index(False)]
                raise UserError(f"{file}: lacks {missing}, which {CONFIG_FILE} calls for; save the adapter again")
            a, b = map(tensors.pop, keys)
            rank = by_pattern(config, "rank_pattern", module, config["r"])
            rank = max((*a.shape[:1], 1)) if rank is None else int(rank)  # the tensors say it
            for key, matrix, shape in zip(keys, (a, b), ([rank, widths[0]], [widths[1], rank]), strict=True):
                if list(matrix.shape) != shape:
                    raise UserError(
                        f"{file}: {key} is {list(matrix.shape)}, but its rank in {CONFIG_FILE} and this model need "
                        f"{shape}; was it made for another model?"
                    )
            taken[path][layer] = a, b, by_pattern(config, "alpha_pattern", module, config["lora_alpha"]) / root(rank)
    if not stored and not any(taken.values()):
        raise UserError(f"{file}: holds no matrices; save the adapter again")
    if tensors:
        names = ", ".join(MODULES[path].rsplit(".", 1)[-1] for path in shapes)
        raise UserError(
            f"{file}: {min(tensors)!r} is no LoRA matrix that {CONFIG_FILE} calls for in this model's layers, where "
            f"{names} can be adapted; was it made for another model?"
        )
    ends = {end for path in shapes for layer in range(shapes[path][0]) for end in _ends(_module(layer, path))}
    targets = config.get("target_modules")
    if isinstance(targets, list) and (unknown := sorted(set(map(str, targets)) - ends)):
        logging.warning("%s: no layer of this model has its targets %s", file, one_line(", ".join(unknown)))
    # nothing is a multiple of a zero scale
    scale = config["lora_alpha"] / root(int(config["r"]))
    scale = scale or (1.0 if any(each for path in taken.values() for *_, each in path.values()) else 0.0)
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
