"""Reads a GGUF file (llama.cpp's format): dequantized weights, sizes, and the tokenizer in its metadata."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from jax.sharding import Mesh
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from br_jax.errors import UserError
from br_jax.models.layout import Stored, load_params
from br_jax.models.spec import ModelSpec

TENSOR_NAMES = {
    "embed/embedding": "token_embd.weight",
    "layers/attn_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attn/q/kernel": "blk.{}.attn_q.weight",
    "layers/attn/k/kernel": "blk.{}.attn_k.weight",
    "layers/attn/v/kernel": "blk.{}.attn_v.weight",
    "layers/attn/o/kernel": "blk.{}.attn_output.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "final_norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
# What a corrupt or truncated file makes the reader and the dequantizer raise.
_BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


def read_gguf(
    path: str | Path, dtype="float32", mesh: Mesh | None = None
) -> tuple[ModelSpec, dict, PreTrainedTokenizerFast]:
    """Reads a Llama-architecture GGUF file of any quantization that the `gguf` package knows.

    Args:
        path: the file.
        dtype: dtype of the params returned; they are dequantized exactly, to float32, and rounded once.
        mesh: where the params go; see `layout.load_params`, which streams them.

    Returns:
        The spec; the params tree (see `decoder`); the tokenizer.

    Raises:
        UserError: not a GGUF file, truncated, or a model, tokenizer or setting that br_jax does not have.
    """
    reader = _open(path)
    metadata = _Metadata(reader, path)
    spec = _spec(reader, metadata)
    tensors = {
        tensor.name: Stored(tuple(map(int, tensor.shape[::-1])), str(path), _opener(tensor, spec, path))
        for tensor in reader.tensors
    }
    tokenizer = _tokenizer(metadata, spec)
    return spec, load_params(spec, TENSOR_NAMES, tensors, str(path), jnp.dtype(dtype), mesh), tokenizer


def read_gguf_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file, from its metadata alone; raises as `read_gguf`."""
    reader = _open(path)
    return _spec(reader, _Metadata(reader, path))


