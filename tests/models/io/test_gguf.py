"""GGUF against transformers' own GGUF loader and the `gguf` package, on tiny files and, when downloaded, on SmolLM2."""

import json
import math
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from oracles import logits_of_torch

from br_jax.core.errors import UserError
from br_jax.inference.generate import generate_ids
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.io import gguf as gguf_reader
from br_jax.models.io.gguf import ARCHITECTURES, read_gguf, read_gguf_spec
from br_jax.models.io.hf import read_hf, write_hf
from br_jax.models.spec import RopeScaling
from br_jax.provider import load_model

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import AutoModelForCausalLM  # noqa: E402

IDS = [5, 250, 17, 17, 99, 3, 40, 41]
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


def our_logits(spec, params, ids, positions=None):
    tokens, where = jnp.asarray([ids]), jnp.asarray([range(len(ids)) if positions is None else positions])
    hidden, _ = jax.jit(Decoder(spec).apply)({"params": params}, tokens, where, jnp.ones_like(tokens))
    return unembed(spec, params, hidden)[0]


# Gemma-2's head is always the embedding: neither llama.cpp nor transformers reads another.
@pytest.mark.parametrize(("architecture", "tied"), [*((name, True) for name in ARCHITECTURES), ("llama", False)])
def test_a_tiny_file_has_the_logits_of_transformers(write_gguf, tmp_path, architecture, tied):
    head = np.random.default_rng(1).normal(size=(260, 64), scale=0.3).astype(np.float32)
    turn = {"tokenizer.ggml.eot_token_id": 258}  # as Gemma-2's, whose EOS no chat ever says
    path = write_gguf(tmp_path / "tiny.gguf", architecture, turn, {} if tied else {"output.weight": head})
    spec, params, tokenizer, stops = read_gguf(path)
    assert ("head" in params) != tied and spec == read_gguf_spec(path) and spec.model_type == architecture
    assert (spec.max_length, spec.norm_eps, spec.rope_theta, stops) == (128, 3e-5, 5000.0, (258,))
    expected = logits_of_torch(oracle(path, **UNREAD.get(architecture, {})), IDS)
    # f32 sums in another order, of logits of size 5 or so.
    np.testing.assert_allclose(our_logits(spec, params, IDS), expected, atol=1e-4)
    write_hf(tmp_path / "folder", spec, params, tokenizer, stop_tokens=stops)
    again, same, _, kept = read_hf(tmp_path / "folder")
    assert again == spec and set(kept) == {258, tokenizer.eos_token_id}
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("text", ["<end_of_turn>", "<|eot_id|>", "<|im_end|>", "<|end|>"])
def test_the_end_of_a_turn_is_known_by_its_text(write_gguf, tmp_path, text):
    """llama.cpp's converter names none for Gemma-2, and llama.cpp looks for it."""
    tokens = [*gguf_reader.GGUFFile(write_gguf(tmp_path / "first.gguf")).get("tokenizer.ggml.tokens", items=str)]
    tokens[258] = text
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    assert read_gguf(path)[3] == (258,)


def test_stop_tokens_of_a_config_alone(tmp_path, tiny):
    """As transformers reads them where there is no generation_config.json."""
    write_hf(tmp_path / "m", tiny.spec, jax.device_get(tiny.params), tiny.tokenizer)
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"eos_token_id": [257, 3]}))
    assert not (tmp_path / "m/generation_config.json").exists() and read_hf(tmp_path / "m")[3] == (257, 3)


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
    divisors, rope = llama3_divisors(16, 5000.0, 8.0)
    assert {1.0, 8.0} < set(divisors.tolist()), "fast, slow and mixed frequencies must all be there"
    path = write_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": divisors})
    spec, params, *_ = read_gguf(path)
    assert spec.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    # transformers' loader skips the tensor. Far apart, or what turns slowly does not turn at all.
    far = [0, 1, 500, 501, 3000, 7000, 7001, 9000]
    expected = logits_of_torch(oracle(path, rope_parameters=rope), IDS, far)
    assert np.abs(expected - logits_of_torch(oracle(path), IDS, far)).max() > 0.1
    # Angles of thousands of radians have an error of 1e-4 in f32.
    np.testing.assert_allclose(our_logits(spec, params, IDS, far), expected, atol=3e-3)


