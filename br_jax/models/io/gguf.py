"""Reads a GGUF file (llama.cpp's format): dequantized weights, sizes, and the tokenizer in its metadata."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import MODEL_ARCH, GGUFReader, ReaderTensor, dequantize, get_tensor_name_map
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import require_file
from br_jax.models.attention import rope_angles
from br_jax.models.io.gguf_tokenizer import read_tokenizer, stop_tokens
from br_jax.models.io.hf import tensor_names
from br_jax.models.io.hf_config import read_config, require_sizes
from br_jax.models.io.layout import Stored, load_params
from br_jax.models.spec import ModelSpec, RopeScaling

# What a corrupt or truncated file makes the reader and the dequantizer raise.
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError)
_MAX_PARTS = 3_000_000  # strings count twice; Gemma-3, of the largest vocabulary, has two million
_ROPE_DIVISORS = "rope_freqs.weight"  # not a weight: what each rope frequency is divided by
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


class _Reader(GGUFReader):
    """Of plain arrays over the mapped file: as `memmap`s the pieces of a vocabulary take twice the time and memory.

    Where the file ends early, gguf goes on with empty arrays, for as long as a count in the file says.
    """

    _parts = 0

    @property
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)

    def _get(self, offset: int, dtype, count: int = 1, override_order: str | None = None) -> np.ndarray:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ValueError(f"more than {_MAX_PARTS:,} values")
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != count:
            raise ValueError(f"it ends early, in what is at byte {offset:,}")
        return values


class GGUFFile:
    """The file at `path`, with errors that name it and the key; its `tensors` are mapped, not read."""

    def __init__(self, path: str | Path):
        """Opens it; a `UserError` says that it is no GGUF file, or is truncated."""
        require_file(path)
        try:
            reader = _Reader(path)
        except _BROKEN as error:
            raise UserError(
                f"{path}: not a GGUF file, or a truncated or damaged one ({one_line(error)}): check the path or "
                "download it again"
            ) from error
        self.path, self.tensors, self.fields = path, reader.tensors, reader.fields

    def get(self, key: str, default=None):
        """The value of a key, or the default where the file does not have it."""
        try:
            return self.fields[key].contents() if key in self.fields else default
        except _BROKEN as error:
            raise UserError(f"{self.path}: metadata {key} is damaged ({one_line(error)}): download it again") from error

    def need(self, key: str):
        """The value of a key that must be there."""
        if key not in self.fields:
            raise UserError(f"{self.path}: metadata {key} is missing: convert it again with a current llama.cpp")
        return self.get(key)

    def items(self, key: str, kind: type, default: list | None = None) -> list:
        """The list that a key holds, of items of one kind; it must be there, unless there is a default."""
        items = self.need(key) if default is None else self.get(key, default)
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise UserError(f"{self.path}: {key} is no list of {kind.__name__}: convert it again")
        return items

    def demand(self, key: str, allowed: Collection, default=None):
        """The value of a key, which must be one of those that are implemented."""
        if (value := self.get(key, default)) not in (*allowed,):
            raise UserError(f"{self.path}: {key} is {value!r}, only {', '.join(map(str, allowed))} is supported")
        return value

    def token(self, name: str, count: int) -> int | None:
        """The id of a named token, e.g. "eos", below `count`; None where the file does not say."""
        key = f"tokenizer.ggml.{name}_token_id"
        if (index := self.get(key)) is not None and (type(index) is not int or not 0 <= index < count):
            raise UserError(f"{self.path}: {key} is {one_line(repr(index))}, but there are {count} tokens")
        return index


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
    # llama.cpp's name of each tensor, from transformers'.
    known, names = get_tensor_name_map(MODEL_ARCH[spec.model_type.upper()], 1), {}
    for leaf, theirs in tensor_names(spec).items():
        if name := known.get_name(theirs.format(0), (".weight", ".bias")):
            names[leaf] = name.replace("blk.0.", "blk.{}.")
    tensors = {
        each.name: Stored((*map(int, each.shape[::-1]),), str(path), functools.partial(_read, each, spec, path))
        for each in file.tensors
        if each.name != _ROPE_DIVISORS
    }
    tokenizer = read_tokenizer(file, spec)
    params = load_params(spec, names, tensors, str(path), jnp.dtype(dtype), mesh)
    return spec, params, tokenizer, stop_tokens(file, spec, tokenizer)


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
    values = {name: (file.get if name in _OPTIONAL else file.need)(f"{family}.{name}") for name in _FIELDS}
    config = {field: values[name] for name, field in _FIELDS.items() if values[name] is not None}
    require_sizes(config, f"{file.path}: ")  # before they are reckoned with
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
        with np.errstate(all="ignore"):  # `load_params` refuses NaN and infinity
            return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, *_BROKEN) as error:
        tensor_name = f"{tensor.name} ({tensor.tensor_type.name})"
        raise UserError(f"{path}: tensor {tensor_name} cannot be dequantized: {error}") from error
