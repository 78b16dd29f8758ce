"""Hugging Face folders against transformers: tensors bit for bit, logits, and wrong folders."""

import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from br_jax.errors import UserError
from br_jax.models.decoder import Decoder, unembed
from br_jax.models.io.hf import read_hf, write_hf
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.provider.folder import load_model

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

# Nothing divides anything by accident: N * H is not D, and no two sizes are equal.
SIZES = {
    "vocab_size": 263,
    "hidden_size": 42,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rope_theta": 5000.0,
    "rms_norm_eps": 3e-5,
    "max_position_embeddings": 128,
}


def make_folder(path, tied=True, dtype="float32", **save):
    """A random Llama written by transformers itself, with the byte tokenizer beside it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(path, **save)
    byte_tokenizer().save_pretrained(path)
    return model


def our_logits(spec, params, ids):
    tokens = jnp.asarray([ids], jnp.int32)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    variables = {"params": params}
    hidden, _ = Decoder(spec).apply(variables, tokens, positions, jnp.ones_like(tokens))
    return np.asarray(unembed(spec, params, hidden)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_equal(tmp_path, tied, dtype):
    make_folder(tmp_path / "theirs", tied, dtype)
    spec, params, tokenizer, _ = read_hf(tmp_path / "theirs", dtype)
    write_hf(tmp_path / "ours", spec, params, tokenizer)
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tmp_path, tied):
    model = make_folder(tmp_path, tied)
    spec, params, tokenizer, _ = read_hf(tmp_path)
    ids = tokenizer.encode("What is a frobnicator, and why?")
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    # f32 sums in another order: a few units in the sixth digit of logits of size about 30.
    np.testing.assert_allclose(our_logits(spec, params, ids), expected, atol=1e-4)


def test_transformers_loads_what_we_write(tmp_path):
    model = make_folder(tmp_path / "theirs")
    write_hf(tmp_path / "ours", *read_hf(tmp_path / "theirs")[:3])
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[1, 2, 3, 200]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").encode("ab<sep>") == [97, 98, 258]
    assert loaded.config.eos_token_id == 257


def test_shards_and_half_precision_are_read_as_float32(tmp_path):
    make_folder(tmp_path / "whole", dtype="bfloat16")
    make_folder(tmp_path / "shards", dtype="bfloat16", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = (read_hf(tmp_path / name)[1] for name in ("whole", "shards"))
    assert whole["embed"]["embedding"].dtype == np.float32
    for block in ("attn", "mlp"):
        for name, leaf in whole["layers"][block].items():
            np.testing.assert_array_equal(leaf["kernel"], shards["layers"][block][name]["kernel"])


def test_old_style_config_and_a_tied_head_written_out(tmp_path):
    make_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_config(tmp_path, rope_parameters=None, rope_scaling=None, rope_theta=5000.0)
    spec, params, *_ = read_hf(tmp_path)
    assert spec.rope_theta == 5000.0 and "head" not in params


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def with_nan(tensors):
    tensors[UP] = np.where(np.arange(tensors[UP].size).reshape(tensors[UP].shape) == 99, np.nan, tensors[UP])
    tensors[UP] = tensors[UP].astype(np.float32)


def sharded(folder, file):
    """Says that the weights lie in another file, and leaves none of that name."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: file}}))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


