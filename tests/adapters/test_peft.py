"""Adapter folders against peft itself."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tampering import edit_json, edit_tensors

from br_jax.adapters import lora
from br_jax.adapters.peft import CONFIG_FILE, MODULES, WEIGHTS_FILE, load_adapter, read_provenance, save_adapter
from br_jax.core.errors import UserError

# peft asks transformers by a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
ALL = tuple(path.rsplit("/", 1)[-1] for path in MODULES)


@pytest.fixture
def llama(make_family):
    """A random Llama with unlike widths, so that no transposition goes unseen."""
    return make_family("llama")[0]


def params_of(model):
    """Our tree of kernels from a torch model's state."""
    state = {name: tensor.detach().float().numpy() for name, tensor in model.state_dict().items()}
    params = {"layers": {"attn": {}, "mlp": {}}}
    for path, module in MODULES.items():
        _, part, name = path.split("/")
        layers = [state[f"model.layers.{i}.{module}.weight"].T for i in range(model.config.num_hidden_layers)]
        params["layers"][part][name] = {"kernel": jnp.asarray(np.stack(layers))}
    return params


def assert_same_weights(found, expected):
    # 1e-5: two f32 matrix products of rank 4 to 16, added to weights of the same size, in different orders
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-5), found, expected)


def merged_by_peft(model, folder):
    import peft

    return params_of(peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).merge_and_unload())


@pytest.mark.parametrize("alpha", [6.0, 0.1])
def test_peft_loads_our_folder(tmp_path, llama, trained, alpha):
    params = params_of(llama)
    one = trained(params, alpha=alpha, targets=ALL)
    unequal = lora.stack([trained(params, rank=3, alpha=alpha), trained(params, rank=5, targets=("q", "o"), seed=1)])
    for name, adapter in {"one": one, "unequal ranks": unequal}.items():
        save_adapter(tmp_path / name, adapter, base_name="tiny")
        assert_same_weights(merged_by_peft(llama, tmp_path / name), lora.fold(params, adapter))


def test_bf16_weights_are_read_as_f32(tmp_path, llama, made_by_peft):
    import torch

    before = params_of(llama)
    adapted = made_by_peft(llama, tmp_path, target_modules=["q_proj", "o_proj", "down_proj"])
    for name, weight in adapted.named_parameters():
        weight.data = weight.data.to(torch.bfloat16) if "lora_" in name else weight.data
    adapted.save_pretrained(str(tmp_path))
    adapter = load_adapter(tmp_path, before, fingerprint="abc", role="user")
    assert adapter.roles == ("user",) and [*adapter.weights] == ["layers/attn/o", "layers/attn/q", "layers/mlp/down"]
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    assert_same_weights(lora.fold(before, adapter), params_of(adapted.float().merge_and_unload()))


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {".*down_proj": 7, "layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 9},
            "alpha_pattern": {".*[01].mlp.down_proj": 20, "k_proj": 0, "layers.1.self_attn.q_proj": 1.5},
            "use_rslora": True,
        },
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 0, "alpha_pattern": {"layers.2.self_attn.q_proj": 5}},
        {"target_modules": r"model\.layers\.\d\.(self_attn\.[qo]|mlp\.up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp.*|.*k_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["self_attn.v_proj", "model.layers.0.mlp.up_proj"], "init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_we_load_every_form_of_peft_s_plain_lora(tmp_path, llama, made_by_peft, settings):
    before = params_of(llama)
    adapted = made_by_peft(llama, tmp_path / "theirs", **settings)
    expected = params_of(adapted.merge_and_unload())
    adapter = load_adapter(tmp_path / "theirs", before, role="user")
    assert_same_weights(lora.fold(before, adapter), expected)
    # written again it is uniform, and PEFT merges it to the same
    save_adapter(tmp_path / "ours", adapter, base_name="tiny")
    config = json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    assert_same_weights(merged_by_peft(llama, tmp_path / "ours"), expected)


def test_targets_that_the_config_does_not_spell_out(tmp_path, llama, made_by_peft):
    before = params_of(llama)
    expected = params_of(made_by_peft(llama, tmp_path, target_modules="all-linear").merge_and_unload())
    for targets in ("all-linear", None):  # PEFT spells them out
        edit_json(tmp_path / CONFIG_FILE, lambda config, targets=targets: config.update(target_modules=targets))
        assert_same_weights(lora.fold(before, load_adapter(tmp_path, before)), expected)
    edit_tensors(tmp_path / WEIGHTS_FILE, lambda tensors: tensors.pop(KEY.format(2, "A")))
    with pytest.raises(UserError, match=r"lacks .*layers\.2\.self_attn\.q_proj\.lora_A"):
        load_adapter(tmp_path, before)


@pytest.mark.parametrize(("rank", "alpha"), [(3, 0.7), (4, 0.0)])
def test_round_trip_is_exact_to_the_bit(tmp_path, params, trained, rank, alpha):
    adapter = trained(params, rank, role="reinforce").replace(scale=jnp.float32(alpha / rank))
    save_adapter(tmp_path / "a", adapter, base_name="tiny", fingerprint="f00", extra={"stage": "reinforce"})
    loaded = load_adapter(tmp_path / "a", jax.eval_shape(lambda: params), fingerprint="f00")
    jax.tree.map(np.testing.assert_array_equal, loaded, adapter.replace(base="f00"))
    assert loaded.roles == ("reinforce",)
    assert read_provenance(tmp_path / "a")["extra"] == {"stage": "reinforce"}
    save_adapter(tmp_path / "b", loaded, base_name="tiny", fingerprint="f00", extra={"stage": "reinforce"})
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safe_open(tmp_path / "a" / WEIGHTS_FILE, framework="np") as file:
        # safetensors writes several in an order that differs from run to run, and the files' hashes with it
        assert list(file.metadata()) == ["br_jax"]
