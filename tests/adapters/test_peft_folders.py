"""Everything that a bad adapter folder or disk can do."""

import errno
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

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from br_jax.errors import UserError

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("existing", [False, True])
def test_a_buffer_stays_in_the_provider_s_private_folder(tmp_path, params, trained, existing):
    buffer = trained(params, role="buffer")
    for adapter in (buffer, lora.stack([trained(params), buffer])):
        with pytest.raises(UserError, match=r"buffer.*detach"):
            save_adapter(tmp_path / "out", adapter, base_name="tiny")
    assert not (tmp_path / "out").exists()
    folder = tmp_path / "provider" / "buffer"
    if existing:
        folder.mkdir(parents=True, mode=0o755)
    save_adapter(folder, buffer, base_name="tiny", provider=True)
    assert mode(folder) == 0o700 and {mode(file) for file in folder.iterdir()} == {0o600}
    assert load_adapter(folder, params).roles == ("buffer",)


def test_an_ordinary_folder_follows_the_umask(tmp_path, params, trained):
    old = os.umask(0o027)
    try:
        save_adapter(tmp_path / "out", trained(params), base_name="tiny")
    finally:
        os.umask(old)
    assert mode(tmp_path / "out") == 0o750 and mode(tmp_path / "out" / WEIGHTS_FILE) == 0o640


def test_other_files_of_a_folder_stay(tmp_path, params, trained):
    folder = tmp_path / "user"
    save_adapter(folder, trained(params, rank=2), base_name="tiny")
    (folder / "metrics.jsonl").write_text("{}\n")
    newer = trained(params, rank=5, seed=1)
    save_adapter(folder, newer, base_name="tiny")
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "metrics.jsonl"]
    jax.tree.map(np.testing.assert_array_equal, load_adapter(folder, params), newer)


def snapshot(root):
    return {path.relative_to(root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_behind(tmp_path, params, trained, monkeypatch, existing):
    if existing:
        save_adapter(tmp_path / "user", trained(params), base_name="tiny")
    before = snapshot(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"user: cannot write the adapter.*No space left on device.*free space"):
        save_adapter(tmp_path / "user", trained(params, seed=1), base_name="tiny")
    assert snapshot(tmp_path) == before


def test_a_write_that_the_system_cuts_short_leaves_nothing_behind(tmp_path, params, trained):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write the adapter"):
            save_adapter(tmp_path / "user", trained(params), base_name="tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_crash_between_the_files_leaves_no_mixed_pair(tmp_path, params, trained, monkeypatch):
    save_adapter(tmp_path / "user", trained(params), base_name="tiny")
    real = os.replace

    def crash(source, target):
        if str(target).endswith(WEIGHTS_FILE):
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


def test_an_unwritable_place_is_one_line(tmp_path, params, trained):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "user"):
        with pytest.raises(UserError, match=r"cannot write the adapter"):
            save_adapter(folder, trained(params), base_name="tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_save_refuses_what_no_reader_could_use(tmp_path, params, trained):
    good = trained(params)
    broken = good.replace(
        weights={
            **good.weights,
            "layers/attn/q": {"a": jnp.full((3, 24, 4), jnp.nan), "b": jnp.ones((3, 4, 32))},
        }
    )
    cases = [(broken, "layers/attn/q/a.*NaN"), (Adapter({}, jnp.float32(1), ("user",)), "no matrices")]
    cases.append((good.replace(weights={"layers/conv/w": good.weights["layers/attn/q"]}), "layers/conv/w.*no name"))
    for adapter, message in cases:
        with pytest.raises(UserError, match=message):
            save_adapter(tmp_path / "user", adapter, base_name="tiny")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path, params, trained):
    save_adapter(tmp_path / "user", trained(params), base_name="tiny", fingerprint="aaaa")
    return tmp_path / "user"


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def edit_config(folder, **fields):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **fields}))


def with_nan(tensors):
    tensors[KEY.format(1, "B")] = np.full((32, 4), np.nan, np.float32)


def whole_numbers(tensors):
    tensors[KEY.format(1, "B")] = np.ones((32, 4), np.int32)


def beyond_f32(tensors):
    tensors[KEY.format(1, "B")] = np.full((32, 4), 1e300)


def float8(tensors):
    tensors[KEY.format(1, "B")] = np.ones((32, 4), ml_dtypes.float8_e4m3fn)


