"""Everything that a bad adapter folder or disk can do."""

import json
import os
import resource
import stat

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tampering import edit_json, edit_tensors

from br_jax.adapters import lora
from br_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from br_jax.core.errors import UserError

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_buffer_stays_in_the_provider_s_private_folder(tmp_path, params, trained):
    buffer = trained(params, role="buffer")
    for adapter in (buffer, lora.stack([trained(params), buffer])):
        with pytest.raises(UserError, match=r"buffer.*detach"):
            save_adapter(tmp_path / "out", adapter, base_name="tiny")
    assert not (tmp_path / "out").exists()
    (tmp_path / "there").mkdir(mode=0o755)
    for folder in (tmp_path / "there", tmp_path / "provider" / "new"):
        save_adapter(folder, buffer, base_name="tiny", provider=True)
        assert mode(folder) == 0o700 and {mode(file) for file in folder.iterdir()} == {0o600}
        assert load_adapter(folder, params).roles == ("buffer",)


def test_an_ordinary_folder_follows_the_umask_and_its_other_files_stay(tmp_path, params, trained):
    folder, newer = tmp_path / "user", trained(params, rank=5, seed=1)
    old = os.umask(0o027)
    try:
        save_adapter(folder, trained(params, rank=2), base_name="tiny")
        (folder / "metrics.jsonl").write_text("{}\n")
        save_adapter(folder, newer, base_name="tiny")
    finally:
        os.umask(old)
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "metrics.jsonl"]
    assert mode(folder) == 0o750 and mode(folder / WEIGHTS_FILE) == 0o640
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, params), newer)


def snapshot(root):
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_a_write_that_is_cut_short_leaves_nothing_behind(folder, params, trained):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for place in (folder, folder.parent / "new"):
        before = snapshot(folder.parent)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            with pytest.raises(OSError, match=r"File too large: '.*adapter_model.safetensors'"):
                save_adapter(place, trained(params, seed=1), base_name="tiny")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert snapshot(folder.parent) == before


