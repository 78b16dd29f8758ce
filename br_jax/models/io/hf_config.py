"""config.json of a Hugging Face folder and a `ModelSpec`, each from the other.

transformers' own config classes read the file, so that what is absent means what it means there. Each of their fields
is read here (`READ`), changes nothing that is computed (`HARMLESS`), or has one value that is implemented (`ONLY`); any
other field is an error. A family's class ignores fields that it does not have, and so do we.
"""

import copy
import dataclasses
import pathlib
from typing import Any

from br_jax.core.bounds import Bound, bounds_of, require
from br_jax.core.errors import UserError, one_line
from br_jax.models.spec import KERNELS, ModelSpec

_BOUNDS = bounds_of(ModelSpec)

# What config.json does not say, for its makers' code does: switches of the spec.
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"biases": ("q", "k", "v")},
    "qwen3": {"qk_norm": True},
    "gemma2": {"post_norms": True, "norm_plus_one": True, "scale_embeddings": True},
}
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPE_TYPES = ("default", "llama3")
LAYER_TYPES = ("full_attention", "sliding_attention")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")

# Fields of a spec that config.json says in one field of its own.
SAME = {
    "vocab_size": "vocab_size", "embed_dim": "hidden_size", "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "ffw_dim": "intermediate_size", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
    "max_length": "max_position_embeddings", "model_type": "model_type",
    "attention_soft_cap": "attn_logit_softcapping", "logit_soft_cap": "final_logit_softcapping",
}  # fmt: skip
READ = {
    *SAME.values(), "hidden_act", "hidden_activation", "rope_parameters", "rope_scaling", "rope_theta",
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "query_pre_attn_scalar",
}  # fmt: skip
EVERY = {"head_dim", "rope_theta", "rope_scaling"}  # every family reads these, though not every class names them
# How weights were drawn, what is returned, what generation begins and ends with, where the file came from.
HARMLESS = {
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "torch_dtype", "pretraining_tp",
    "cache_implementation", "architectures", "dtype", "transformers_version", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "num_labels", "problem_type",
    "chunk_size_feed_forward", "is_encoder_decoder", "_name_or_path",
}  # fmt: skip
ONLY = {"attention_dropout": (0, None), "use_bidirectional_attention": (None, False), "is_causal": (True,)}
_NOTES = ("_", "unsloth_")  # how fields begin that tools leave for themselves


def read_config(content: dict[str, Any], path: str | pathlib.Path) -> ModelSpec:
    """The spec that the content of a config.json describes, which is left as it is.

    A `UserError` for a family, field or value that the decoder does not have, and for sizes that make no model.
    """
    try:
        return _read_config(content)
    except (UserError, TypeError) as error:  # TypeError: older transformers let any type pass
        raise UserError(f"{path}: {error}") from error


