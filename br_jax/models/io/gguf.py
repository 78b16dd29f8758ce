"""Reads a GGUF file (llama.cpp's format): dequantized weights, sizes, and the tokenizer in its metadata."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from br_jax.errors import UserError
from br_jax.models.attention import rope_angles
from br_jax.models.io.gguf_metadata import BROKEN, Metadata, open_gguf
from br_jax.models.io.gguf_tokenizer import read_tokenizer
from br_jax.models.io.hf_config import FAMILIES
from br_jax.models.io.layout import Stored, load_params
from br_jax.models.spec import ModelSpec, RopeScaling

TENSOR_NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/attn_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attn/q/kernel": "blk.{}.attn_q.weight",
    "layers/attn/q/bias": "blk.{}.attn_q.bias",
    "layers/attn/q_norm/scale": "blk.{}.attn_q_norm.weight",
    "layers/attn/k/kernel": "blk.{}.attn_k.weight",
    "layers/attn/k/bias": "blk.{}.attn_k.bias",
    "layers/attn/k_norm/scale": "blk.{}.attn_k_norm.weight",
    "layers/attn/v/kernel": "blk.{}.attn_v.weight",
    "layers/attn/v/bias": "blk.{}.attn_v.bias",
    "layers/attn/o/kernel": "blk.{}.attn_output.weight",
    "layers/attn_post_norm/scale": "blk.{}.post_attention_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "layers/mlp_post_norm/scale": "blk.{}.post_ffw_norm.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
# Not a weight: what each rope frequency is divided by.
_ROPE_DIVISORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores a family of models.

    Attributes:
        rope_pairs: its rope turns rows (0, 1), (2, 3), ... of a head of q and k; else (i, i + H/2), as ours.
        keys: metadata that only this family has.
        switches: of the spec, beside those of `FAMILIES`, from the metadata and the rest of the spec.
    """

    rope_pairs: bool = False
    keys: tuple[str, ...] = ()
    switches: Callable[[Metadata, ModelSpec], dict[str, Any]] = lambda metadata, spec: {}


def _gemma2(metadata: Metadata, spec: ModelSpec) -> dict[str, Any]:
    """What early files leave out is as in llama.cpp's src/models/gemma2.cpp, and so is the scale of the 27B model."""
    # The file does not say: 27B, with its 46 layers, scales by D / N, the others by H.
    per_head = spec.embed_dim // spec.num_heads if spec.num_layers == 46 else spec.head_dim
    return {
        "activation": "gelu_tanh",
        "query_scale": per_head**-0.5,
        "attention_soft_cap": metadata.get("gemma2.attn_logit_softcapping", 50.0),
        "logit_soft_cap": metadata.get("gemma2.final_logit_softcapping", 30.0),
        "window": metadata.get("gemma2.attention.sliding_window", 4096),
        "windowed": tuple(layer % 2 == 0 for layer in range(spec.num_layers)),
    }


ARCHITECTURES = {
    "llama": Architecture(rope_pairs=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(
        keys=("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"), switches=_gemma2
    ),
}
_READ = (
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base",
)  # fmt: skip
_ONLY = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0, "attention.causal": True}


def read_gguf(
    path: str | Path, dtype="float32", mesh: Mesh | None = None
) -> tuple[ModelSpec, dict, PreTrainedTokenizerFast, tuple[int, ...]]:
    """Reads a GGUF file of one of `ARCHITECTURES`, of any quantization that the `gguf` package knows.

    Args:
        path: the file.
        dtype: dtype of the params returned; they are dequantized exactly, to float32, and rounded once.
        mesh: where the params go; see `layout.load_params`, which streams them.

    Returns:
        The spec; the params tree (see `decoder`); the tokenizer; the tokens that end an answer beside its EOS.

    Raises:
        UserError: not a GGUF file, truncated, or a model, tokenizer or setting that br_jax does not have.
    """
    reader = open_gguf(path)
    metadata = Metadata(reader, path)
    spec = _spec(reader, metadata)
    tensors = {
        tensor.name: Stored(tuple(map(int, tensor.shape[::-1])), str(path), _opener(tensor, spec, path))
        for tensor in reader.tensors
        if tensor.name != _ROPE_DIVISORS
    }
    tokenizer = read_tokenizer(metadata, spec)
    params = load_params(spec, TENSOR_NAMES, tensors, str(path), jnp.dtype(dtype), mesh)
    return spec, params, tokenizer, _stop_tokens(metadata, spec)


def _stop_tokens(metadata: Metadata, spec: ModelSpec) -> tuple[int, ...]:
    """The ends of a turn and of a message, which chat models say where plain ones say EOS."""
    names = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    ids = {name: metadata.need(name) for name in names if name in metadata.fields}
    for name, index in ids.items():
        if not 0 <= index < spec.vocab_size:
            raise UserError(f"{metadata.path}: {name} is {index}, but there are {spec.vocab_size} tokens")
    return tuple(ids.values())