def test_a_crash_between_the_files_leaves_no_mixed_pair(tmp_path, params, trained, monkeypatch):
    save_adapter(tmp_path / "user", trained(params), base_name="tiny")
    real = os.replace

    def crash(source, target):
        if target == tmp_path / "user" / WEIGHTS_FILE:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(tmp_path / "user", trained(params, alpha=60.0), base_name="tiny")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"no adapter there"):
        load_adapter(tmp_path / "user", params)
    save_adapter(tmp_path / "user", trained(params, alpha=60.0), base_name="tiny")  # what was left does not hinder
    assert sorted(file.name for file in (tmp_path / "user").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_save_refuses_a_place_that_is_a_file_and_what_no_reader_could_use(tmp_path, params, trained):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/user"):
        with pytest.raises(OSError, match=r"File exists: .*file|Not a directory: .*file"):
            save_adapter(tmp_path / place, trained(params), base_name="tiny")
    good = trained(params)
    q = good.weights["layers/attn/q"]
    cases = [
        ("user", {"layers/attn/q": {"a": jnp.full((3, 24, 4), jnp.nan), "b": q["b"]}}, "layers/attn/q/a.*NaN"),
        ("user", {}, "no matrices"),
        ("user", {"layers/conv/w": q}, "layers/conv/w.*no name"),
    ]
    for folder, weights, message in cases:
        with pytest.raises(UserError, match=message):
            save_adapter(tmp_path / folder, good.replace(weights=weights), base_name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def folder(tmp_path, params, trained):
    save_adapter(tmp_path / "user", trained(params), base_name="tiny", fingerprint="aaaa")
    return tmp_path / "user"


def edit_config(folder, **fields):
    edit_json(folder / CONFIG_FILE, lambda config: config.update(fields))


def replaced(layer, half, value):
    return lambda tensors: tensors.update({KEY.format(layer, half): value})


def added(key):
    return lambda tensors: tensors.update({key: tensors[KEY.format(0, "A")]})


def damaged(change):
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(change((folder / WEIGHTS_FILE).read_bytes()))


def headed(text):
    return lambda folder: save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, {"br_jax": text})


TENSORS = [
    (replaced(1, "B", np.full((32, 4), 1e300)), r"layers\.1\.\S+lora_B\.weight holds NaN or infinity"),
    (replaced(1, "B", np.ones((32, 4), ml_dtypes.float8_e4m3fn)), r"lora_B\.weight is F8_E4M3, but .*F32"),
    (replaced(0, "A", np.ones((3, 24), np.float32)), r"\[3, 24\].*its rank in .*\[4, 24\].*another model"),
    (lambda tensors: tensors.pop(KEY.format(2, "A")), r"lacks .*layers\.2\.self_attn\.q_proj\.lora_A"),
    (added(KEY.format("9" * 5000, "A")), "99.* is no LoRA matrix"),
    (added(KEY.format(0, "A") + "\n"), r"weight\\n' is no LoRA matrix"),
    (added("base_model.model.model.embed_tokens.lora_embedding_A"), "embed_tokens.* is no LoRA matrix"),
]
CONFIG = [
    ({"use_dora": True}, f"{CONFIG_FILE}.*use_dora"),
    ({"target_modules": ["q_proj"]}, r"(down|gate|up|v)_proj\S+' is no LoRA matrix that .*json calls for"),
    ({"target_modules": ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}, r"lacks .*k_proj"),
    ({"target_modules": ".*", "layers_to_transform": 1}, r"layers\.0\.\S+' is no LoRA matrix that .*json calls for"),
    ({"target_modules": ["c_attn"]}, r"is no LoRA matrix that .*json calls for.*another model"),
    ({"rank_pattern": {"q_proj": 10**12}}, r"q_proj\S+ is .*need \[1000000000000, 24\]"),
]
CUT = "not a complete safetensors file"
SPOILED = [
    # One bit of a weight, which is no other kind of error; or the scale.
    (damaged(lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]), "not those that were saved"),
    (lambda folder: edit_config(folder, lora_alpha=7.5), "not those that were saved"),
    *(
        (lambda folder, change=change: edit_tensors(folder / WEIGHTS_FILE, change), message)
        for change, message in TENSORS
    ),
    *((lambda folder, fields=fields: edit_config(folder, **fields), message) for fields, message in CONFIG),
    *((damaged(lambda data, keep=keep: data[:keep]), CUT) for keep in (0, 7, 300, -1)),
    *((damaged(lambda data, n=n: n.to_bytes(8, "little") + data[8:]), CUT) for n in (0, 10**8, 2**64 - 1)),
    *((headed(text), "its br_jax header") for text in ("{", "[]", '{"roles": "x"}', '{"format_version": 2}')),
    (lambda folder: (folder / CONFIG_FILE).unlink(), f"{CONFIG_FILE}: no such file"),
    (lambda folder: (folder / WEIGHTS_FILE).rename(folder / "a.pkl"), "a.pkl: pickled weights are refused"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED)
def test_a_spoiled_folder_is_one_line(folder, params, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder, params)
    assert "\n" not in str(caught.value)


def test_another_model_s_shapes_and_fingerprint(folder, params):
    cases = [
        (lambda k: jnp.ones((k.shape[0], k.shape[1] + 8, k.shape[2])), r"is \[4, .*need \[4, .*another model"),
        (lambda k: k[:2], r"layers\.2\..* is no LoRA matrix .*another model"),
        (lambda k: jnp.ones((4, *k.shape[1:])), r"lacks .*layers\.3"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            load_adapter(folder, jax.tree.map(change, params))
    load_adapter(folder, params, fingerprint="aaaa")
    with pytest.raises(UserError, match=r"base aaaa, but this base is bbbb"):
        load_adapter(folder, params, fingerprint="bbbb")


def test_where_the_config_has_an_expression_the_tensors_say_what_is_adapted(folder, params):
    edit_config(folder, target_modules=".*")
    edit_tensors(folder / WEIGHTS_FILE, lambda tensors: [tensors.pop(KEY.format(1, half)) for half in "AB"])
    adapter = load_adapter(folder, params)
    assert [bool(layer.any()) for layer in adapter.weights["layers/attn/q"]["b"]] == [True, False, True]
    edit_tensors(folder / WEIGHTS_FILE, dict.clear)
    with pytest.raises(UserError, match="holds no matrices"):
        load_adapter(folder, params)


def test_a_path_that_is_no_adapter_s_folder_and_targets_that_no_model_has(folder, params, caplog):
    """With such targets PEFT goes on, and writes them again."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    edit_config(folder, target_modules=[*config["target_modules"], "lm_head", "attn.k_proj"])
    load_adapter(folder, params)
    assert "no layer of this model has its targets attn.k_proj, lm_head" in caplog.text
    (folder / "adapter.bin").touch()
    for name, message in (("adapter.bin", "pickled"), ("nothing", "no adapter"), (WEIGHTS_FILE, "no adapter")):
        with pytest.raises(UserError, match=message):
            load_adapter(folder / name, params)