def test_what_no_file_says_of_gemma_2(write_gguf, tmp_path):
    """Early files have neither caps nor window; the 27B model, of 46 layers, scales by D / N instead of H."""
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    early = {f"gemma2.{key}": None for key in keys}
    spec = read_gguf_spec(write_gguf(tmp_path / "early.gguf", "gemma2", early, whole=False))
    assert (spec.attention_soft_cap, spec.logit_soft_cap, spec.window, spec.windowed) == (50, 30, 4096, (True, False))
    assert (spec.query_scale, spec.tie_embeddings) == (24**-0.5, True)
    sizes = {"block_count": 46, "embedding_length": 4608, "attention.head_count": 32, "attention.head_count_kv": 16}
    large = {f"gemma2.{key}": value for key, value in sizes.items()}
    assert read_gguf_spec(write_gguf(tmp_path / "27b.gguf", "gemma2", large, whole=False)).query_scale == 144**-0.5


QUANTIZABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
# Bytes of the float16 scales in a block of 256 weights, which every other byte may be anything beside: ggml-common.h.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}


def test_each_quantization_is_read(write_gguf, tmp_path):
    """A layer for each, in one file, as the `gguf` package dequantizes it."""
    rng, rows, kinds, stored = np.random.default_rng(0), 96, (*QUANTIZABLE, *SCALES), []
    for kind in kinds:
        if kind in QUANTIZABLE:
            stored.append(gguf.quantize(rng.normal(size=(rows, 256)).astype(np.float32), kind))
            continue
        stored.append(rng.integers(0, 256, (rows, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8))
        for byte in SCALES[kind]:
            stored[-1][:, byte : byte + 2] = rng.uniform(1e-3, 1e-2, (rows, 1)).astype(np.float16).view(np.uint8)
    tensors = {f"blk.{i}.ffn_up.weight": each for i, each in enumerate(zip(stored, kinds, strict=True))}
    sizes = {"qwen2.embedding_length": 256, "qwen2.block_count": len(kinds)}
    params = read_gguf(write_gguf(tmp_path / "tiny.gguf", "qwen2", sizes, tensors))[1]
    for kind, each, found in zip(kinds, stored, params["layers"]["mlp"]["up"]["kernel"], strict=True):
        np.testing.assert_array_equal(found.T, gguf.dequantize(each, kind), kind.name)
        assert np.ptp(found) > 0.1


UP, FREQS = "blk.1.ffn_up.weight", "rope_freqs.weight"
TOKENS = [f"<0x{byte:02X}>" for byte in range(256) if byte != 200]
WRONG = [
    ({"general.architecture": "mamba"}, {}, "general.architecture is 'mamba', only llama, qwen2, qwen3"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type is 'yarn', only none"),
    ({"llama.attention.head_count": 0}, {}, "llama.attention.head_count is 0: it must be a whole number from 1"),
    (
        {"llama.attention.layer_norm_rms_epsilon": math.nan},
        {},
        "layer_norm_rms_epsilon is nan: it must be a number above 0",
    ),
    ({"llama.rope.freq_base": 0.0}, {}, "rope.freq_base is 0.0: it must be"),
    ({"llama.attention.sliding_window": 4096}, {}, "sliding_window is 4096: br_jax does not know this key"),
    ({"llama.embedding_length": None}, {}, "llama.embedding_length is missing"),
    ({}, {UP: None}, f"{UP} is missing"),
    ({}, {"blk.0.attn_q.bias": np.ones(64, np.float32)}, "unexpected tensor blk.0.attn_q.bias"),
    ({}, {UP: np.ones((64, 96), np.float32)}, rf"{UP} has shape \(64, 96\), the sizes say \(96, 64\)"),
    ({}, {FREQS: np.linspace(1, 8, 8, dtype=np.float32)}, f"{FREQS}: rope factors other than"),
    ({}, {FREQS: np.full(8, np.nan, np.float32)}, f"{FREQS}: rope_scaling: factor is nan"),
    ({}, {UP: (np.ones((96, 64)), Kind.F64)}, rf"{UP} \(F64\) cannot be dequantized"),
    ({"eot_token_id": 9999}, {}, "eot_token_id is 9999, but there are 260"),
    ({"add_eos_token": True}, {}, "tokenizer.ggml.add_eos_token is True, only False"),
    ({"add_bos_token": True, "bos_token_id": None}, {}, "tokenizer.ggml.bos_token_id is missing"),
    ({"merges": ["together"]}, {}, "tokenizer.ggml.merges do not fit"),
    ({"merges": [1, 2]}, {}, "tokenizer.ggml.merges is no list of str"),
    ({"token_type": "normal"}, {}, "tokenizer.ggml.token_type is no list of int"),
    ({"tokenizer.chat_template": ["a"]}, {}, "tokenizer.chat_template is no text"),
    ({"tokens": ["a", "b", "a"]}, {}, "3 tokens, 2 of them different, 260 token types and 260 embeddings"),
    ({"model": "llama", "scores": [0.0, 0.0]}, {}, "260 tokens and 2 tokenizer.ggml.scores"),
    ({"model": "llama", "tokens": TOKENS, "token_type": [6] * 255, "scores": [0.0] * 255}, {}, "has no <0xC8>"),
]


@pytest.mark.parametrize(("metadata", "tensors", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_an_unsupported_file_is_one_line(write_gguf, tmp_path, metadata, tensors, message):
    metadata = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "tiny.gguf", metadata=metadata, tensors=tensors)
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_cut_anywhere_is_one_line(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    # Every part of the file: magic, counts, metadata, lists, tensor table, data, the very last byte.
    for length in [0, 3, 6, 60, 3000, 8000, len(content) // 2, len(content) - 40]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a GGUF file, or a truncated or damaged one"):
            read_gguf(path)
    path.write_bytes(b"PK\x03\x04" + content[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        read_gguf(path)
    with pytest.raises(UserError, match="no such file"):
        read_gguf(tmp_path / "absent.gguf")


CHAT = "<|im_start|>user\nName three rivers of Europe.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ["The capital of France is", CHAT, "def add(a, b):\n    return"]


@pytest.mark.slow
def test_smollm2_is_the_model_that_transformers_loads(smollm2):
    made, model = load_model(smollm2), oracle(smollm2)
    prompts = [made.tokenizer.encode(text) for text in PROMPTS]
    continued = generate_ids(made, prompts, stops=(), max_new_tokens=16, batch_size=3)
    for ids, more in zip(prompts, continued, strict=True):
        expected = logits_of_torch(model, [*ids, *more])
        # The project's bar for f32; the logits reach 20 or so.
        np.testing.assert_allclose(our_logits(made.spec, made.params, ids), expected[: len(ids)], atol=1e-3, rtol=0)
        # Greedy, token for token: each of ours is what transformers puts first after all before it.
        assert expected[len(ids) - 1 : -1].argmax(-1).tolist() == more.tolist()


def test_a_list_is_no_longer_than_the_file_nor_than_any_vocabulary(write_gguf, tmp_path, monkeypatch):
    """gguf would go on with empty values, for as long as the count says."""
    path = write_gguf(tmp_path / "tiny.gguf", whole=False)
    monkeypatch.setattr(gguf_reader, "_MAX_VALUES", 200)
    with pytest.raises(UserError, match=r"damaged one \(more than 200 values"):
        read_gguf_spec(path)
    monkeypatch.undo()
    content, key = path.read_bytes(), b"tokenizer.ggml.token_type"
    place = content.index(key) + len(key) + 4  # behind the type of the value
    path.write_bytes(content[:place] + struct.pack("<IQ", gguf.GGUFValueType.UINT8, 10**6) + content[place + 12 :])
    with pytest.raises(UserError, match=r"damaged one \(it ends early"):
        read_gguf_spec(path)
