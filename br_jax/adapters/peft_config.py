"""What PEFT's adapter_config.json says of an adapter: what is adapted, at which ranks and scales.

The rules are those of peft 0.21: `check_target_module_exists` (what is adapted), `get_pattern_key` (which pattern
counts) and `LoraLayer.update_layer` (the scale). A module's name is PEFT's, "model.layers.0.self_attn.q_proj" for one.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import read_json

F32_MAX = float(np.finfo(np.float32).max)
_MOST_PATTERNS = 2000  # Llama-3.1 405B has 882 modules

# when set, they mean more than W + scale * B A, or another base
REFUSED_FIELDS = (
    "use_dora", "lora_bias", "modules_to_save", "layer_replication", "fan_in_fan_out", "trainable_token_indices",
    "target_parameters", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# bookkeeping, what only training reads, and settings of what a field above turns on
HARMLESS_FIELDS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip
# the other initializations (pissa, olora, corda, loftq, ...) also rewrite the base's weights
HARMLESS_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= F32_MAX


def _is_whole(value: Any, least: int = 1) -> bool:
    return _is_number(value) and value >= least and value == int(value)


def _is_pattern_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


# field -> what it must be, and whether a value is that
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    # {} is not nothing: to PEFT it is a kind of LoRA with every setting at its default
    **dict.fromkeys(REFUSED_FIELDS, ("unset", lambda value: not value and value != {})),
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "bias": ("'none'", lambda value: value in (None, "none")),
    "init_lora_weights": ("one that leaves the base as it is", lambda value: value in HARMLESS_INITS),
    "r": ("a whole number of at least 1", _is_whole),
    "lora_alpha": ("a finite number", _is_number),
    "rank_pattern": ("an object of whole numbers of at least 1", _is_pattern_of(_is_whole)),
    "alpha_pattern": ("an object of finite numbers", _is_pattern_of(_is_number)),
    "layers_to_transform": (
        "a layer's number or a list of them",
        lambda value: (
            value is None or all(_is_whole(each, 0) for each in (value if isinstance(value, list) else [value]))
        ),
    ),
}
KNOWN_FIELDS = (*_RULES, *HARMLESS_FIELDS, "target_modules", "exclude_modules", "layers_pattern", "use_rslora")


# a key's match with a module's name, None where the key is not read, and its value; the first that matches counts
Pattern = Sequence[tuple[Callable[[str], Any] | None, Any]]


@dataclasses.dataclass(frozen=True)
class PlainLora:
    """An adapter_config.json that is W + scale * B A and no more."""

    rank: int  # "r", for a module that no rank pattern matches
    alpha: float  # "lora_alpha", for a module that no alpha pattern matches
    rank_stabilized: bool  # the scale is alpha / sqrt(rank), not alpha / rank
    rank_pattern: Pattern
    alpha_pattern: Pattern
    # names, or ends of names, of the adapted modules; None where an expression, exceptions or nothing tells them
    targets: frozenset[str] | None
    layers: frozenset[int] | None  # that alone are adapted; None is all

    @property
    def scale(self) -> float:
        """The scale of a module that no pattern matches."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """The scale of an adapted module of this rank."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def rank_of(self, module: str) -> int | None:
        """The rank of an adapted module; None where an expression that may match it is not one that we read."""
        return _first_match(self.rank_pattern, module, self.rank)

    def adapts(self, module: str) -> bool | None:
        """Whether a module is adapted; None where that is for the tensors to say."""
        if self.targets is not None and module in self.targets:
            return True
        if self.layers is not None and int(module.split(".")[2]) not in self.layers:
            return False
        return None if self.targets is None else not self.targets.isdisjoint(ends_of(module))


def ends_of(module: str) -> list[str]:
    """The names by which a target can call for a module: its own, and what follows each dot of it."""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def read_config(file: Path) -> PlainLora:
    """Reads adapter_config.json.

    Raises:
        UserError: a file that is missing or damaged, a kind of adapter that is more than plain LoRA, a field that is
            not known (it may be one), or a value of the wrong kind.
    """
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
    ranks, alphas = (config.get(name) or {} for name in ("rank_pattern", "alpha_pattern"))
    if max(len(ranks), len(alphas)) > _MOST_PATTERNS:
        raise UserError(f"{file}: more than {_MOST_PATTERNS:,} rank or alpha patterns; save the adapter again")
    for key in alphas:
        if _matcher(key) is None:
            raise UserError(
                f'{file}: "alpha_pattern" holds {one_line(repr(key), 60)}, more than names, ".*", "\\d" and '
                "[ranges]; list the modules by name"
            )
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    return PlainLora(
        rank=int(config["r"]),
        alpha=config["lora_alpha"],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=[(_matcher(key), int(rank)) for key, rank in ranks.items()],
        alpha_pattern=[(_matcher(key), alpha) for key, alpha in alphas.items()],
        targets=frozenset(map(str, targets))
        if isinstance(targets, list) and not config.get("exclude_modules")
        else None,
        layers=None if layers in (None, []) else frozenset(layers if isinstance(layers, list) else [layers]),
    )


# what of regular expressions PEFT writes and people use: the rest can take years to match
_READ = re.compile(r"\^?((?:\w|\\?\.|\.\*|\\d|\[[\w-]+\])*)\$?", re.ASCII)
_AS_GLOB = {r"\.": ".", ".": "?", ".*": "*", r"\d": "[0-9]"}


def _matcher(key: str) -> Callable[[str], Any] | None:
    """Whether a module's name matches a pattern's key, as PEFT's `(.*\\.)?(KEY)$` does; None for what is not read.

    By a shell pattern, which takes no longer than the name.
    """
    match = _READ.fullmatch(key)
    if match is None:
        return None
    glob = re.sub(r"\\\.|\.\*|\.|\\d", lambda part: _AS_GLOB[part[0]], match[1])
    globs = [glob] if key.startswith("^") else [glob, f"*.{glob}"]
    return re.compile("|".join(map(fnmatch.translate, globs))).match


def _first_match(pattern: Pattern, module: str, default: Any) -> Any:
    """The value of the first key that matches; None where one before that is not read."""
    return next((value if matches else None for matches, value in pattern if not matches or matches(module)), default)