def _read_config(content: dict[str, Any]) -> ModelSpec:
    model_type = _known("model_type", content.get("model_type"), FAMILIES)
    if content.get("quantization_config"):
        raise UserError("quantization_config: quantized weights are read from GGUF only; load the plain model")
    if model_type == "mistral" and "layer_types" in content:
        raise UserError("layer_types: transformers takes it for a Ministral, which br_jax does not have")
    for name, value in content.items():
        if name not in READ | HARMLESS and not name.startswith(_NOTES) and value not in ONLY.get(name, (None,)):
            known = f"only {ONLY[name][0]!r} is supported" if name in ONLY else "br_jax does not know this field"
            said = f"{name} is {one_line(repr(value))}: {known}"
            raise UserError(f"{said}, and leaving it out could change the model's answers")
    theirs = _config_class(model_type)
    read = READ & (theirs().to_dict().keys() | EVERY)
    values = {name: copy.deepcopy(value) for name, value in content.items() if name in read}
    _require_sizes(values)  # before it makes a list of that many layers
    try:
        config = theirs.from_dict(values | {"model_type": model_type})
    except Exception as error:  # its validators raise what they like
        raise UserError(f"transformers refuses it: {one_line(error)}") from error
    has = {name: getattr(config, name, None) for name in READ}  # with the class' defaults
    fields = {ours: has[theirs] for ours, theirs in SAME.items()}
    activation = _known("the activation", has["hidden_activation"] or has["hidden_act"], ACTIVATIONS)
    if not hasattr(config, "head_dim"):
        fields["head_dim"] = fields["embed_dim"] // fields["num_heads"]
    if hasattr(config, "query_pre_attn_scalar"):
        require("query_pre_attn_scalar", has["query_pre_attn_scalar"], Bound(1, 10**6))
        fields["query_scale"] = has["query_pre_attn_scalar"] ** -0.5
    fields["biases"] = (KERNELS[:4] if has["attention_bias"] else ()) + (KERNELS[4:] if has["mlp_bias"] else ())

    rope = dict(has["rope_parameters"])
    kind = _known("rope_type", rope.pop("rope_type", "default"), ROPE_TYPES)
    rope.pop("type", None)
    fields["rope_theta"] = rope.pop("rope_theta", None)
    if kind == "llama3":
        scaling = {name: rope.pop(name, None) for name in LLAMA3}
        fields["rope_scaling"] = scaling | {"original_length": rope.pop("original_max_position_embeddings", None)}
    if rope not in ({}, {"partial_rotary_factor": 1.0}):
        raise UserError(f"rope_scaling has {sorted(rope)}, which br_jax does not know")

    window = has["sliding_window"]
    windowed = tuple(_known("a layer type", one, LAYER_TYPES) == LAYER_TYPES[1] for one in has["layer_types"] or ())
    if window is None and any(windowed):
        raise UserError("layer_types has sliding_attention, but there is no sliding_window: add it")
    if window is not None and (any(windowed) or not windowed):
        fields |= {"window": window, "windowed": () if all(windowed) else windowed}
    return ModelSpec(activation=ACTIVATIONS[activation], **fields | FAMILIES[model_type])


def _known(name: str, value: Any, known) -> Any:
    if value not in (*known,):
        raise UserError(f"{name} is {value!r}, only {', '.join(known)} are supported")
    return value


def _require_sizes(config: dict[str, Any]) -> None:
    """Refuses a number of a config.json that is out of its bound in `ModelSpec`; None is left to its class."""
    for ours, theirs in SAME.items():
        if ours in _BOUNDS and config.get(theirs) is not None:
            require(theirs, config[theirs], _BOUNDS[ours])


def _config_class(model_type: str):
    from transformers import CONFIG_MAPPING  # here, for it imports torch where torch is installed

    return CONFIG_MAPPING[model_type]


def write_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of a spec: `read_config` gives the spec back, and transformers its model.

    A `UserError` where it has a switch or size that no config.json of its family can say.
    """
    theirs, rope = _config_class(spec.model_type), None
    if scaling := spec.rope_scaling:
        rope = {"rope_type": "llama3", **{name: getattr(scaling, name) for name in LLAMA3}}
        rope["original_max_position_embeddings"] = scaling.original_length
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == spec.activation)
    values = {theirs: getattr(spec, ours) for ours, theirs in SAME.items()} | {
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": set(KERNELS[:4]) <= set(spec.biases),
        "mlp_bias": set(KERNELS[4:]) <= set(spec.biases),
        "sliding_window": spec.window,
        "use_sliding_window": spec.window is not None,
        "layer_types": [LAYER_TYPES[has_window] for has_window in spec.window_layers],
        "query_pre_attn_scalar": spec.query_scale and round(spec.query_scale**-2),  # always a whole number
    }
    config = {
        "architectures": [theirs.__name__.replace("Config", "ForCausalLM")],
        "model_type": spec.model_type,
        "head_dim": spec.head_dim,  # all of them look for it, though not every class names it
        **{name: value for name, value in values.items() if name in theirs().to_dict()},
        # as readers older than transformers 5 know it; the newer ones know it too
        "rope_theta": spec.rope_theta,
        "rope_scaling": rope,
    }
    read = dataclasses.asdict(read_config(config, "config.json"))
    if lost := [name for name, value in dataclasses.asdict(spec).items() if read[name] != value]:
        raise UserError(f"no config.json of a {spec.model_type} says {', '.join(lost)} as this model has it")
    return config