def describe_gguf(path: str | Path) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec and what else the header says, without a weight being read; raises as `read_gguf`.

    Returns:
        The spec; and "dtypes" (how many tensors of each), "tokens" and whether there is a "chat_template".
    """
    reader = _open(path)
    metadata = _Metadata(reader, path)
    return _spec(reader, metadata), {
        "dtypes": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "tokens": len(metadata.get("tokenizer.ggml.tokens", ())),
        "chat_template": bool(metadata.get("tokenizer.chat_template")),
    }


class _Metadata:
    """The file's key-value pairs, with errors that name the file and the key."""

    def __init__(self, reader: GGUFReader, path: str | Path):
        self.fields, self.path = reader.fields, path

    def get(self, key: str, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def need(self, key: str):
        if key not in self.fields:
            raise UserError(f"{self.path}: metadata {key} is missing: convert it again with a current llama.cpp")
        return self.fields[key].contents()

    def demand(self, key: str, allowed, default):
        """Refuses any value of `key` other than the one that is implemented."""
        if (value := self.get(key, default)) != allowed:
            raise UserError(f"{self.path}: {key} is {value!r}, only {allowed!r} is supported")


def _open(path: str | Path) -> GGUFReader:
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise UserError(f"{path}: not a GGUF file (begins with {magic!r}): check the path or download again")
    try:
        return GGUFReader(path)
    except _BROKEN as error:
        raise UserError(f"{path}: truncated or damaged GGUF file ({error}): download it again") from error


def _spec(reader: GGUFReader, metadata: _Metadata) -> ModelSpec:
    metadata.demand("general.architecture", "llama", None)
    metadata.demand("llama.rope.scaling.type", "none", "none")
    metadata.demand("llama.expert_count", 0, 0)
    embed_dim = metadata.need("llama.embedding_length")
    heads = metadata.need("llama.attention.head_count")
    try:
        head_dim = metadata.get("llama.attention.key_length") or embed_dim // heads
        metadata.demand("llama.attention.value_length", head_dim, head_dim)
        metadata.demand("llama.rope.dimension_count", head_dim, head_dim)
        return ModelSpec(
            vocab_size=metadata.get("llama.vocab_size") or len(metadata.need("tokenizer.ggml.tokens")),
            embed_dim=embed_dim,
            num_layers=metadata.need("llama.block_count"),
            num_heads=heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            ffw_dim=metadata.need("llama.feed_forward_length"),
            rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
            # Stored as float32: 7 digits bring 1e-5 back as it was written in the original config.
            norm_eps=float(f"{metadata.need('llama.attention.layer_norm_rms_epsilon'):.7g}"),
            tie_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
            max_length=metadata.need("llama.context_length"),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{metadata.path}: its sizes make no Llama model: {error}") from error


def _opener(tensor: ReaderTensor, spec: ModelSpec, path: str | Path):
    """A function that dequantizes one tensor to float32 [out, in], in the Hugging Face order of its rows."""

    def read() -> np.ndarray:
        try:
            weight = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, *_BROKEN) as error:
            tensor_name = f"{tensor.name} ({tensor.tensor_type.name})"
            raise UserError(f"{path}: tensor {tensor_name} cannot be dequantized: {error}") from error
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = _half_split_rope(weight, spec.head_dim)
        return weight

    return read


def _half_split_rope(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Undoes llama.cpp's row order: its rope turns rows (0, 1), (2, 3), ...; ours turns (i, i + H/2)."""
    if weight.shape[0] % head_dim:
        return weight  # of a wrong shape, which the caller reports with its name
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _tokenizer(metadata: _Metadata, spec: ModelSpec) -> PreTrainedTokenizerFast:
    """Rebuilds the byte-level BPE tokenizer that the metadata describes."""
    metadata.demand("tokenizer.ggml.model", "gpt2", None)
    metadata.demand("tokenizer.ggml.pre", "smollm", None)
    metadata.demand("tokenizer.ggml.add_bos_token", False, False)
    metadata.demand("tokenizer.ggml.add_eos_token", False, False)
    tokens = metadata.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in metadata.need("tokenizer.ggml.merges")]
    kinds = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
    distinct = len(set(tokens))
    if not distinct == len(tokens) == len(kinds) or len(tokens) > spec.vocab_size:
        raise UserError(
            f"{metadata.path}: {len(tokens)} tokens, {distinct} of them different, {len(kinds)} token types "
            f"and {spec.vocab_size} embeddings do not go together"
        )
    try:
        backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # the Rust library raises nothing narrower
        raise UserError(f"{metadata.path}: tokenizer.ggml.merges do not fit the tokens: {error}") from error
    backend.pre_tokenizer = _smollm_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        added = [token for token, its_kind in zip(tokens, kinds, strict=True) if its_kind == kind]
        add = backend.add_special_tokens if special else backend.add_tokens
        add([AddedToken(token, special=special, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=spec.max_length,
        clean_up_tokenization_spaces=False,
        **_named_tokens(metadata, tokens),
    )


def _named_tokens(metadata: _Metadata, tokens: list[str]) -> dict[str, str]:
    """The texts of bos, eos, unk and pad; a file without pad pads with eos (masks never look at ids)."""
    ids = {
        "eos_token": metadata.need("tokenizer.ggml.eos_token_id"),
        "bos_token": metadata.get("tokenizer.ggml.bos_token_id"),
        "unk_token": metadata.get("tokenizer.ggml.unknown_token_id"),
    }
    ids["pad_token"] = metadata.get("tokenizer.ggml.padding_token_id", ids["eos_token"])
    for name, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise UserError(f"{metadata.path}: {name} has id {index}, but there are {len(tokens)} tokens")
    return {name: tokens[index] for name, index in ids.items() if index is not None}