def read_gguf_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file, without its weights; raises as `read_gguf`."""
    reader = open_gguf(path)
    return _spec(reader, Metadata(reader, path))


def describe_gguf(path: str | Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec and what else the header says, without a weight being read; raises as `read_gguf`.

    Returns:
        The spec; and "dtypes" (how many tensors of each), "tokens" and whether there is a "chat_template".
    """
    reader = open_gguf(path)
    metadata = Metadata(reader, path)
    return _spec(reader, metadata), {
        "dtypes": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "tokens": len(metadata.get("tokenizer.ggml.tokens", ())),
        "chat_template": bool(metadata.get("tokenizer.chat_template")),
    }


def _spec(reader: GGUFReader, metadata: Metadata) -> ModelSpec:
    architecture = metadata.choose("general.architecture", ARCHITECTURES)
    name = metadata.need("general.architecture")
    for key in metadata.fields:
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in (*_READ, *_ONLY, *architecture.keys):
            raise UserError(
                f"{metadata.path}: {key} is {metadata.need(key)!r}: br_jax does not know this key, and leaving it out "
                "could change the model's answers"
            )
    for key, value in _ONLY.items():
        metadata.demand(f"{name}.{key}", value, value)
    embed_dim = metadata.need(f"{name}.embedding_length")
    heads = metadata.need(f"{name}.attention.head_count")
    try:
        head_dim = metadata.get(f"{name}.attention.key_length") or embed_dim // heads
        metadata.demand(f"{name}.attention.value_length", head_dim, head_dim)
        metadata.demand(f"{name}.rope.dimension_count", head_dim, head_dim)
        spec = ModelSpec(
            vocab_size=metadata.get(f"{name}.vocab_size") or len(metadata.need("tokenizer.ggml.tokens")),
            embed_dim=embed_dim,
            num_layers=metadata.need(f"{name}.block_count"),
            num_heads=heads,
            num_kv_heads=metadata.get(f"{name}.attention.head_count_kv", heads),
            head_dim=head_dim,
            ffw_dim=metadata.need(f"{name}.feed_forward_length"),
            rope_theta=metadata.get(f"{name}.rope.freq_base", 10000.0),
            norm_eps=_as_written(metadata.need(f"{name}.attention.layer_norm_rms_epsilon")),
            tie_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
            max_length=metadata.need(f"{name}.context_length"),
            model_type=name,
            **FAMILIES[name].switches,
        )
        spec = dataclasses.replace(spec, **architecture.switches(metadata, spec))
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{metadata.path}: its sizes make no model: {error}") from error
    return dataclasses.replace(spec, rope_scaling=_rope_scaling(reader, spec, metadata.path))


def _as_written(number: float) -> float:
    """A number as it was in the original config, e.g. 1e-5: 7 digits of what float32 made of it."""
    return float(f"{number:.7g}")


def _rope_scaling(reader: GGUFReader, spec: ModelSpec, path: str | Path) -> RopeScaling | None:
    """Llama-3.1's scaling, of which llama.cpp keeps no more than its effect, the tensor `_ROPE_DIVISORS`."""
    stored = [tensor for tensor in reader.tensors if tensor.name == _ROPE_DIVISORS]
    if not stored:
        return None
    divisors = _dequantize(stored[0], path)
    # The slowest frequencies are divided by the whole factor; the rest is the same in all of Meta's models.
    factor = _as_written(divisors.max(initial=1))
    scaling = RopeScaling(factor, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    plain, scaled = (
        np.asarray(rope_angles(jnp.ones((1, 1)), dataclasses.replace(spec, rope_scaling=how)))[0, 0]
        for how in (None, scaling)
    )
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-4, atol=0):
        raise UserError(f"{path}: tensor {_ROPE_DIVISORS}: rope factors other than Llama-3.1's are not supported")
    return scaling


def _opener(tensor: ReaderTensor, spec: ModelSpec, path: str | Path):
    """A function that dequantizes one tensor to float32 [out, in], as Hugging Face stores it."""

    def read() -> np.ndarray:
        weight = _dequantize(tensor, path)
        if ARCHITECTURES[spec.model_type].rope_pairs and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _half_split_rope(weight, spec.head_dim)
        if spec.norm_plus_one and tensor.name.endswith("norm.weight"):
            weight = weight - 1  # the converter added it
        return weight

    return read


def _dequantize(tensor: ReaderTensor, path: str | Path) -> np.ndarray:
    try:
        return dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, *BROKEN) as error:
        tensor_name = f"{tensor.name} ({tensor.tensor_type.name})"
        raise UserError(f"{path}: tensor {tensor_name} cannot be dequantized: {error}") from error


def _half_split_rope(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's row order: its rope turns rows (0, 1), (2, 3), ...; ours turns (i, i + H/2)."""
    if weight.shape[0] % head_dim:
        return weight  # of a wrong shape, which the caller reports with its name
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
