"""What a path is said to hold: against numpy, transformers and gguf, without a base; and paths that are nothing."""

import hashlib
import json
import os
import pickle
import re

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta
from safetensors.numpy import load_file, save, save_file

from br_jax.adapters import lora
from br_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from br_jax.core.errors import UserError
from br_jax.models.io.hf import write_hf
from br_jax.provider import PROVIDER_FILE, record_adapter
from br_jax.report.describe import describe, render

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.fixture
def adapter(tmp_path, make_adapter, tiny):
    """An adapter's folder, and the adapter."""
    made, folder = make_adapter("user", rank=3), tmp_path / "adapter"
    save_adapter(folder, made, base_name="tiny", fingerprint=tiny.fingerprint)
    return folder, made


def test_an_adapter_is_told_without_its_base(adapter, tiny):
    folder, made = adapter
    found = describe(folder)
    rows = {row["target"]: row for row in found["rows"]}
    assert found["kind"] == "adapter" and list(rows) == ["q", "v", "gate", "up", "down"]
    facts = {"roles": ["user"], "base": "tiny", "base_fingerprint": tiny.fingerprint}
    facts |= {"pickles_not_opened": [], "rank": 3, "alpha": 6, "scale": 2.0, "layers": 2}
    facts |= {"sha256": hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()}
    assert facts.items() <= found["facts"].items()
    for path, dense in delta(made).items():
        row = rows[path.rsplit("/", 1)[-1]]
        sigma = np.linalg.svd(np.float64(dense), compute_uv=False)
        norms = np.linalg.norm(np.float64(dense), axis=(1, 2))
        np.testing.assert_allclose(found["spectra"][row["target"]], sigma[:, :3], rtol=1e-4)
        numbers = {"in": dense.shape[1], "out": dense.shape[2], "layers": 2, "effective_rank": 3}
        numbers |= {"mean_norm": norms.mean(), "largest_norm": norms.max(), "at_layer": norms.argmax()}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=1e-5) and row["rank"] == [3]
        assert row["stable_rank"] == pytest.approx(np.mean(norms**2 / sigma[:, 0] ** 2), rel=1e-4)
    json.dumps(found)


def test_a_buffer_is_named_as_one_and_known_by_its_numbers(tmp_path, make_adapter, tiny):
    """Relabelled, or of no role; compared with a provider's folder, of which nothing but its record is needed."""
    buffer, user = make_adapter("buffer", seed=1), make_adapter("user")
    save_adapter(tmp_path / "held", lora.stack([user, buffer]), base_name="tiny", provider=True)
    assert re.search("holds a buffer +yes, keep it in the provider's folder", render(describe(tmp_path / "held")))
    assert '"buffer"' in describe(tmp_path / "held" / WEIGHTS_FILE)["facts"]["notes"]["br_jax"]
    record = {"base": "gone", "template": "chat", "dtype": "float32", "fingerprint": tiny.fingerprint}
    (tmp_path / "provider").mkdir()
    (tmp_path / "provider" / "provider.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="records no Buffer to compare with"):
        describe(tmp_path / "held", tmp_path / "provider")
    save_adapter(tmp_path / "provider" / "buffer" / "adapter", buffer, base_name="tiny", provider=True)
    record_adapter(tmp_path / "provider", "buffer", "buffer/adapter", buffer)
    mixed = lora.stack([lora.scaled(buffer, 0.6), user]).replace(roles=("user",))
    for adapter, held in ((buffer.replace(roles=("user",)), True), (mixed, True), (user, False)):
        save_adapter(tmp_path / "theirs", adapter, base_name="tiny")
        assert describe(tmp_path / "theirs")["facts"]["holds_a_buffer"].startswith("no, by its own account")
        facts = describe(tmp_path / "theirs", tmp_path / "provider")["facts"]
        assert facts["holds_a_buffer"] is held and (facts["like_the_buffer"]["share"] > 0.4) is held


def test_some_layers_of_peft_s_own(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {KEY.format(layer, "A"): rng.normal(size=(2, 6)) for layer in (1, 3)}
    tensors |= {KEY.format(layer, "B"): rng.normal(size=(5, 2)) for layer in (1, 3)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(CONFIG | {"layers_to_transform": [1, 3]}))
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    found = describe(tmp_path)
    (row,) = found["rows"]
    norms = [np.linalg.norm(3 * tensors[KEY.format(layer, "B")] @ tensors[KEY.format(layer, "A")]) for layer in (1, 3)]
    assert row["mean_norm"] == pytest.approx(np.mean(norms)) and row["at_layer"] == (1, 3)[int(np.argmax(norms))]
    facts = {"layers": 2, "roles": None, "dtypes": {"F64": 4}, "pickles_not_opened": ["optimizer.pt"]}
    assert facts.items() <= found["facts"].items()


def test_a_model_is_told_from_config_and_headers(tmp_path, make_tiny):
    folder, made = tmp_path, make_tiny(dtype=jnp.bfloat16, tie_embeddings=False, window=16, model_type="mistral")
    write_hf(folder, made.spec, made.params, made.tokenizer, shard_bytes=60_000)
    (folder / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))
    facts = describe(folder)["facts"]
    shards = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(shards) > 1 and facts["shards"] == len(shards) and facts["tensors"] == len(tensors)
    told = {"model_type": "mistral", "num_layers": 2, "num_kv_heads": 2, "window": 16, "windowed": 2}
    told |= {"tie_embeddings": False, "chat_template": True, "pickles_not_opened": ["optimizer.pt"]}
    told |= {"parameters": sum(tensor.size for tensor in tensors.values()), "dtypes": {"BF16": len(tensors)}}
    told |= {"bytes": sum(shard.stat().st_size for shard in shards), "tokens": len(made.tokenizer)}
    assert told.items() <= facts.items()


def test_a_safetensors_file_is_told_tensor_by_tensor(tmp_path):
    save_file({"x": np.ones((2, 3), np.float16), "\x1b[31my": np.ones(4, bool)}, tmp_path / "some.safetensors")
    found = describe(tmp_path / "some.safetensors")
    told = {row["tensor"]: (row["dtype"], row["shape"]) for row in found["rows"]}
    assert told == {"x": ("F16", [2, 3]), "\x1b[31my": ("BOOL", [4])} and found["facts"]["parameters"] == 10
    assert "\x1b" not in render(found)  # a terminal would obey it


def test_a_provider_s_folder_and_a_run_tell_their_stages(tmp_path):
    provider = tmp_path / "provider"
    for stage in ("align", "buffer", "reinforce"):
        (provider / stage).mkdir(parents=True)
        (provider / stage / "run.json").write_text(json.dumps({"config": {"rank": 4}, "inputs": {"rows": "cd"}}))
    for step in ("40", "9"):
        (provider / "buffer" / "checkpoints" / step).mkdir(parents=True)
    (provider / "align" / "stage.json").write_text(json.dumps({"rows": 8, "steps": 2, "finished": "2026"}))
    assert describe(provider)["kind"] == "workdir"
    record = {"base": "../model", "align": None, "template": "alpaca", "dtype": "float32", "fingerprint": "ab"}
    (provider / PROVIDER_FILE).write_text(json.dumps(record))
    provider.chmod(0o755)
    found = describe(provider)
    assert found["kind"] == "provider" and found["facts"]["only_its_owner_may_enter"] is False
    assert found["facts"]["base"] == str(provider / "../model") and found["facts"]["fingerprint"] == "ab"
    states = {row["stage"]: row["state"] for row in found["rows"]}
    assert states == {"align": "finished", "buffer": "stopped, goes on from step 40", "reinforce": "begun"}
    assert {"rows": 8, "config_rank": 4}.items() <= describe(provider / "align")["facts"].items()
    (tmp_path / "results.json").write_text(json.dumps({"command": "x"}))
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "ours-a0.1.json").touch()
    assert describe(tmp_path)["facts"]["scored"] == ["ours-a0.1"]


