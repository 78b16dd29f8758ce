"""Hugging Face folders: dtypes, old styles, wrong folders. Every family's folder: test_families."""

import json
import shutil
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tampering import edit_json, edit_tensors

from br_jax.core.errors import UserError
from br_jax.models.io.hf import read_hf, write_hf
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.provider import load_model

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


@pytest.fixture
def folder(make_family, tmp_path):
    """A Llama's, as transformers saves it, that a test may spoil."""
    return shutil.copytree(make_family("llama")[1], tmp_path / "theirs")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_back_bit_equal_and_is_read_as_float32(make_family, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(make_family("llama untied")[1], dtype=dtype)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    write_hf(tmp_path / "ours", *read_hf(tmp_path / "theirs", dtype)[:3])
    theirs = {}
    for shard in (tmp_path / "theirs").glob("*.safetensors"):
        theirs |= load_file(shard)
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys() and len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].tobytes() == tensor.tobytes(), name
    wide, narrow = read_hf(tmp_path / "theirs")[1], read_hf(tmp_path / "theirs", dtype)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(np.float32)), wide, narrow)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").encode("ab<sep>") == [97, 98, 258]


def test_old_style_config_and_a_tied_head_written_out(folder):
    def old(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)

    edit_tensors(folder / "model.safetensors", old)
    edit_config(folder, rope_parameters=None, rope_scaling=None, rope_theta=5000.0)
    spec, params, *_ = read_hf(folder)
    assert spec.rope_theta == 5000.0 and "head" not in params


def edit_config(folder, **changes):
    edit_json(folder / "config.json", lambda config: config.update(changes))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def ends(folder, ids):
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')


def enlarge(folder):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)


def sharded(folder, file):
    """Says that the weights lie in another file, and leaves none of that name."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: file}}))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


UP, HEAD, EMBED = "model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.embed_tokens.weight"
CONFIG = [
    ({"model_type": "mamba"}, "model_type is 'mamba', only llama, mistral"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5.0}}, "transformers refuses it.*low_freq_factor"),
    ({"attention_bias": True}, r"k_proj\.bias is missing"),
    ({"attention_sink": 4}, "attention_sink is 4: br_jax does not know"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\], only llama"),
    ({"num_hidden_layers": 4}, r"model\.layers\.3.* is missing \(9 in all\)"),
]
TENSORS = [
    (lambda t: t.update(odd=t[UP]), "unexpected tensor odd"),
    (lambda t: t.update({UP: t[UP].T.copy()}), rf"{UP} has shape \(42, 77\), the sizes say \(77, 42\)"),
    (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} is I8"),
    (lambda t: t.update({HEAD: t[EMBED] * (np.arange(42) != 3).astype(np.float32)}), f"{HEAD} differs"),
    (lambda t: np.put(t[UP], 99, np.nan), f"{UP} holds NaN or infinity"),
]
FILES = [
    (lambda f: cut(f / "config.json", 50), r"config\.json: not valid JSON"),
    (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
    (lambda f: cut(f / "model.safetensors", 9000), r"model\.safetensors: not a complete safetensors file"),
    (lambda f: cut(f / "tokenizer.json", 900), r"tokenizer\.json: not a tokenizer"),
    (enlarge, "has a token 267, for an embedding of 263 rows"),
    (lambda f: edit_json(f / "tokenizer.json", lambda t: t["model"]["vocab"].update(a=10**6)), "has a token 1000000"),
    (lambda f: edit_json(f / "tokenizer_config.json", lambda t: t.update(model_max_length="x")), "not a tokenizer"),
    (lambda f: sharded(f, "model-00002.safetensors"), r"model-00002\.safetensors: no such file"),
    (lambda f: sharded(f, "../secret"), "weight_map must give file names"),
    (pickled, r"pytorch_model\.bin is pickled and can run code"),
    (lambda f: ends(f, '"</s>"'), r"config\.json: eos_token_id is \['</s>'\], not token ids below 263"),
    (lambda f: ends(f, "[257, 263]"), r"eos_token_id is \[257, 263\]"),
    (lambda f: ends(f, "true"), r"eos_token_id is \[True\]"),
]
DAMAGE = [
    *((lambda f, changes=changes: edit_config(f, **changes), message) for changes, message in CONFIG),
    *((lambda f, edit=edit: edit_tensors(f / "model.safetensors", edit), message) for edit, message in TENSORS),
    *FILES,
]


@pytest.mark.parametrize(("spoil", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_a_wrong_folder_is_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_write_replaces_a_model_and_nothing_else(folder, tmp_path, monkeypatch):
    spec, params, tokenizer, _ = read_hf(folder)
    for _ in range(2):
        write_hf(tmp_path / "ours", spec, params, tokenizer)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="no model folder"):
        write_hf(tmp_path / "notes", spec, params, tokenizer)
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(tokenizer, "save_pretrained", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):
        write_hf(folder, spec, params, tokenizer)
    assert (folder / "model.safetensors").read_bytes() == before, "a failed write leaves the old model whole"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "ours", "theirs"]
