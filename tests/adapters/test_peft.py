"""Adapter folders and adapter_config.json against peft itself."""

import copy
import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tampering import edit_json, edit_tensors

from br_jax.adapters import lora
from br_jax.adapters.peft import (
    CONFIG_FILE,
    HARMLESS_FIELDS,
    KNOWN_FIELDS,
    MODULES,
    REFUSED_FIELDS,
    WEIGHTS_FILE,
    by_pattern,
    is_adapted,
    load_adapter,
    read_config,
    read_provenance,
    save_adapter,
)
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


PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# twelve layers: 1 is the start of 11, and the end of it
NAMES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in PROJECTIONS]
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.fixture
def write(tmp_path):
    """write(**fields) -> the path of a config that is plain LoRA but for these."""

    def write(**fields):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **fields}))
        return tmp_path / "adapter_config.json"

    return write


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "\"peft_type\" is 'IA3'.*'LORA'"),
        ({"r": 0}, '"r" is 0.*at least 1'),
        ({"r": 10**400}, '"r" is 10000.*at least 1'),
        ({"r": True}, '"r" is True'),
        ({"lora_alpha": 1e39}, '"lora_alpha" is 1e\\+39.*finite'),
        ({"rank_pattern": {"q_proj": 0}}, "\"rank_pattern\" is {'q_proj': 0}.*at least 1"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "\"alpha_pattern\" is {'q_proj': nan}"),
        ({"rank_pattern": [4]}, '"rank_pattern" is .*object'),
        ({"layers_to_transform": [-1]}, '"layers_to_transform" is .-1., but must be'),
        ({"bias": "lora_only"}, '"bias" is'),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_named(write, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        read_config(write(**fields))
    assert "\n" not in str(caught.value) and "adapter_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ({}, {"use_rslora": True, "target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [0, 11]}),
        (
            {"proj": 3, "layers.1.self_attn.q_proj": 3, "1.mlp.down_proj": 5, "layers.7.self_attn": 4},
            {"target_modules": ["5.mlp.down_proj", "proj"], "layers_to_transform": []},
        ),
        # the first counts
        ({".*down_proj": 3, "^model.layers.2.self_attn.q_proj": 5, ".*": 7, "q_proj": 9}, {}),
        ({r"layers\.\d\.mlp.[dq].*": 5, r"^layers.1.mlp.up_proj": 3, "": 9, ".*[0-3].mlp.u._proj$": 6}, {}),
    ],
    ids=str,
)
def test_modules_ranks_and_alphas_are_those_that_peft_matches(tmp_path, pattern, settings):
    LoraConfig = pytest.importorskip("peft").LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    alphas = {key: 1.5 * value for key, value in reversed(pattern.items())}
    settings = {"target_modules": ["q_proj"], "rank_pattern": pattern, "alpha_pattern": alphas} | settings
    LoraConfig(**settings).save_pretrained(str(tmp_path))
    ours, theirs = read_config(tmp_path / CONFIG_FILE), LoraConfig.from_pretrained(str(tmp_path))
    for module in NAMES:
        assert is_adapted(ours, module) == bool(check_target_module_exists(theirs, module))
        for field, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            held = getattr(theirs, field)
            expected = held.get(get_pattern_key(held.keys(), module), getattr(theirs, default))
            assert by_pattern(ours, field, module, ours[default]) == expected


def test_every_field_of_peft_has_one_meaning_and_no_other_is_ignored(write):
    peft = pytest.importorskip("peft")
    assert sorted(KNOWN_FIELDS) == sorted(field.name for field in dataclasses.fields(peft.LoraConfig))
    for field, value in itertools.product(REFUSED_FIELDS, (True, {"some": 1}, {})):
        with pytest.raises(UserError, match=f'adapter_config.json: "{field}" is .*must be unset.*as plain LoRA'):
            read_config(write(**{field: value}))
    for value in (True, 1, "on", [0], {"a": 1}):
        with pytest.raises(UserError, match=r"json: the field 'use_newest' is not known.*update br_jax"):
            read_config(write(use_newest=value))
    for nothing in (None, False, []):
        assert read_config(write(**dict.fromkeys(REFUSED_FIELDS, nothing)))["r"] == 8
    assert read_config(write(use_newest=None, other=False, more={}, less=0))["r"] == 8
    assert read_config(write(**dict.fromkeys(HARMLESS_FIELDS, "note")))["r"] == 8


# Python's `re` may take years for the first ones; ranks are in the tensors' shapes, whatever is said of them.
def test_other_expressions_are_refused_where_they_count(write):
    q, k = (f"model.layers.7.self_attn.{name}_proj" for name in "qk")
    for other in ("(a+)+b", "(.*a){12}b", "mlp|attn", r"(q)_\1", "q++_proj", "[^q]_proj", "\ud800"):
        read = read_config(write(rank_pattern={"k_proj": 4, other: 3}))
        assert [by_pattern(read, "rank_pattern", module, 8) for module in (k, q)] == [4, None]
        with pytest.raises(UserError, match=r'json: "alpha_pattern" holds .*more than names.*list the modules by name'):
            read_config(write(alpha_pattern={"k_proj": 4, other: 4}))
    many = {f"{i}.self_attn.q_proj": 3 for i in range(2001)}
    with pytest.raises(UserError, match="at most 2,000"):
        read_config(write(alpha_pattern=many))
    many.popitem()
    assert by_pattern(read_config(write(rank_pattern=many)), "rank_pattern", q, 8) == 3
