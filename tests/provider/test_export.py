"""What is handed on: against peft and transformers, by vLLM's rules, and what must never be written."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import delta
from safetensors.numpy import load_file

import br_jax as br
from br_jax.adapters import lora
from br_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, read_provenance, save_adapter
from br_jax.core.errors import UserError
from br_jax.models.io.hf import write_hf
from br_jax.models.model import fold_adapter
from br_jax.provider import (
    PROVIDER_FILE,
    export,
    export_adapter,
    export_model,
    load_model,
    record_adapter,
    write_provider,
)

# peft asks transformers by a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def base(tiny, tmp_path):
    """A model's folder, with a license."""
    write_hf(tmp_path / "base", tiny.spec, tiny.params, tiny.tokenizer)
    (tmp_path / "base" / "LICENSE").write_text("free")
    return tmp_path / "base"


@pytest.fixture
def provider(base, make_adapter, tmp_path):
    """A provider's folder whose aligned base is `base` with an adapter folded in."""
    raw, align = load_model(base), make_adapter("align", seed=5)
    save_adapter(tmp_path / "provider/align/adapter", align, base_name="base", fingerprint=raw.fingerprint)
    record = {"base": "../base", "align": "align/adapter", "template": "alpaca", "dtype": "float32"}
    record["fingerprint"] = fold_adapter(raw, align, "x").fingerprint
    (tmp_path / "provider" / PROVIDER_FILE).write_text(json.dumps(record))
    return tmp_path / "provider"


@pytest.fixture
def saved(tiny, make_adapter, tmp_path):
    """saved(role) -> an adapter's folder."""

    def save(role):
        folder = tmp_path / role
        save_adapter(folder, make_adapter(role), base_name="tiny", fingerprint=tiny.fingerprint, provider=True)
        return folder

    return save


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_released_adapter_passes_vllm_s_rules(tiny, make_adapter, tmp_path):
    released = br.release(tiny, make_adapter("user", rank=5), make_adapter("reinforce", seed=1, rank=3))
    figures = export_adapter(tiny, released, tmp_path / "to")
    config = json.loads((tmp_path / "to" / CONFIG_FILE).read_text())
    tensors = load_file(tmp_path / "to" / WEIGHTS_FILE)
    assert figures["roles"] == ["reinforce", "user"] and figures["rank"] == config["r"] == 8
    # validate_legal: no more than the server's rank; no bias, nothing saved whole, no DoRA
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    # its scale is lora_alpha / r for every matrix: whole numbers, and no pattern that it would not read
    assert all(type(config[name]) is int for name in ("r", "lora_alpha"))
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    # every tensor's module is one that the model has, both halves are there, and each has the rank of the config
    suffixes = set()
    for key, tensor in tensors.items():
        name, half = re.fullmatch(r"base_model\.model\.(model\.layers\.\d+\.[\w.]+)\.lora_([AB])\.weight", key).groups()
        suffixes.add(name.rsplit(".", 1)[-1])
        assert key.replace(f"lora_{half}", "lora_B" if half == "A" else "lora_A") in tensors
        assert tensor.shape["AB".index(half)] == config["r"] and tensor.dtype == np.float32
    assert suffixes <= PROJECTIONS and sorted(suffixes) == config["target_modules"]


def test_a_lower_rank_loses_what_numpy_says(tiny, make_adapter, tmp_path):
    adapter = make_adapter("user", rank=4)
    figures = export_adapter(tiny, adapter, tmp_path / "to", rank=2)
    squares = {p: np.linalg.svd(change, compute_uv=False) ** 2 for p, change in delta(adapter).items()}
    losses = [(s[2:].sum() / s.sum(), path, layer) for path, each in squares.items() for layer, s in enumerate(each)]
    worst, *place = max(losses)
    found = figures["worst_matrix"]
    assert [found["path"], found["layer"]] == place and found["relative_error"] == pytest.approx(worst**0.5, rel=1e-4)
    assert figures["rank"] == 2 and 0 < figures["relative_error"] < found["relative_error"]
    again = br.load_adapter(tmp_path / "to", tiny)  # of the same base, and it knows what it lost
    assert {pair["a"].shape[-1] for pair in again.weights.values()} == {2}
    assert read_provenance(tmp_path / "to")["extra"]["relative_error"] == figures["relative_error"]


