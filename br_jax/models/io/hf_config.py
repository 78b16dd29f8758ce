"""config.json of a Hugging Face folder and a `ModelSpec`, each from the other.

transformers' own config classes read the file, so that what is absent means what it means there. Each of their fields
is either read here, of no influence on what the model computes, or refused unless it has the one value that is
implemented; any other field is an error.
"""

import copy
import dataclasses
import pathlib
from typing import Any

from br_jax.errors import UserError
from br_jax.models.spec import KERNELS, ModelSpec

_QKVO, _MLP = KERNELS[:4], KERNELS[4:]


@dataclasses.dataclass(frozen=True)
class Family:
    """What config.json does not say, for its makers' code does: the class of the model, and switches of the spec."""

    architecture: str
    switches: dict[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", {"biases": ("q", "k", "v")}),
    "qwen3": Family("Qwen3ForCausalLM", {"qk_norm": True}),
    "gemma2": Family("Gemma2ForCausalLM", {"post_norms": True, "norm_plus_one": True, "scale_embeddings": True}),
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "llama3")

READ = {
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "hidden_act", "hidden_activation", "rms_norm_eps", "tie_word_embeddings",
    "max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta", "attention_bias", "mlp_bias",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping",
}  # fmt: skip
# How weights were drawn, what is returned, what generation begins and ends with, where the file came from.
HARMLESS = {
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "torch_dtype", "pretraining_tp",
    "cache_implementation", "architectures", "dtype", "transformers_version", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "num_labels", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path",
}  # fmt: skip
ONLY = {"attention_dropout": (0, None), "use_bidirectional_attention": (None, False)}
NOTES = ("_", "unsloth_")  # how fields begin that tools leave for themselves


def read_config(content: dict[str, Any], path: str | pathlib.Path) -> ModelSpec:
    """The spec that a config.json describes.

    Args:
        content: the file's JSON object; left as it is.
        path: the file, for messages.

    Raises:
        UserError: a family, field or value that the decoder does not have, or sizes that make no model.
    """
    family, config = _parse(content, path)
    for name, value in content.items():
        if name not in READ | HARMLESS and not name.startswith(NOTES) and value not in ONLY.get(name, (None,)):
            known = f"only {ONLY[name][0]!r} is supported" if name in ONLY else "br_jax does not know this field"
            raise UserError(
                f"{path}: {name} is {value!r}: {known}, and leaving it out could change the model's answers"
            )
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: the activation is {activation!r}, only {' or '.join(ACTIVATIONS)} is supported")
    biases = _QKVO if getattr(config, "attention_bias", False) else ()
    biases += _MLP if getattr(config, "mlp_bias", False) else ()
    try:
        return ModelSpec(
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            ffw_dim=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            tie_embeddings=config.tie_word_embeddings,
            max_length=config.max_position_embeddings,
            model_type=config.model_type,
            activation=ACTIVATIONS[activation],
            query_scale=config.query_pre_attn_scalar**-0.5 if hasattr(config, "query_pre_attn_scalar") else None,
            attention_soft_cap=getattr(config, "attn_logit_softcapping", None),
            logit_soft_cap=getattr(config, "final_logit_softcapping", None),
            **_rope(config, path),
            **_windows(config),
            **{"biases": biases} | family.switches,
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its sizes make no model: {error}") from error


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a spec: `read_config` gives the spec back, and transformers its model."""
    family, theirs = FAMILIES[spec.model_type], _config_class(spec.model_type)().to_dict()
    rope = {"rope_type": "default"}
    if (scaling := spec.rope_scaling) is not None:
        rope = {"rope_type": "llama3", **dataclasses.asdict(scaling)}
        rope["original_max_position_embeddings"] = rope.pop("original_length")
    types = ["sliding_attention" if window else "full_attention" for window in spec.window_layers]
    said = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embed_dim,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.ffw_dim,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == spec.activation),
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings,
        "max_position_embeddings": spec.max_length,
        "attention_bias": set(_QKVO) <= set(spec.biases),
        "mlp_bias": set(_MLP) <= set(spec.biases),
        "sliding_window": spec.window,
        "use_sliding_window": spec.window is not None,
        "layer_types": types,
        "query_pre_attn_scalar": None if spec.query_scale is None else _whole(spec.query_scale**-2),
        "attn_logit_softcapping": spec.attention_soft_cap,
        "final_logit_softcapping": spec.logit_soft_cap,
    }
    said["hidden_activation"] = said["hidden_act"]
    return {
        "architectures": [family.architecture],
        "model_type": spec.model_type,
        "head_dim": spec.head_dim,  # all of them look for it, though not every class names it
        **{name: value for name, value in said.items() if name in theirs},
        # as readers older than transformers 5 know it; the newer ones know it too
        "rope_theta": spec.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def _config_class(model_type: str):
    """transformers' class of a family's configs."""
    from transformers import CONFIG_MAPPING  # here, for it imports torch where torch is installed

    return CONFIG_MAPPING[model_type]


def _parse(content: dict[str, Any], path) -> tuple[Family, Any]:
    model_type = content.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path}: model_type is {model_type!r}, only {known} are supported: choose such a model")
    if content.get("quantization_config"):
        raise UserError(f"{path}: quantization_config: quantized weights are read from GGUF only; load the plain model")
    try:
        return FAMILIES[model_type], _config_class(model_type).from_dict(copy.deepcopy(content))
    except Exception as error:  # its validators raise what they like
        raise UserError(f"{path}: transformers refuses it: {' '.join(str(error).split())}") from error


def _rope(config, path) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    kind = rope.pop("rope_type", "default")
    rope.pop("type", None)
    if kind not in ROPE_TYPES:
        raise UserError(f"{path}: rope_type is {kind!r}, only {' or '.join(ROPE_TYPES)} is supported")
    fields = {"rope_theta": rope.pop("rope_theta")}
    if kind == "llama3":
        fields["rope_scaling"] = {
            "original_length": rope.pop("original_max_position_embeddings"),
            **{name: rope.pop(name) for name in ("factor", "low_freq_factor", "high_freq_factor")},
        }
    if rope and rope != {"partial_rotary_factor": 1.0}:
        raise UserError(f"{path}: rope_scaling has {sorted(rope)}, which br_jax does not know")
    return fields


def _windows(config) -> dict[str, Any]:
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    windowed = tuple(kind == "sliding_attention" for kind in types or ())
    if window is None or (windowed and not any(windowed)):
        return {}
    return {"window": window} if all(windowed) else {"window": window, "windowed": windowed}


def _whole(number: float) -> float | int:
    """The whole number that a float is but for rounding, or itself."""
    return round(number) if abs(number - round(number)) < 1e-6 * number else number
