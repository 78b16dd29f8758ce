"""What PEFT's adapter_config.json says of an adapter: its ranks and scales, and that it is plain LoRA.

The rules are those of peft 0.21: `get_pattern_key` (which pattern counts) and `LoraLayer.update_layer` (the scale). A
module's name is PEFT's, e.g. "model.layers.0.self_attn.q_proj".

A pattern is a stranger's regular expression, with which Python's `re` may take years. RE2 takes time linear in the
name; what it does not know (backreferences, what stands before or after), or reads otherwise than `re`, is refused.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import re2

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import read_json

Matches = Callable[[str], Any]  # whether an expression matches a module's name

F32_MAX = float(np.finfo(np.float32).max)
_MAX_PATTERNS, _MAX_EXPRESSION = 2000, 1000  # Llama-3.1 405B has 882 modules; characters
_MAX_PROGRAM = 20_000  # instructions of all of RE2's programs, each of which a name may need: one has fifty or so
_PLAIN = re.compile(r"[\w.]*", re.ASCII)  # no more than a name, and quicker by `re`
# "[[:alpha:]]" is a class to RE2 alone, "a{,3}" a repetition to `re` alone.
_READ_OTHERWISE = ("[:", "{,")

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


def _is_rank(value: Any) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)


def _maps_to(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


# field -> what it must be, and whether a value is that
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    # {} is not nothing: to PEFT it is a kind of LoRA with every setting at its default
    **dict.fromkeys(REFUSED_FIELDS, ("unset", lambda value: not value and value != {})),
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
    "bias": ("'none'", lambda value: value in (None, "none")),
    "init_lora_weights": ("one that leaves the base as it is", lambda value: value in HARMLESS_INITS),
    "r": ("a whole number of at least 1", _is_rank),
    "lora_alpha": ("a finite number", _is_number),
    "rank_pattern": ("an object of whole numbers of at least 1", _maps_to(_is_rank)),
    "alpha_pattern": ("an object of finite numbers", _maps_to(_is_number)),
}
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
KNOWN_FIELDS = (*_RULES, *HARMLESS_FIELDS, *_TARGETS, "use_rslora")


@dataclasses.dataclass(frozen=True)
class PlainLora:
    """An adapter_config.json that is W + scale * B A and no more."""

    rank: int  # "r", for a module that no rank pattern matches
    alpha: float  # "lora_alpha", for a module that no alpha pattern matches
    rank_stabilized: bool  # the scale is alpha / sqrt(rank), not alpha / rank
    rank_pattern: Sequence[tuple[Matches, int]]  # for a module's name, and its rank; the first that matches counts
    alpha_pattern: Sequence[tuple[Matches, float]]  # likewise
    # Names, or ends of names, of all adapted modules; None where they are told in another way (by an expression, some
    # layers only, with exceptions, or not at all), and the tensors say which they are.
    targets: frozenset[str] | None

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

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def read_config(file: Path) -> PlainLora:
    """Reads adapter_config.json.

    Raises:
        UserError: a file that is missing or damaged, a kind of adapter that is more than plain LoRA, a field that is
            not known (it may be one), or a value of the wrong kind.
    """
    config = read_json(file, "save the adapter again")
    for name, (needed, fits) in _RULES.items():
        if not fits(config.get(name)):
            told = one_line(repr(config.get(name)))
            raise UserError(f'{file}: "{name}" is {told}, but must be {needed}; save the adapter again as plain LoRA')
    for name in sorted(config.keys() - set(KNOWN_FIELDS)):
        if config[name]:
            raise UserError(
                f"{file}: the field {name!r} is not known and may change what the adapter does; update br_jax, or take "
                "the field out if it is a note"
            )
    targets = config.get("target_modules")
    listed = isinstance(targets, list) and not config.get("exclude_modules")
    listed = listed and config.get("layers_to_transform") in (None, [])  # 0 is a layer
    return PlainLora(
        rank=int(config["r"]),
        alpha=config["lora_alpha"],
        rank_stabilized=bool(config.get("use_rslora")),
        rank_pattern=[(matches, int(rank)) for matches, rank in _read_pattern(file, config, "rank_pattern")],
        alpha_pattern=_read_pattern(file, config, "alpha_pattern"),
        targets=frozenset(map(str, targets)) if listed else None,
    )


def _read_pattern(file: Path, config: Mapping[str, Any], name: str) -> list[tuple[Matches, Any]]:
    """Reads a mapping from expressions to ranks or alphas; the file's order stays, as the first match counts."""
    pattern, found, size = config.get(name) or {}, [], 0
    if len(pattern) > _MAX_PATTERNS:
        raise UserError(f'{file}: "{name}" has {len(pattern):,} expressions, {_MAX_PATTERNS:,} are the most')
    options = re2.Options()
    options.log_errors, options.max_mem = False, 1 << 17  # bytes: there may be many of them
    for key, value in pattern.items():
        expression = rf"(.*\.)?({key})$"
        try:
            if len(key) > _MAX_EXPRESSION or any(part in key for part in _READ_OTHERWISE):
                raise re2.error(f"longer than {_MAX_EXPRESSION:,} characters, or with {' or '.join(_READ_OTHERWISE)}")
            if _PLAIN.fullmatch(key):
                found.append((re.compile(expression).match, value))
                continue
            program = re2.compile(expression, options)
            size += program.programsize
            if size > _MAX_PROGRAM:
                raise re2.error("too large, together with those before it")
            found.append((program.match, value))
        except (re2.error, UnicodeEncodeError) as error:
            why = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
            raise UserError(
                f'{file}: "{name}" holds {one_line(repr(key), 60)}, no regular expression of linear time '
                f"({one_line(why)}); write it in another way, or save the adapter again"
            ) from error
    return found


def _first_match(pattern: Sequence[tuple[Matches, Any]], module: str, default: Any) -> Any:
    return next((value for matches, value in pattern if matches(module)), default)