ADAPTER = {CONFIG_FILE: json.dumps(CONFIG).encode()}
PICKLED = pickle.dumps(Bomb())
# One layer, in a place that asks for 500 times as many zeros.
FAR = save({KEY.format(998, half): np.ones((600, 600), np.float16) for half in "AB"})
FAR_CONFIG = CONFIG | {"r": 600, "layers_to_transform": [998]}
CASES = [
    ({}, ".", "none of provider.json, adapter_config.json"),
    ({"weights.pt": PICKLED}, ".", "weights.pt is pickled, can run code and is not opened"),
    ({"weights.pt": PICKLED}, "weights.pt", "weights.pt: not known: .*a pickle, which can run code, is not opened"),
    ({"x.safetensors": save({"x": np.ones(99)})[:-8]}, "x.safetensors", "x.safetensors: not a complete safetensors"),
    (ADAPTER | {WEIGHTS_FILE: save({KEY.format(10**8, "A"): np.ones((2, 2))})}, ".", "of layer 100,000,000"),
    (ADAPTER | {WEIGHTS_FILE: save({KEY.format(0, "A"): np.ones((2, 2))})}, ".", r"lacks .*lora_B"),
    ({CONFIG_FILE: json.dumps(FAR_CONFIG).encode(), WEIGHTS_FILE: FAR}, ".", "its 720,000 numbers, padded to all"),
    ({PROVIDER_FILE: b"{}"}, ".", "provider.json: not a provider's record"),
]


@pytest.mark.parametrize(("files", "path", "message"), CASES, ids=[message for *_, message in CASES])
def test_what_cannot_be_described_is_one_line(tmp_path, files, path, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        describe(tmp_path / path)
    assert "\n" not in str(caught.value)


def test_the_script_prints_and_writes_and_says_in_one_line_what_is_no_file(script, adapter, tmp_path):
    folder, _ = adapter
    json_file, picture = tmp_path / "figures.json", tmp_path / "new" / "spectra.png"
    status, said = script("describe.py", folder, f"--json={json_file}", f"--plot={picture}")
    assert status == 0, said
    (found,) = json.loads(json_file.read_text())
    assert found == describe(folder) and picture.read_bytes().startswith(b"\x89PNG")
    os.mkfifo(tmp_path / "model.gguf")
    status, said = script("describe.py", tmp_path / "model.gguf")
    assert status == 2 and re.fullmatch(r"error: \S+model.gguf: cannot be read \(it is a pipe, not a file\).*\n", said)
