"""GGUF against transformers' own GGUF loader, on a tiny file made here and, when downloaded, on SmolLM2."""

import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex

from br_jax.errors import UserError
from br_jax.models.decoder import Decoder, init_cache, unembed
from br_jax.models.gguf import read_gguf
from br_jax.models.tokenizer import byte_alphabet

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

SMOLLM2 = Path(os.environ.get("BR_JAX_DATA", "data")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_file(), reason="run experiments/fetch.py, or set BR_JAX_DATA")
L, D, N, K, H, F = 2, 64, 4, 2, 16, 96
TOKENS = [*byte_alphabet(), "Ġt", "he", "<|a|>", "<|b|>"]
METADATA = {
    "llama.context_length": 128,
    "llama.embedding_length": D,
    "llama.block_count": L,
    "llama.feed_forward_length": F,
    "llama.attention.head_count": N,
    "llama.attention.head_count_kv": K,
    "llama.rope.dimension_count": H,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 259,
}


def tiny_tensors(tied):
    layer = {
        "attn_norm": (D,),
        "attn_q": (N * H, D),
        "attn_k": (K * H, D),
        "attn_v": (K * H, D),
        "attn_output": (D, N * H),
        "ffn_norm": (D,),
        "ffn_gate": (F, D),
        "ffn_up": (F, D),
        "ffn_down": (D, F),
    }
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(L) for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (len(TOKENS), D), "output_norm.weight": (D,)}
    if not tied:
        shapes["output.weight"] = (len(TOKENS), D)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_tiny(path, *, architecture="llama", pre="smollm", metadata=None, tensors=None, quantize=True, **lists):
    """A small GGUF file, by the reference writer; None drops a metadata key."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | (metadata or {})).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(lists.get("tokens", TOKENS))
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(lists.get("merges", ["Ġ t", "h e"]))
    for name, tensor in (tiny_tensors(True) if tensors is None else tensors).items():
        kind = gguf.GGMLQuantizationType.Q8_0 if quantize and tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def oracle(path):
    """The same file loaded by transformers: dequantized, and its rows put in order, by their code."""
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def prompt_batch(prompts):
    """Right-padded tokens, positions and segment ids [B, T] of unequal prompts."""
    width = max(map(len, prompts))
    tokens = np.array([ids + [0] * (width - len(ids)) for ids in prompts], np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    segments = np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids in prompts], np.int32)
    return tuple(map(jnp.asarray, (tokens, positions, segments)))


def our_logits(spec, params, prompts):
    """Logits of each prompt [T, V], all run as one padded batch."""
    hidden, _ = Decoder(spec).apply({"params": params}, *prompt_batch(prompts))
    logits = np.asarray(unembed(spec, params, hidden))
    return [row[: len(ids)] for row, ids in zip(logits, prompts, strict=True)]


def our_continuations(spec, params, prompts, steps):
    """Greedy ids [B, steps], the whole batch at once over the decoder's cache."""
    tokens, positions, segments = prompt_batch(prompts)
    width = tokens.shape[1]
    lengths = jnp.asarray([[len(ids)] for ids in prompts], jnp.int32)

    @jax.jit
    def step(params, cache, tokens, positions, segments, slot):
        return Decoder(spec).apply({"params": params}, tokens, positions, segments, cache, slot)

    hidden, cache = step(
        params, init_cache(spec, len(prompts), width + steps, jnp.float32), tokens, positions, segments, 0
    )
    hidden = jnp.take_along_axis(hidden, lengths[:, :, None] - 1, axis=1)
    chosen = []
    for i in range(steps):
        chosen.append(jnp.argmax(unembed(spec, params, hidden), axis=-1).astype(jnp.int32))
        hidden, cache = step(params, cache, chosen[-1], lengths + i, jnp.ones_like(lengths), width + i)
    return np.concatenate(chosen, axis=1).tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", [True, False])
