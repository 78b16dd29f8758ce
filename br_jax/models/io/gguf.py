"""Reads a GGUF file (llama.cpp's format): dequantized weights, sizes, and the tokenizer in its metadata."""

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import MODEL_ARCH, ReaderTensor, dequantize, get_tensor_name_map
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError
from br_jax.models.attention import rope_angles
from br_jax.models.io import hf
from br_jax.models.io.gguf_file import BROKEN, GGUFFile
from br_jax.models.io.gguf_tokenizer import read_tokenizer, stop_tokens
from br_jax.models.io.hf_config import read_config, require_sizes
from br_jax.models.io.layout import Stored, load_params
from br_jax.models.spec import ModelSpec, RopeScaling

# Not a weight: what each rope frequency is divided by.
_ROPE_DIVISORS = "rope_freqs.weight"
# What the metadata calls a field of config.json; the last three are Gemma-2's alone.
_FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
_OF_GEMMA2 = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
_OPTIONAL = ("vocab_size", "attention.head_count_kv", "attention.key_length", "rope.freq_base", *_OF_GEMMA2)
_ONLY = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0, "attention.causal": True}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")


def read_gguf(
    path: str | Path, dtype="float32", mesh: Mesh | None = None
) -> tuple[ModelSpec, dict, PreTrainedTokenizerFast, tuple[int, ...]]:
    """Reads a GGUF file of one of `ARCHITECTURES`, of any quantization that the `gguf` package knows.

    Arguments and result are those of `hf.read_hf`; weights are dequantized exactly, to float32, and rounded once.

    Raises:
        UserError: not a GGUF file, truncated, or a model, tokenizer or setting that br_jax does not have.
    """
    file = GGUFFile(path)
    spec = _spec(file)
    tensors = {
        tensor.name: Stored(
            tuple(map(int, tensor.shape[::-1])), str(path), functools.partial(_read, tensor, spec, path)
        )
        for tensor in file.tensors
        if tensor.name != _ROPE_DIVISORS
    }
    tokenizer = read_tokenizer(file, spec)
    stops = stop_tokens(file, spec, tokenizer)
    return spec, load_params(spec, _tensor_names(spec), tensors, str(path), jnp.dtype(dtype), mesh), tokenizer, stops


def read_gguf_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file, without its weights; raises as `read_gguf`."""
    return _spec(GGUFFile(path))


def describe_gguf(path: str | Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec; and how many tensors of each of its "dtypes", "tokens", and whether there is a "chat_template"."""
    file = GGUFFile(path)
    return _spec(file), {
        "dtypes": dict(Counter(tensor.tensor_type.name for tensor in file.tensors)),
        "tokens": len(file.items("tokenizer.ggml.tokens", str, [])),
        "chat_template": bool(file.get("tokenizer.chat_template")),
    }


def _tensor_names(spec: ModelSpec) -> dict[str, str]:
    """llama.cpp's tensor name of each params path, from transformers'; "{}" stands for the layer."""
    known, names = get_tensor_name_map(MODEL_ARCH[spec.model_type.upper()], 1), {}
    for path, theirs in hf.tensor_names(spec).items():
        if name := known.get_name(theirs.format(0), (".weight", ".bias")):
            names[path] = name.replace("blk.0.", "blk.{}.")
    return names


def _spec(file: GGUFFile) -> ModelSpec:
    """The spec of the same model's config.json; what the metadata leave out is llama.cpp's default."""
    family = file.demand("general.architecture", ARCHITECTURES)
    known = {name for name in _FIELDS if family == "gemma2" or name not in _OF_GEMMA2}
    known |= {"attention.value_length", "rope.dimension_count", *_ONLY}
    for key in file.fields:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in known:
            raise UserError(
                f"{file.path}: {key} is {file.need(key)!r}: br_jax does not know this key, and leaving it out "
                "could change the model's answers"
            )
    for key, value in _ONLY.items():
        file.demand(f"{family}.{key}", (value,), value)
    said = {name: (file.get if name in _OPTIONAL else file.need)(f"{family}.{name}") for name in _FIELDS}
    config = {field: said[name] for name, field in _FIELDS.items() if said[name] is not None}
    require_sizes(config, file.path)  # before they are reckoned with
    heads, width = config["num_attention_heads"], config["hidden_size"]
    config = {"num_key_value_heads": heads, "head_dim": width // heads, "rope_theta": 10000.0} | config
    config |= {
        "model_type": family,
        "rms_norm_eps": _as_written(config["rms_norm_eps"]),
        # Gemma-2's head is the embedding: neither llama.cpp nor transformers reads another.
        "tie_word_embeddings": family == "gemma2" or all(tensor.name != "output.weight" for tensor in file.tensors),
    }
    if "vocab_size" not in config:
        config["vocab_size"] = len(file.items("tokenizer.ggml.tokens", str))
    for key in ("attention.value_length", "rope.dimension_count"):
        file.demand(f"{family}.{key}", (config["head_dim"],), config["head_dim"])
    if family == "gemma2":
        # As llama.cpp's src/models/gemma2.cpp has it, for no file says it: 27B, with its 46 layers, scales by D / N.
        config["query_pre_attn_scalar"] = width // heads if config["num_hidden_layers"] == 46 else config["head_dim"]
    spec = read_config(config, file.path)
    return dataclasses.replace(spec, rope_scaling=_rope_scaling(file, spec))


def _as_written(number: float) -> float:
    """A number as it was in the original config, e.g. 1e-5: 7 digits of what float32 made of it."""
    return float(f"{number:.7g}")


def _rope_scaling(file: GGUFFile, spec: ModelSpec) -> RopeScaling | None:
    """Llama-3.1's scaling, of which llama.cpp keeps no more than its effect, the tensor `_ROPE_DIVISORS`."""
    stored = [tensor for tensor in file.tensors if tensor.name == _ROPE_DIVISORS]
    if not stored:
        return None
    divisors = _dequantize(stored[0], file.path)
    # The slowest frequencies are divided by the whole factor; the rest is the same in all of Meta's models.
    factor = _as_written(divisors.max(initial=1))
    try:
        scaling = RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    except UserError as error:
        raise UserError(f"{file.path}: tensor {_ROPE_DIVISORS}: {error}") from error
    plain, scaled = (
        np.asarray(rope_angles(jnp.ones((1, 1)), dataclasses.replace(spec, rope_scaling=how)))[0, 0]
        for how in (None, scaling)
    )
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-4, atol=0):
        raise UserError(f"{file.path}: tensor {_ROPE_DIVISORS}: rope factors other than Llama-3.1's are not supported")
    return scaling


def _read(tensor: ReaderTensor, spec: ModelSpec, path: str | Path) -> np.ndarray:
    """Dequantizes one tensor to float32 [out, in], as Hugging Face stores it."""
    weight = _dequantize(tensor, path)
    if spec.model_type == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        # llama.cpp's rope turns rows (0, 1), (2, 3), ... of a head; ours turns (i, i + H/2).
        pairs = weight.reshape(-1, spec.head_dim // 2, 2, weight.shape[1])
        weight = pairs.swapaxes(1, 2).reshape(weight.shape)
    if spec.norm_plus_one and tensor.name.endswith("norm.weight"):
        weight = weight - 1  # the converter added it
    return weight


def _dequantize(tensor: ReaderTensor, path: str | Path) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # NaN and infinity are told of once it is read
            return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, *BROKEN) as error:
        tensor_name = f"{tensor.name} ({tensor.tensor_type.name})"
        raise UserError(f"{path}: tensor {tensor_name} cannot be dequantized: {error}") from error
