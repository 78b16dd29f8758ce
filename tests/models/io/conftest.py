"""Small GGUF files, made by the reference writer."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from br_jax.models.tokenizer import byte_alphabet

TOKENS = [*byte_alphabet(), "Ġt", "he", "<|a|>", "<|endoftext|>"]
SIZES = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}
HEADS_OF_24 = {"attention.key_length": 24, "attention.value_length": 24}
OWN_SIZES = {
    "llama": {"rope.dimension_count": 16, "vocab_size": len(TOKENS)},
    "qwen3": HEADS_OF_24,
    "gemma2": HEADS_OF_24
    | {"attention.sliding_window": 3, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
}
TOKENIZER = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [1] * (len(TOKENS) - 2) + [3, 3],
    "merges": ["Ġ t", "h e"],
    "bos_token_id": 258,
    "eos_token_id": 259,
}
WRITERS = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string", list: "add_array"}


def tiny_tensors(architecture, sizes):
    """Random ones of the shapes that the metadata says."""
    dim, ffw = sizes["embedding_length"], sizes["feed_forward_length"]
    head = sizes.get("attention.key_length", dim // sizes["attention.head_count"])
    heads, kv = (head * sizes[f"attention.{count}"] for count in ("head_count", "head_count_kv"))
    layer = {
        "attn_norm.weight": (dim,),
        "attn_q.weight": (heads, dim),
        "attn_k.weight": (kv, dim),
        "attn_v.weight": (kv, dim),
        "attn_output.weight": (dim, heads),
        "ffn_norm.weight": (dim,),
        "ffn_gate.weight": (ffw, dim),
        "ffn_up.weight": (ffw, dim),
        "ffn_down.weight": (dim, ffw),
    }
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (heads,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if architecture == "qwen3":
        layer |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
    if architecture == "gemma2":
        layer |= {"post_attention_norm.weight": (dim,), "post_ffw_norm.weight": (dim,)}
    shapes = {f"blk.{i}.{name}": shape for i in range(sizes["block_count"]) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (len(TOKENS), dim), "output_norm.weight": (dim,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def write_gguf():
    """write_gguf(path, architecture="llama", metadata={}, tensors={}, kind=Q8_0, whole=True) -> path.

    `metadata` and `tensors` are laid over those of a tiny model, None drops one; unless `whole`, there are no tensors
    but those. Matrices are quantized to `kind`, unless they are (bytes, their kind) already.
    """

    def write(path, architecture="llama", metadata=(), tensors=(), kind=GGMLQuantizationType.Q8_0, whole=True):
        metadata, tensors = dict(metadata), dict(tensors)
        sizes = SIZES | OWN_SIZES.get(architecture, {})
        content = {f"{architecture}.{key}": value for key, value in sizes.items()}
        content |= {f"tokenizer.ggml.{key}": value for key, value in TOKENIZER.items()}
        writer = GGUFWriter(path, architecture)
        for key, value in (content | metadata).items():
            if value is not None:
                getattr(writer, WRITERS[type(value)])(key, value)
        if whole:
            said = {key: metadata.get(f"{architecture}.{key}") or value for key, value in sizes.items()}
            tensors = tiny_tensors(architecture, said) | tensors
        for name, tensor in tensors.items():
            if isinstance(tensor, np.ndarray):
                its_kind = kind if tensor.ndim == 2 else GGMLQuantizationType.F32
                tensor = quantize(tensor, its_kind), its_kind
            if tensor is not None:
                writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