def narrow_half(tensors):
    tensors[KEY.format(1, "B")] = np.full((32, 4), np.inf, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_nan, r"layers\.1\.self_attn\.q_proj\.lora_B\.weight holds NaN"),
        (narrow_half, r"layers\.1\.self_attn\.q_proj\.lora_B\.weight holds NaN or infinity"),
        (beyond_f32, r"layers\.1\.self_attn\.q_proj\.lora_B\.weight holds NaN or infinity"),
        (float8, r"lora_B\.weight is F8_E4M3, but .*F32"),
        (whole_numbers, r"lora_B\.weight is I32, but .*F32"),
        (lambda t: t.pop(KEY.format(2, "A")), r"lacks .*layers\.2\.self_attn\.q_proj\.lora_A.*1 missing"),
        (
            lambda t: t.update({KEY.format(3, "A"): t[KEY.format(2, "A")]}),
            r"layers\.3\..*beyond this model's 3 layers",
        ),
        (lambda t: t.update({KEY.format(0, "A"): t[KEY.format(0, "A")][:3]}), r"\[3, 24\].*r=4.*\[4, 24\]"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[KEY.format(0, "A")]}),
            "lm_head.*no LoRA matrix",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[KEY.format(0, "A")]}),
            "embed_tokens.lora_embedding_A.*no LoRA matrix",
        ),
        (lambda t: t.update({KEY.format("9" * 5000, "A"): t[KEY.format(0, "A")]}), "99.*no LoRA matrix"),
        (lambda t: t.update({KEY.format("00", "A"): t[KEY.format(0, "A")]}), r"layers\.00\..*not adapt"),
        (lambda t: t.update({KEY.format("0", "A") + "\n": t[KEY.format(0, "A")]}), r"weight\\n' is no LoRA matrix"),
        (
            lambda t: t.update({KEY.format(0, "magnitude"): t[KEY.format(0, "A")]}),
            "lora_magnitude.*no LoRA matrix",
        ),
        (lambda t: t.clear(), "holds no matrices"),
    ],
)
def test_bad_tensors_are_named(folder, params, change, message):
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder, params)
    assert "\n" not in str(caught.value)


def test_another_model_s_shapes(folder, params):
    wider = jax.tree.map(lambda k: jnp.ones((k.shape[0], k.shape[1] + 8, k.shape[2])), params)
    with pytest.raises(UserError, match=r"lora_A.weight is \[4, .*need \[4, .*another model"):
        load_adapter(folder, wider)
    fewer = jax.tree.map(lambda k: k[:2], params)
    with pytest.raises(UserError, match=r"beyond this model's 2 layers"):
        load_adapter(folder, fewer)
    more = jax.tree.map(lambda k: jnp.ones((4, *k.shape[1:])), params)
    with pytest.raises(UserError, match=r"lacks .*layers\.3"):
        load_adapter(folder, more)


def test_another_base_s_fingerprint(folder, params):
    load_adapter(folder, params)
    load_adapter(folder, params, fingerprint="aaaa")
    with pytest.raises(UserError, match=r"base aaaa, but this base is bbbb"):
        load_adapter(folder, params, fingerprint="bbbb")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("peft_type", "IA3"),
        ("r", 0),
        ("r", "4"),
        ("r", 2.5),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
    ],
)
def test_configs_that_mean_something_else_are_refused_by_name(folder, params, field, value):
    edit_config(folder, **{field: value})
    with pytest.raises(UserError, match=f"{CONFIG_FILE}.*{field}"):
        load_adapter(folder, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers_to_transform": [0, 2]}, r"layers\.1\.\S+' is of a module that .*json does not adapt"),
        ({"target_modules": ["q_proj"]}, r"(down|gate|up|v)_proj\S+' is of a module that .*json does not adapt"),
        ({"exclude_modules": ["v_proj"]}, r"v_proj\S+' is of a module that .*json does not adapt"),
        ({"target_modules": ["q_proj", "lm_head"]}, r"takes in lm_head"),
        ({"target_modules": "all-linear"}, r"lacks .*k_proj.*12 missing"),
        ({"target_modules": None, "exclude_modules": ["q_proj"]}, r"q_proj\S+' is of a module that"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 8}}, r"layers\.1\.self_attn\.q_proj\S+ is .*r=8 in"),
        ({"rank_pattern": {"q_proj": 10**12}}, r"q_proj\S+ is .*r=1000000000000 in"),
        ({"target_modules": ["c_attn"]}, r"no module of this model is adapted"),
    ],
    ids=str,
)
def test_a_config_and_tensors_that_disagree(folder, params, fields, message):
    edit_config(folder, **fields)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder, params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_config(folder, params, text):
    (folder / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_adapter(folder, params)


def test_missing_files(folder, params):
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=f"{CONFIG_FILE}: cannot be read"):
        load_adapter(folder, params)
    for nowhere in (folder / "nothing", folder / WEIGHTS_FILE):
        with pytest.raises(UserError, match=r"no adapter there.*give the folder"):
            load_adapter(nowhere, params)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_truncated_weights(folder, params, keep):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:keep])
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE}: not a whole safetensors file"):
        load_adapter(folder, params)


@pytest.mark.parametrize("length", [0, 10**5, 10**8, 2**60, 2**64 - 1])
def test_a_header_of_a_length_that_is_not_there(folder, params, length):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(length.to_bytes(8, "little") + data[8:])
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE}: not a whole safetensors file") as caught:
        load_adapter(folder, params)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "adapter.pkl"])
def test_pickles_are_refused_unopened(folder, params, name):
    (folder / WEIGHTS_FILE).rename(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(UserError, match=f"{name}: pickled weights are refused"):
            load_adapter(path, params)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"roles": "buffer"}', "damaged"),
        ('{"format_version": 2}', "format 2.*update"),
    ],
)
def test_headers_that_cannot_be_read(folder, params, header, message):
    save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, metadata={"br_jax": header})
    with pytest.raises(UserError, match=message):
        load_adapter(folder, params)
