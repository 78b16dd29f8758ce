"""What PEFT's adapter_config.json says: which modules are adapted, of which rank, at which scale.

The rules are those of peft 0.21: `check_target_module_exists` (which modules), `get_pattern_key` (which pattern counts)
and `LoraLayer.update_layer` (the scale). A module's name is PEFT's, e.g. "model.layers.0.self_attn.q_proj".
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from br_jax.errors import UserError

READ_FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
)  # fmt: skip
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

# the modules outside the layers that a target may name too
EMBEDDINGS = ("model.embed_tokens", "lm_head")
# every linear module but the head, and those are all in the layers
ALL_LINEAR = r"model\.layers\..*"
# PEFT's: the first number after two names
ANY_LAYER_PATTERN = r".*?\.[^.]*\.(?P<layer>\d+)\."
F32_MAX = float(np.finfo(np.float32).max)

Names = tuple[str, ...] | re.Pattern


@dataclasses.dataclass(frozen=True)
class PlainLora:
    """An adapter_config.json that is W + scale * B A and no more.

    Attributes:
        file: where it stands, for messages.
        rank: "r", for a module that no rank pattern matches.
        alpha: "lora_alpha", for a module that no alpha pattern matches.
        rank_stabilized: the scale is alpha / sqrt(rank), not alpha / rank.
        rank_pattern: expression for a module's name -> rank; the first that matches counts.
        alpha_pattern: expression for a module's name -> alpha; the first that matches counts.
        target_modules: names, or ends of names, or an expression for the whole name; None if the file has none.
        exclude_modules: the same, for what is left out again.
        layers: the only layers that the end of a name reaches; None for all.
        layer_patterns: expressions that find a layer's number in a module's name.
    """

    file: Path
    rank: int
    alpha: float
    rank_stabilized: bool
    rank_pattern: dict[re.Pattern, int]
    alpha_pattern: dict[re.Pattern, float]
    target_modules: Names | None
    exclude_modules: Names
    layers: frozenset[int] | None
    layer_patterns: tuple[re.Pattern, ...]

    @property
    def scale(self) -> float:
        """The scale of a module that no pattern matches."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, module: str) -> int:
        """The rank of an adapted module."""
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The scale of an adapted module."""
        return self._scale(self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha))

    def adapts(self, module: str) -> bool:
        """Whether a module of this name is adapted."""
        if self.target_modules is None or _matches(self.exclude_modules, module):
            return False
        # `layers` limits only what the end of a name reaches
        by_end = not isinstance(self.target_modules, re.Pattern) and module not in self.target_modules
        return _matches(self.target_modules, module) and not (by_end and self._outside_layers(module))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _outside_layers(self, module: str) -> bool:
        if self.layers is None:
            return False
        found = next(filter(None, (pattern.match(module) for pattern in self.layer_patterns)), None)
        return found is None or int(found["layer"]) not in self.layers


def read_config(file: Path) -> PlainLora:
    """Reads adapter_config.json.

    Args:
        file: its path.

    Returns:
        What it says, checked.

    Raises:
        UserError: a file that is missing or damaged, a kind of adapter that is more than plain LoRA, a field that is
            not known (it may be one), or a value of the wrong kind.
    """
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); an adapter folder needs it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not valid (a JSON object was expected); save the adapter again")
    _refuse_more_than_plain(file, config)
    for name in ("r", "lora_alpha"):
        _check_value(file, name, config.get(name), whole=name == "r")
    layers, layer_patterns = _read_layers(file, config)
    return PlainLora(
        file=file,
        rank=int(config["r"]),
        alpha=config["lora_alpha"],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern={key: int(rank) for key, rank in _read_pattern(file, config, "rank_pattern").items()},
        alpha_pattern=_read_pattern(file, config, "alpha_pattern"),
        target_modules=_read_names(file, config, "target_modules"),
        exclude_modules=_read_names(file, config, "exclude_modules") or (),
        layers=layers,
        layer_patterns=layer_patterns,
    )


def adapted_modules(config: PlainLora, modules: Iterable[str]) -> list[str]:
    """Selects the modules that a config adapts.

    Args:
        config: as `read_config` gives.
        modules: the names of this model's modules, without the embedding and the head.

    Returns:
        Those of `modules` that are adapted, in their order; at least one.

    Raises:
        UserError: the embedding or the head is adapted too, or nothing of this model is.
    """
    for module in EMBEDDINGS:
        if config.adapts(module):
            raise UserError(
                f'{config.file}: "target_modules" takes in {module}, but only matrices of the layers are supported; '
                "retrain without it"
            )
    adapted = [module for module in modules if config.adapts(module)]
    if not adapted:
        raise UserError(
            f'{config.file}: no module of this model is adapted, as "target_modules", "exclude_modules" and '
            '"layers_to_transform" have it; was it made for another model?'
        )
    return adapted


def _refuse_more_than_plain(file: Path, config: Mapping[str, Any]) -> None:
    """Raises a `UserError` for what is, or may be, more than W + scale * B A."""
    if config.get("peft_type") != "LORA":
        raise UserError(
            f'{file}: "peft_type" is {config.get("peft_type")!r}, but only plain LoRA ("LORA") is supported; '
            "retrain as plain LoRA"
        )
    for name in REFUSED_FIELDS:
        # {} is not nothing: to PEFT it is a kind of LoRA with every setting at its default
        if config.get(name) or config.get(name) == {}:
            raise UserError(f'{file}: "{name}" is {config[name]!r}, which is not supported; retrain as plain LoRA')
    if config.get("bias", "none") != "none":
        raise UserError(f'{file}: "bias" is {config["bias"]!r}, which is not supported; retrain with bias="none"')
    if config.get("init_lora_weights", True) not in HARMLESS_INITS:
        raise UserError(
            f'{file}: "init_lora_weights" is {config["init_lora_weights"]!r}, which also changes the base; convert to '
            "plain LoRA"
        )
    for name in sorted(config.keys() - {*READ_FIELDS, *REFUSED_FIELDS, *HARMLESS_FIELDS}):
        if config[name]:
            raise UserError(
                f"{file}: the field {name!r} is not known and may change what the adapter does; update br_jax, or take "
                "the field out if it is a note"
            )


def _check_value(file: Path, name: str, value: Any, whole: bool) -> None:
    """Raises a `UserError` unless the value is a number that f32 can hold; if `whole`, a whole one of at least 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= F32_MAX
    if not is_number or (whole and (value < 1 or value != int(value))):
        needed = "a whole number of at least 1" if whole else "a finite number"
        raise UserError(f'{file}: "{name}" is {value!r}, but must be {needed}; save the adapter again')


