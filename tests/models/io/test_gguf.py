"""GGUF against transformers' own GGUF loader, on tiny files made here and, when downloaded, on SmolLM2."""

import math
import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from br_jax.errors import UserError
from br_jax.models.decoder import Decoder, init_cache, unembed
from br_jax.models.io.gguf import ARCHITECTURES, read_gguf, read_gguf_spec
from br_jax.models.io.hf import read_hf, write_hf
from br_jax.models.io.hf_config import read_config
from br_jax.models.spec import RopeScaling
from br_jax.provider.folder import load_model

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import AutoModelForCausalLM  # noqa: E402

SMOLLM2 = Path(os.environ.get("BR_JAX_DATA", "data")) / "SmolLM2-135M-Instruct.Q4_1.gguf"
needs_smollm2 = pytest.mark.skipif(not SMOLLM2.is_file(), reason="run experiments/fetch.py, or set BR_JAX_DATA")
IDS = [5, 250, 17, 17, 99, 3, 40, 41]
# Gemma-2's is always the embedding: neither llama.cpp nor transformers reads another.
HEADS = [(name, tied) for name in ARCHITECTURES for tied in (True, False) if tied or name != "gemma2"]
# What transformers' loader leaves at the default of its config, though the file says it.
UNREAD = {
    "qwen3": {"head_dim": 24},
    "gemma2": {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
}


def oracle(path, **unread):
    """The same file loaded by transformers: dequantized, and its rows put in order, by their code."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager", **unread
    )
    return model.eval()


def their_logits(model, ids, positions=None):
    where = torch.tensor([range(len(ids)) if positions is None else positions])
    with torch.no_grad():
        return model(torch.tensor([ids]), torch.ones_like(where), where).logits[0].numpy()


def prompt_batch(prompts):
    """Right-padded tokens, positions and segment ids [B, T] of unequal prompts."""
    width = max(map(len, prompts))
    tokens = np.array([ids + [0] * (width - len(ids)) for ids in prompts], np.int32)
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    segments = np.array([[1] * len(ids) + [0] * (width - len(ids)) for ids in prompts], np.int32)
    return tuple(map(jnp.asarray, (tokens, positions, segments)))


def our_logits(spec, params, prompts, positions=None):
    """Logits of each prompt [T, V], all run as one padded batch."""
    tokens, counted, segments = prompt_batch(prompts)
    hidden, _ = Decoder(spec).apply(
        {"params": params}, tokens, counted if positions is None else jnp.asarray([positions]), segments
    )
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


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.F32], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("architecture", "tied"), HEADS)
def test_a_tiny_file_has_the_logits_of_transformers(write_gguf, tmp_path, architecture, tied, kind):
    head = np.random.default_rng(1).normal(size=(260, 64), scale=0.3).astype(np.float32)
    untied = {} if tied else {"output.weight": head}
    path = write_gguf(tmp_path / "tiny.gguf", architecture, tensors=untied, kind=kind)
    spec, params, *_ = read_gguf(path)
    assert spec.tie_embeddings == tied and ("head" in params) != tied
    assert spec == read_gguf_spec(path) and spec.model_type == architecture
    expected = their_logits(oracle(path, **UNREAD.get(architecture, {})), IDS)
    # f32 sums in another order, of logits of size 5 or so.
    np.testing.assert_allclose(our_logits(spec, params, [IDS])[0], expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_written_as_a_folder_comes_back(write_gguf, tmp_path, architecture):
    spec, params, tokenizer, _ = read_gguf(write_gguf(tmp_path / "tiny.gguf", architecture))
    write_hf(tmp_path / "folder", spec, params, tokenizer)
    again, same, *_ = read_hf(tmp_path / "folder")
    assert again == spec
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_chat_model_stops_at_the_end_of_a_turn(write_gguf, tmp_path):
    """As Gemma-2's, whose EOS no chat ever says."""
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.eot_token_id": 258})
    assert load_model(path).stop_tokens == (259, 258)
    path = write_gguf(tmp_path / "wrong.gguf", metadata={"tokenizer.ggml.eot_token_id": 9999})
    with pytest.raises(UserError, match=r"eot_token_id is 9999, but there are 260 tokens"):
        load_model(path)


def llama3_divisors(head_dim, theta, factor):
    """rope_freqs.weight of a Llama-3.1 as llama.cpp's converter writes it, and transformers' name for what it means."""
    divisors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (i / head_dim)
        fast = min(max((8192 / wave - 1) / 3, 0), 1)
        divisors.append(1 / (fast + (1 - fast) / factor))
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return np.array(divisors, np.float32), rope


def test_rope_factors_are_llama_3_scaling(write_gguf, tmp_path):
    divisors, rope = llama3_divisors(16, 10000.0, 8.0)
    assert {1.0, 8.0} < set(divisors.tolist()), "fast, slow and mixed frequencies must all be there"
    path = write_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": divisors})
    spec, params, *_ = read_gguf(path)
    assert spec.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    # transformers' loader skips the tensor. Far apart, or what turns slowly does not turn at all.
    far = [0, 1, 500, 501, 3000, 7000, 7001, 9000]
    expected = their_logits(oracle(path, rope_parameters=rope), IDS, far)
    assert np.abs(expected - their_logits(oracle(path), IDS, far)).max() > 0.1
    # Angles of thousands of radians have an error of 1e-4 in f32.
    np.testing.assert_allclose(our_logits(spec, params, [IDS], far)[0], expected, atol=3e-3)


# From the makers' config.json. (family, V, D, F, L, N, K, H, eps, theta, context), and the rest.
PUBLISHED = {
    "Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8, 128, 1e-5, 500000.0, 131072, {"factor": 8.0}),
    "Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, 1e-5, 500000.0, 131072, {"factor": 32.0, "tie": True}),
    "Mistral-7B-v0.3": ("llama", 32768, 4096, 14336, 32, 32, 8, 128, 1e-5, 1000000.0, 32768, {}),
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 1e-6, 1000000.0, 131072, {}),
    "Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, 1e-6, 1000000.0, 40960, {"tie": True}),
    "gemma-2-2b": ("gemma2", 256000, 2304, 9216, 26, 8, 4, 256, 1e-6, 10000.0, 8192, {"scalar": 256}),
    "gemma-2-9b": ("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, 1e-6, 10000.0, 8192, {"scalar": 256}),
    "gemma-2-27b": ("gemma2", 256000, 4608, 36864, 46, 32, 16, 128, 1e-6, 10000.0, 8192, {"scalar": 144}),
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}


@pytest.mark.parametrize("caps", [CAPS, dict.fromkeys(CAPS)], ids=["", "early"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spec_is_that_of_the_makers_config(write_gguf, tmp_path, name, caps):
    """Also of Gemma-2's early files, which have neither caps nor window."""
    family, vocab, dim, ffw, layers, heads, kv, head_dim, eps, theta, context, more = PUBLISHED[name]
    sizes = {
        "vocab_size": vocab,
        "embedding_length": dim,
        "feed_forward_length": ffw,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv,
        "attention.layer_norm_rms_epsilon": eps,
        "rope.freq_base": theta,
        "context_length": context,
        "rope.dimension_count": head_dim if family == "llama" else None,
        **(caps if family == "gemma2" else {}),
    }
    if dim // heads != head_dim:
        sizes |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    metadata = {f"{family}.{key}": value for key, value in sizes.items()}
    config = {
        "model_type": family,
        "vocab_size": vocab,
        "hidden_size": dim,
        "intermediate_size": ffw,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "rms_norm_eps": eps,
        "max_position_embeddings": context,
        "tie_word_embeddings": "tie" in more or family == "gemma2",
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **({"query_pre_attn_scalar": more["scalar"]} if family == "gemma2" else {}),
    }
    tensors = {"output_norm.weight": np.zeros(1, np.float32)}
    if not config["tie_word_embeddings"]:
        tensors["output.weight"] = np.zeros((1, 32), np.float32)
    if "factor" in more:
        tensors["rope_freqs.weight"], config["rope_parameters"] = llama3_divisors(head_dim, theta, more["factor"])
    path = write_gguf(tmp_path / "sizes.gguf", family, metadata, tensors, whole=False)
    assert read_gguf_spec(path) == read_config(config, "config.json")


QUANTIZABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
# Bytes of the float16 scales in a block of 256 weights, which every other byte may be anything beside: ggml-common.h.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def random_blocks(kind, rows):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (rows, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    for byte in SCALES[kind]:
        blocks[:, byte : byte + 2] = rng.uniform(1e-3, 1e-2, (rows, 1)).astype(np.float16).view(np.uint8)
    return blocks


def q4_0(block):
    """block_q4_0: half d; 16 bytes, weight i in the low half of byte i, weight 16 + i in the high half."""
    scale = block[:2].view(np.float16)[0].astype(np.float32)
    return [scale * (int(byte) % 16 - 8) for byte in block[2:]] + [scale * (int(byte) // 16 - 8) for byte in block[2:]]


def q8_0(block):
    """block_q8_0: half d; 32 signed bytes."""
    return block[:2].view(np.float16)[0].astype(np.float32) * block[2:].view(np.int8).astype(np.float32)


def q6_k(block):
    """block_q6_K: 128 bytes ql, 64 bytes qh, 16 signed scales, half d; each half of the block has half of each.

    In a half, weight 32 j + i has its low 4 bits in ql[32 (j % 2) + i], the high half of it where j > 1, its upper 2
    bits in qh[i] at 2 j, and the scale of its run of 16 weights.
    """
    ql, qh, scales = block[:128], block[128:192], block[192:208].view(np.int8)
    scale = block[208:].view(np.float16)[0].astype(np.float32)
    weights = []
    for half in range(2):
        for j in range(4):
            for i in range(32):
                low = int(ql[64 * half + 32 * (j % 2) + i]) >> (4 if j > 1 else 0) & 15
                high = int(qh[32 * half + i]) >> 2 * j & 3
                weights.append(scale * scales[8 * half + 2 * j + i // 16] * (low + 16 * high - 32))
    return weights


BY_DEFINITION = {Kind.Q4_0: q4_0, Kind.Q8_0: q8_0, Kind.Q6_K: q6_k}


@pytest.mark.parametrize("kind", [*QUANTIZABLE, *SCALES], ids=lambda kind: kind.name)
def test_each_quantization_is_read(write_gguf, tmp_path, kind):
    shape = (96, 256)
    if kind in SCALES:
        stored = random_blocks(kind, shape[0])
    else:
        stored = gguf.quantize(np.random.default_rng(0).normal(size=shape).astype(np.float32), kind)
    name = "blk.1.ffn_up.weight"
    path = write_gguf(tmp_path / "tiny.gguf", "qwen2", {"qwen2.embedding_length": 256}, {name: (stored, kind)})
    found = read_gguf(path)[1]["layers"]["mlp"]["up"]["kernel"][1].T
    np.testing.assert_array_equal(found, gguf.dequantize(stored, kind))
    assert np.ptp(found) > 0.1
    if kind in BY_DEFINITION:
        blocks = stored.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
        expected = np.reshape([BY_DEFINITION[kind](block) for block in blocks], shape)
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # the products are rounded in another order


UP, FREQS = "blk.1.ffn_up.weight", "rope_freqs.weight"
WRONG = {
    "architecture": (
        {"architecture": "mamba"},
        "general.architecture is 'mamba', only llama, qwen2, qwen3",
    ),
    "rope": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn', only 'none'"),
    "experts": ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count is 8"),
    "partial rope": ({"metadata": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count is 8"),
    "value heads": ({"metadata": {"llama.attention.value_length": 8}}, "llama.attention.value_length is 8, only 16"),
    "unknown key": (
        {"metadata": {"llama.attention.sliding_window": 4096}},
        "llama.attention.sliding_window is 4096: br_jax does not know this key",
    ),
    "no width": ({"metadata": {"llama.embedding_length": None}}, "llama.embedding_length is missing"),
    "kv heads": ({"metadata": {"llama.attention.head_count_kv": 3}}, "num_kv_heads 3 does not divide"),
    "missing tensor": ({"tensors": {UP: None}}, f"{UP} is missing"),
    "missing bias": ({"architecture": "qwen2", "tensors": {"blk.1.attn_v.bias": None}}, "blk.1.attn_v.bias is missing"),
    "extra tensor": (
        {"tensors": {"blk.0.attn_q.bias": np.ones(64, np.float32)}},
        "unexpected tensor blk.0.attn_q.bias",
    ),
    "shape": (
        {"tensors": {"blk.0.attn_q.weight": np.ones((32, 64), np.float32)}},
        r"blk.0.attn_q.weight has shape \(32, 64\), the sizes say \(64, 64\)",
    ),
    "rope factors": ({"tensors": {FREQS: np.linspace(1, 8, 8, dtype=np.float32)}}, f"{FREQS}: rope factors other than"),
    "rope factors' size": ({"tensors": {FREQS: np.ones(7, np.float32)}}, f"{FREQS}: rope factors other than"),
    "kind": ({"tensors": {UP: (np.ones((96, 64)), Kind.F64)}}, rf"{UP} \(F64\) cannot be dequantized"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_unsupported_file_is_one_line(write_gguf, tmp_path, case):
    arguments, message = WRONG[case]
    path = write_gguf(tmp_path / "tiny.gguf", **arguments)
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_cut_anywhere_is_one_line(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
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


CHAT = "<|im_start|>user\nName three rivers of Europe.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["The capital of France is", CHAT, "def add(a, b):\n    return"]


@needs_smollm2
def test_smollm2_is_the_model_that_transformers_loads():
    spec, params, tokenizer, _ = read_gguf(SMOLLM2)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    assert len(set(map(len, prompts))) == 3
    params = jax.device_put(params)
    continued = our_continuations(spec, params, prompts, 64)
    model = oracle(SMOLLM2)
    for ids, batched, more in zip(prompts, our_logits(spec, params, prompts), continued, strict=True):
        theirs = their_logits(model, ids + more)
        # The project's bar for f32; the logits reach 20 or so.
        np.testing.assert_allclose(our_logits(spec, params, [ids])[0], theirs[: len(ids)], atol=1e-3, rtol=0)
        np.testing.assert_allclose(batched, theirs[: len(ids)], atol=1e-3, rtol=0)
        # Greedy, token for token: each of ours is what transformers puts first after all before it.
        assert theirs[len(ids) - 1 : -1].argmax(-1).tolist() == more