def test_a_model_is_what_peft_merges(base, saved, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    figures = export(base, saved("user"), tmp_path / "to", form="model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "user")).merge_and_unload().state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert (tmp_path / "to" / "LICENSE").read_text() == "free"
    assert len({path.stat().st_mode for path in (tmp_path / "to").iterdir()}) == 1, "a file is for its owner alone"
    assert figures["roles"] == ["user"] and figures["dtype"] == "float32" and figures["unchanged_share"] < 0.01
    assert load_model(tmp_path / "to").fingerprint == figures["fingerprint"]


def test_rounding_is_told(make_tiny, make_adapter, tmp_path):
    model = make_tiny(dtype=jnp.bfloat16)
    adapter = lora.scaled(make_adapter("user", model=model), 1e-3)
    figures = export_model(model, adapter, tmp_path / "to")
    written = load_model(tmp_path / "to", dtype="bfloat16")
    folded = lora.fold(model.params, adapter)
    jax.tree.map(np.testing.assert_array_equal, written.params, folded)
    assert figures["dtype"] == "bfloat16" and 0.1 < figures["unchanged_share"] < 0.99


def test_a_provider_s_aligned_base_is_one_that_its_adapters_know(provider, tiny, make_adapter, tmp_path):
    aligned = load_model(provider)
    figures = export(provider, None, tmp_path / "to", form="model", template="chat")
    assert figures["template"] == "alpaca" and "unchanged_share" not in figures
    served = load_model(tmp_path / "to")
    jax.tree.map(np.testing.assert_array_equal, served.params, aligned.params)
    assert figures["fingerprint"] == served.fingerprint == aligned.fingerprint != tiny.fingerprint
    br.save_adapter(tmp_path / "released", make_adapter("user", model=aligned), aligned)
    assert br.load_adapter(tmp_path / "released", served).roles == ("user",)
    assert (tmp_path / "to" / "LICENSE").exists()  # of the raw model


def test_a_provider_s_base_in_another_dtype(provider, make_adapter, tmp_path):
    """Everything is added in the recorded dtype and rounded once, and its adapters still fit."""
    aligned, rounded = load_model(provider), load_model(provider, dtype="bfloat16")
    assert rounded.fingerprint == aligned.fingerprint and rounded.key != aligned.key
    assert rounded.dtype == rounded.matmul_precision == "bfloat16"
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), aligned.params, rounded.params)
    user = make_adapter("user", model=aligned)
    br.save_adapter(tmp_path / "user", user, rounded)
    for adapter, expected in ((None, aligned.params), (tmp_path / "user", lora.fold(aligned.params, user))):
        figures = export(provider, adapter, tmp_path / "to", form="model", dtype="bfloat16")
        written = load_model(tmp_path / "to", dtype="bfloat16")
        assert figures["dtype"] == "bfloat16" and figures["fingerprint"] == written.fingerprint
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), expected, written.params)


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_a_buffer_is_never_exported(base, saved, make_adapter, tiny, tmp_path, form, monkeypatch):
    held = lora.stack([make_adapter("user"), make_adapter("buffer", seed=1)])
    write = export_adapter if form == "adapter" else export_model
    with pytest.raises(UserError, match=r"holds a buffer \(roles buffer\+user\)"):
        write(tiny, held, tmp_path / "to")
    monkeypatch.setattr("br_jax.provider.load_model", lambda *_, **__: pytest.fail("loaded a model for nothing"))
    with pytest.raises(UserError, match="holds a buffer"):
        export(base, saved("buffer"), tmp_path / "to", form=form)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_sources_and_other_folders_stay_as_they_are(provider, base, saved, tmp_path, form):
    user = saved("user")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    for folder in (provider, provider / "align" / "adapter", base, base / "new", user, tmp_path):
        with pytest.raises(UserError, match="is, is in or holds the source"):
            export(provider, user, folder, form=form)
    for folder in (tmp_path / "other", tmp_path / "other" / "thesis.tex"):
        with pytest.raises(UserError, match=r"other.*: exists and is no"):
            export(base, user, folder, form=form)
    assert contents(tmp_path) == before


def test_an_earlier_export_is_replaced_and_a_failed_one_leaves_nothing(base, saved, tmp_path, make_tiny, make_adapter):
    export(base, saved("user"), tmp_path / "to")
    export(base, saved("align"), tmp_path / "to", rank=1)
    assert read_provenance(tmp_path / "to")["roles"] == ["align"]
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(UserError, match="is, is in or holds the source"):
        export_model(load_model(base), None, tmp_path / "link", like=base)
    other = make_tiny(ffw_dim=56)
    for write in (export_adapter, export_model):
        with pytest.raises(UserError, match=r"made for (another model|the base)"):
            write(other, make_adapter("user"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_link_out_of_the_base_s_folder_is_not_followed(base, saved, tmp_path):
    """It may lead to a Buffer; but the Hub's cache is made of links."""
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").symlink_to(saved("user") / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"LICENSE: is a link to .*put the file itself"):
        export_model(load_model(copy), None, tmp_path / "to", like=copy)
    assert not (tmp_path / "to").exists()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1").write_text("mine")
    (copy / "LICENSE").unlink()
    (copy / "LICENSE").symlink_to(tmp_path / "blobs/1")
    export_model(load_model(copy), None, tmp_path / "to", like=copy)
    assert (tmp_path / "to/LICENSE").read_text() == "mine"


def test_the_script_writes_what_the_library_does(script, base, saved, tmp_path):
    status, said = script("export.py", f"--model={base}", f"--adapter={saved('user')}", f"--to={tmp_path / 'to'}")
    assert status == 0, said
    assert br.load_adapter(tmp_path / "to", load_model(base)).roles == ("user",)


def test_all_of_a_provider_s_folder_is_its_owner_s_alone(tiny, rows, quick, tmp_path):
    """Also where the folder was there before; and what an earlier br_jax left open."""
    provider = tmp_path / "provider"
    provider.mkdir()
    buffer = br.train_buffer(tiny, rows, quick(steps=1), workdir=provider)
    write_provider(provider, "base", None, tiny, "float32", None)
    (provider / PROVIDER_FILE).chmod(0o644)
    record_adapter(provider, "buffer", "buffer/adapter", buffer)
    modes = {path: path.stat().st_mode & 0o777 for path in [provider, *provider.rglob("*")]}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