def _read_pattern(file: Path, config: Mapping[str, Any], name: str) -> dict[re.Pattern, Any]:
    """Reads a mapping from expressions to ranks or alphas; the file's order stays, as the first match counts."""
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        raise UserError(f'{file}: "{name}" is {pattern!r}, but must be an object; save the adapter again')
    for key, value in pattern.items():
        _check_value(file, f"{name}[{key!r}]", value, whole=name == "rank_pattern")
    return {_compile(file, name, key, r"(.*\.)?({})$"): value for key, value in pattern.items()}


def _read_names(file: Path, config: Mapping[str, Any], name: str) -> Names | None:
    """Reads module names: a list, or an expression for whole names."""
    value = config.get(name)
    if isinstance(value, str):
        all_linear = name == "target_modules" and value.lower() == "all-linear"
        return re.compile(ALL_LINEAR) if all_linear else _compile(file, name, value)
    if value is None or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return None if value is None else tuple(value)
    raise UserError(f'{file}: "{name}" is {value!r}, but must be a list of names or one expression; save it again')


def _read_layers(file: Path, config: Mapping[str, Any]) -> tuple[frozenset[int] | None, tuple[re.Pattern, ...]]:
    """Reads the layers that names are limited to (None for all), and how a module's name says its layer."""
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or []
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise UserError(f'{file}: "layers_to_transform" is {layers!r}, but must be layer numbers; save it again')
    if not (isinstance(patterns, list) and all(isinstance(pattern, str) for pattern in patterns)):
        raise UserError(f'{file}: "layers_pattern" is {patterns!r}, but must be names; save it again')
    if (layers or patterns) and isinstance(config.get("target_modules"), str):
        raise UserError(f'{file}: "layers_to_transform" needs "target_modules" to be a list of names; save it again')
    if patterns and config.get("layers_to_transform") is None:
        raise UserError(f'{file}: "layers_pattern" needs "layers_to_transform" beside it; save it again')
    own = tuple(_compile(file, "layers_pattern", each, r"(?:^|.*?\.){}\.(?P<layer>\d+)\.") for each in patterns)
    return frozenset(layers) if layers else None, own or (re.compile(ANY_LAYER_PATTERN),)


def _compile(file: Path, name: str, expression: str, within: str = "{}") -> re.Pattern:
    try:
        return re.compile(within.replace("{}", expression))
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(
            f'{file}: "{name}" holds {expression!r}, which is no regular expression ({error}); save it again'
        ) from error


def _matches(names: Names, module: str) -> bool:
    if isinstance(names, re.Pattern):
        return names.fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(pattern: Mapping[re.Pattern, Any], module: str, default: Any) -> Any:
    return next((value for expression, value in pattern.items() if expression.match(module)), default)