def test_tiny_file_has_the_logits_of_transformers(tmp_path, tied, quantize):
    path = write_tiny(tmp_path / "tiny.gguf", tensors=tiny_tensors(tied), quantize=quantize)
    spec, params, _ = read_gguf(path)
    assert spec.tie_embeddings == tied and ("head" in params) != tied
    ids = [5, 250, 17, 17, 99, 3]
    with torch.no_grad():
        expected = oracle(path)(torch.tensor([ids])).logits[0].numpy()
    # Weights of size 1 give logits of about 30 and attention near one-hot: 1e-3 is 3e-5 of that in f32.
    np.testing.assert_allclose(our_logits(spec, params, [ids])[0], expected, atol=1e-3)


def test_tiny_tokenizer(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf", metadata={"tokenizer.chat_template": "{{ messages[0]['content'] }}"})
    tokenizer = read_gguf(path)[2]
    assert tokenizer.tokenize("the the<|a|>") == ["t", "he", "Ġt", "he", "<|a|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|a|>", "<|b|>", "<|b|>")
    assert tokenizer.decode([258, 116, 257], skip_special_tokens=True) == "the"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def without(name):
    return {key: tensor for key, tensor in tiny_tensors(True).items() if key != name}


WRONG = {
    "architecture": ({"architecture": "mamba"}, "general.architecture is 'mamba', only 'llama'"),
    "pre-tokenizer": ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2', only 'smollm'"),
    "rope": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count is 8"),
    "partial rope": ({"metadata": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count is 8"),
    "no width": ({"metadata": {"llama.embedding_length": None}}, "llama.embedding_length is missing"),
    "kv heads": ({"metadata": {"llama.attention.head_count_kv": 3}}, "num_kv_heads 3 does not divide"),
    "eos": ({"metadata": {"tokenizer.ggml.eos_token_id": 9999}}, "eos_token has id 9999"),
    "missing tensor": ({"tensors": without("blk.1.ffn_up.weight")}, "blk.1.ffn_up.weight is missing"),
    "extra tensor": (
        {"tensors": {**tiny_tensors(True), "rope_freqs.weight": np.ones(8, np.float32)}},
        "unexpected tensor rope_freqs.weight",
    ),
    "shape": (
        {"tensors": {**tiny_tensors(True), "blk.0.attn_q.weight": np.ones((32, D), np.float32)}},
        r"blk.0.attn_q.weight has shape \(32, 64\), the sizes say \(64, 64\)",
    ),
    "merges": ({"merges": ["Ġ t", "x nowhere"]}, "tokenizer.ggml.merges do not fit"),
    "tokens": ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, "260 tokens, 259 of them different"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_unsupported_file_is_one_line(tmp_path, case):
    arguments, message = WRONG[case]
    path = write_tiny(tmp_path / "tiny.gguf", **arguments)
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_cut_anywhere_is_one_line(tmp_path):
    path = write_tiny(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    # Every part of the file: magic, counts, metadata, lists, tensor table, data, the very last byte.
    for length in [0, 3, 6, 20, 60, 500, 3000, 6000, 8000, len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"not a GGUF file|truncated or damaged"):
            read_gguf(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "absent.gguf")
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        read_gguf(path)


@pytest.fixture(scope="module")
def smollm2():
    return read_gguf(SMOLLM2)


CHAT = "<|im_start|>user\nName three rivers of Europe.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["The capital of France is", CHAT, "def add(a, b):\n    return"]


@needs_smollm2
def test_smollm2_is_the_model_that_transformers_loads(smollm2):
    spec, params, tokenizer = smollm2
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len(set(map(len, prompts))) == 3
    params = jax.device_put(params)
    continued = our_continuations(spec, params, prompts, 64)
    model = oracle(SMOLLM2)
    for ids, batched, more in zip(prompts, our_logits(spec, params, prompts), continued, strict=True):
        with torch.no_grad():
            theirs = model(torch.tensor([ids + more])).logits[0].numpy()
        # The project's bar for f32; the logits reach 20 or so.
        np.testing.assert_allclose(our_logits(spec, params, [ids])[0], theirs[: len(ids)], atol=1e-3, rtol=0)
        np.testing.assert_allclose(batched, theirs[: len(ids)], atol=1e-3, rtol=0)
        # Greedy, token for token: each of ours is what transformers puts first after all before it.
        assert theirs[len(ids) - 1 : -1].argmax(-1).tolist() == more


# One a line; ⏎ stands for a newline inside.
STRINGS = """\
Hello, world!
 leading space
trailing space\x20
two  spaces   three    four
tab\tand\x0bvertical
I'm sure they've said we'll go, don't you'd?
IT'S CAPITALS, WE'RE
1234567890
3.14159 and 2,718 and 1e-10
a1b2c3 x=42;
spaces before  12 and   345 digits
½ cup, ² squared, ³\u2044₄, Ⅷ, ①②③
١٢٣٤ arabic-indic ४५६ devanagari
naïve café résumé
Ünïcödé ÄÖÜ ß
北京欢迎你\uff0c日本語のテキスト
한국어 텍스트
Привет, мир! Ελληνικά
שלום עולם مرحبا بالعالم
🙂🙃👩‍👩‍👧‍👦🏳️‍🌈
e\u0301 combining, zero\u200bwidth, nb\u00a0space, \u3000ideographic
def f(x: int) -> str:⏎    return f"{x!r}"  # comment
for (int i = 0; i < 10; ++i) { a[i] += b[i]; }
SELECT * FROM t WHERE id >= 10 AND name LIKE '%x%';
<div class="a">&nbsp;</div>
{"key": [1, 2, {"x": null}]}
https://example.org/path?q=1&r=%20#frag
user.name+tag@example.org
$1,000.00 €5 £3 ¥900
C++ C# F# .NET @home #tag
!!! ??? ... --- *** ___
"quoted" 'single' `ticks` “curly” \u2018curly\u2019
a\\b\\\\c /usr/local/bin
⏎⏎⏎three newlines
\r⏎windows\r⏎
 ⏎ mixed \t whitespace ⏎
<|im_start|>user
<|im_start|>system⏎Be brief.<|im_end|>⏎<|im_start|>user⏎Hi<|im_end|>
text<|im_end|>glued
 <|endoftext|> spaced
<repo_name>a/b<file_sep>c.py
<|im_end <|im_end||> almost special
<gh_stars>100<issue_start>
supercalifragilisticexpialidocious antidisestablishmentarianism
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
aAbBcC XmlHttpRequest snake_case_name kebab-case-name
MiXeD123CaSe456
∀x∈\u211d: x² ≥ 0 ⇒ ∑ᵢ aᵢ
\x01\x02 control \x7f
Ω≈ç√∫\u02dcµ≤≥÷
"""


@needs_smollm2
def test_smollm2_tokenizer(smollm2):
    """Against transformers' GGUF tokenizer, which splits as GPT-2: digits are cut out for it beforehand.

    llama.cpp's definition of "smollm" is: every \\p{N} alone, then GPT-2's pattern on what is between.
    """
    tokenizer = smollm2[2]
    theirs = AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    strings = [line.replace("⏎", "\n") for line in STRINGS.split("\n")]
    assert len(strings) >= 50
    for text in strings:
        pieces = [piece for piece in regex.split(r"(\p{N})", text) if piece]
        expected = [token for piece in pieces for token in theirs.encode(piece)]
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(tokenizer.encode(text)) == text


@needs_smollm2
def test_smollm2_tokenizer_follows_the_metadata(smollm2):
    tokenizer = smollm2[2]
    fields = gguf.GGUFReader(SMOLLM2).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert tokenizer.all_special_ids and set(tokenizer.all_special_ids) <= set(np.flatnonzero(np.equal(kinds, 3)))
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.chat_template == fields["tokenizer.chat_template"].contents()
    messages = [{"role": "user", "content": "Name three rivers of Europe."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).endswith(CHAT)
