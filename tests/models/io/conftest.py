"""Small GGUF files, made by the reference writer, and texts that tokenizers cut in different ways."""

import os
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

TOKENS = [*map(bytes_to_unicode().get, range(256)), "Ġt", "he", "<|a|>", "<|endoftext|>"]
SIZES = {
    **{"context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96},
    **{"attention.head_count": 4, "attention.head_count_kv": 2},
    **{"attention.layer_norm_rms_epsilon": 3e-5, "rope.freq_base": 5000.0},
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

# One a line; ⏎ stands for a newline inside.
HARD = """\
 leading space
trailing space\x20
two  spaces   three    four
tab\tand\x0bvertical, nul\x00 bell\x07 escape\x1b[0m delete\x7f next\x85line
I'm sure they've said we'll go, don't you'd? IT'S CAPITALS, WE'RE
O'REILLY and D'Artagnan, naïve café résumé
1234567890 3.14159 and 2,718 and 1e-10, a1b2c3 x=42; MiXeD123CaSe456
spaces before  12 and   345 digits
½ cup, ² squared, ³\u2044₄, Ⅷ, ①②③, ﬁ
١٢٣٤ arabic-indic ४५६ devanagari, नमस्ते दुनिया, क्ष त्र ज्ञ
北京欢迎你\uff0c日本語のテキスト\u3002カタカナ\uff76\uff85
한국어 텍스트 \u1112\u1161\u11ab\u1100\u1173\u11af, สวัสดีชาวโลก
Привет, мир! Ελληνικά «ίσως»
שלום עולם \u200f(מימין לשמאל) مَرْحَبًا بِالْعَالَمِ
🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 \U0001d4d7\U0001d4ee\U0001d4f5 \U00012000 \U0001f1eb\U0001f1f7
e\u0301 combining, Z\u0351\u036b\u0343a\u0329, zero\u200bwidth, bom\ufeff, nb\u00a0space, \u3000wide \u2028line
def f(x: int) -> str:⏎    return f"{x!r}"  # comment
$1,000.00 €5 £3 ¥900, C++ C# F# .NET @home #tag, !!! ??? ... --- *** ___
"quoted" 'single' `ticks` “curly” a\\b\\\\c /usr/local/bin
⏎⏎⏎three newlines
\r⏎windows\r⏎
 ⏎ mixed \t whitespace ⏎
<|im_start|>system⏎Be brief.<|im_end|>⏎<|im_start|>user⏎Hi<|im_end|>
text<|im_end|>glued
 <|endoftext|> spaced
<repo_name>a/b<file_sep>c.py
<|im_end <|im_end||> almost special
the byte <0x41> is spelled out
supercalifragilisticexpialidocious antidisestablishmentarianism
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
∀x∈\u211d: x² ≥ 0 ⇒ ∑ᵢ aᵢ ≈ç√∫\u02dcµ
Ġhere Ċ, Ünïcödé ß ẞ İ \u0131 \u0301alone
"""


@pytest.fixture(scope="session")
def smollm2():
    """The file of SmolLM2, where it was downloaded."""
    path = Path(os.environ.get("BR_JAX_DATA", "data")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("run experiments/fetch.py, or set BR_JAX_DATA")
    return path


@pytest.fixture(scope="session")
def hard_texts():
    """Scripts, spaces, digits, controls, special tokens and what looks like them."""
    return [line.replace("⏎", "\n") for line in HARD.split("\n")]


@pytest.fixture(scope="session")
def llama3_backend():
    """llama3_backend(vocab, merges) -> Llama-3's own tokenizer with those, by transformers' converter."""

    def make(vocab, merges):
        converter = TikTokenConverter()
        converter.extract_vocab_merges_from_model = lambda _: (vocab, merges)  # instead of those of a file
        return converter.converted()

    return make


def tiny_tensors(architecture, sizes):
    """Random ones of the shapes that the metadata says."""
    dim, ffw = sizes["embedding_length"], sizes["feed_forward_length"]
    head = sizes.get("attention.key_length", dim // sizes["attention.head_count"])
    heads, kv = (head * sizes[f"attention.{count}"] for count in ("head_count", "head_count_kv"))
    norms = dict.fromkeys(("attn_norm.weight", "ffn_norm.weight"), (dim,))
    attention = {"q": (heads, dim), "k": (kv, dim), "v": (kv, dim), "output": (dim, heads)}
    ffn = {"gate": (ffw, dim), "up": (ffw, dim), "down": (dim, ffw)}
    layer = norms | {f"attn_{n}.weight": shape for n, shape in attention.items()}
    layer |= {f"ffn_{n}.weight": shape for n, shape in ffn.items()}
    own = {
        "qwen2": {f"attn_{n}.bias": attention[n][:1] for n in "qkv"},
        "qwen3": dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (head,)),
        "gemma2": dict.fromkeys(("post_attention_norm.weight", "post_ffw_norm.weight"), (dim,)),
    }
    layer |= own.get(architecture, {})
    shapes = {f"blk.{i}.{name}": shape for i in range(sizes["block_count"]) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (len(TOKENS), dim), "output_norm.weight": (dim,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="session")
def write_gguf():
    """write_gguf(path, architecture="llama", metadata={}, tensors={}, whole=True) -> path.

    `metadata` and `tensors` are laid over those of a tiny model, None drops one; unless `whole`, there are no tensors
    but those. Matrices are quantized to Q8_0, unless they are (bytes, their kind) already.
    """

    def write(path, architecture="llama", metadata=(), tensors=(), whole=True):
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
                kind = GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else GGMLQuantizationType.F32
                tensor = quantize(tensor, kind), kind
            if tensor is not None:
                writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