def swapped(folder):
    """An index that gives a tensor to another file than holds it."""
    names = list(load_file(folder / "model.safetensors"))
    save_file({"x": np.ones(1, np.float32)}, folder / "other.safetensors")
    weight_map = dict.fromkeys(names, "model.safetensors") | {UP: "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def zipped(folder):
    with zipfile.ZipFile(folder / "model.safetensors", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(10_000_000))


def huge(path):
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # a hole, that takes no room on the disk


UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "bad json": (lambda f: cut(f / "config.json", 50), r"config\.json: not valid JSON"),
    "architecture": (lambda f: edit_config(f, model_type="mamba"), "model_type is 'mamba', only llama, mistral"),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 5.0, "factor": 2.0}),
        "rope_type is 'yarn'",
    ),
    "old rope": (
        lambda f: edit_config(f, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}),
        "rope_type is 'linear'",
    ),
    "bias": (lambda f: edit_config(f, attention_bias=True), r"k_proj\.bias is missing"),
    "unknown field": (lambda f: edit_config(f, attention_sink=4), "attention_sink is 4: br_jax does not know"),
    "dropout": (lambda f: edit_config(f, attention_dropout=0.1), "attention_dropout is 0.1: only 0 is supported"),
    "rope field": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "default", "rope_theta": 5.0, "mscale": 2}),
        r"rope_scaling has \['mscale'\]",
    ),
    "llama3 rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "llama3", "rope_theta": 5.0, "factor": 8.0}),
        "transformers refuses it.*low_freq_factor",
    ),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), "the activation is 'gelu'"),
    "quantized": (lambda f: edit_config(f, quantization_config={"bits": 4}), "quantization_config"),
    "size": (lambda f: edit_config(f, hidden_size="42"), "transformers refuses it.*hidden_size"),
    "heads": (lambda f: edit_config(f, num_key_value_heads=4), "num_kv_heads 4 does not divide"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
    "truncated": (lambda f: cut(f / "model.safetensors", 9000), r"model\.safetensors: truncated or damaged"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(UP)), f"{UP} is missing"),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update(odd=t[UP])), "unexpected tensor odd"),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].T.copy()})),
        rf"{UP} has shape \(42, 77\), the sizes say \(77, 42\)",
    ),
    "dtype": (lambda f: edit_tensors(f, lambda t: t.update({UP: t[UP].astype(np.int8)})), f"{UP} is I8"),
    "other head": (lambda f: edit_tensors(f, lambda t: t.update({HEAD: t[EMBED] + 1})), f"{HEAD} differs"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: no such file"),
    "bad tokenizer": (lambda f: cut(f / "tokenizer.json", 900), r"tokenizer\.json: not a tokenizer"),
    "nan": (lambda f: edit_tensors(f, with_nan), f"{UP} holds NaN or infinity"),
    "layers": (lambda f: edit_config(f, num_hidden_layers=4), r"model\.layers\.3.* is missing \(9 in all\)"),
    "missing shard": (lambda f: sharded(f, "model-00002.safetensors"), r"model-00002\.safetensors: no such file"),
    "pickled shard": (lambda f: sharded(f, "pytorch_model.bin"), r"pytorch_model\.bin: no such file.*safetensors only"),
    "pickled": (pickled, r"pytorch_model\.bin is pickled and can run code"),
    "swapped": (swapped, f"{UP} belongs to other.safetensors by the index"),
    "huge header": (
        lambda f: (f / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
        r"model\.safetensors: truncated or damaged",
    ),
    "zip": (zipped, r"model\.safetensors: truncated or damaged"),
    "huge json": (lambda f: huge(f / "config.json"), r"config\.json: 1,073,741,824 bytes are too many"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 200_000), r"config\.json: not valid JSON"),
    "stop tokens": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "</s>"}'),
        r"generation_config\.json: eos_token_id",
    ),
    "shard path": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../secret"}}'),
        "weight_map must give file names",
    ),
}
EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_folder_is_one_line(tmp_path, damage):
    make_folder(tmp_path)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_vocabulary_too_large_is_refused(tmp_path):
    make_folder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="268 tokens for an embedding of 263 rows"):
        read_hf(tmp_path)


def test_write_replaces_a_model_and_nothing_else(tmp_path):
    make_folder(tmp_path / "theirs")
    model = read_hf(tmp_path / "theirs")[:3]
    for _ in range(2):
        write_hf(tmp_path / "ours", *model)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="no model folder"):
        write_hf(tmp_path / "notes", *model)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "ours", "theirs"]


def test_a_failed_write_leaves_the_old_model_whole(tmp_path, monkeypatch):
    make_folder(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    spec, params, tokenizer, _ = read_hf(tmp_path / "model")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        write_hf(tmp_path / "model", spec, params, tokenizer)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
