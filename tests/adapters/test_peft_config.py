"""adapter_config.json by peft's own functions, and every field that peft knows."""

import dataclasses
import json
import math

import pytest

from br_jax.adapters.peft import (
    HARMLESS_FIELDS,
    KNOWN_FIELDS,
    REFUSED_FIELDS,
    by_pattern,
    is_adapted,
    read_config,
)
from br_jax.core.errors import UserError

PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
# twelve layers: 1 is the start of 11, and the end of it
MODULES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in PROJECTIONS]
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.fixture
def write(tmp_path):
    """write(**fields) -> the path of a config that is plain LoRA but for these."""

    def write(**fields):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, **fields}))
        return tmp_path / "adapter_config.json"

    return write


@pytest.mark.parametrize(
    ("pattern", "rslora"),
    [
        ({}, True),
        ({"proj": 3, "layers.1.self_attn.q_proj": 3, "1.mlp.down_proj": 5, "layers.7.self_attn": 4}, True),
        ({".*down_proj": 3, "^model.layers.2.self_attn.q_proj": 5, ".*": 7, "q_proj": 9}, False),  # the first counts
        ({r"layers\.\d\.mlp.[dq].*": 5, r"^layers.1.mlp.up_proj": 3, "": 9, ".*[0-3].mlp.u._proj$": 6}, True),
    ],
    ids=str,
)
def test_ranks_and_scales_are_those_that_peft_matches(tmp_path, pattern, rslora):
    LoraConfig = pytest.importorskip("peft").LoraConfig
    from peft.utils.other import get_pattern_key

    alphas = {key: 1.5 * value for key, value in reversed(pattern.items())}
    settings = {"target_modules": ["q_proj"], "rank_pattern": pattern, "alpha_pattern": alphas, "use_rslora": rslora}
    LoraConfig(**settings).save_pretrained(str(tmp_path))
    ours, theirs = read_config(tmp_path / "adapter_config.json"), LoraConfig.from_pretrained(str(tmp_path))
    for module in MODULES:
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert by_pattern(ours, "rank_pattern", module, ours["r"]) == rank
        assert by_pattern(ours, "alpha_pattern", module, ours["lora_alpha"]) == alpha


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"], "layers_to_transform": [0, 11]},
        {"target_modules": ["5.mlp.down_proj", "proj"], "layers_to_transform": []},
    ],
    ids=str,
)
def test_modules_are_those_that_peft_adapts(tmp_path, settings):
    LoraConfig = pytest.importorskip("peft").LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    LoraConfig(**settings).save_pretrained(str(tmp_path))
    ours, theirs = read_config(tmp_path / "adapter_config.json"), LoraConfig.from_pretrained(str(tmp_path))
    adapted = [module for module in MODULES if check_target_module_exists(theirs, module)]
    assert [module for module in MODULES if is_adapted(ours, module)] == adapted != []


def test_every_field_of_peft_has_one_meaning():
    peft = pytest.importorskip("peft")
    assert len(KNOWN_FIELDS) == len(set(KNOWN_FIELDS))
    assert set(KNOWN_FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_is_more_than_plain_lora_is_refused(write, field):
    for value in (True, {"some": 1}, {}):
        with pytest.raises(UserError, match=f'adapter_config.json: "{field}" is .*must be unset.*as plain LoRA'):
            read_config(write(**{field: value}))
    for nothing in (None, False, []):
        assert read_config(write(**{field: nothing}))["r"] == 8


def test_a_field_that_is_not_known_is_not_ignored(write):
    for value in (True, 1, "on", [0], {"a": 1}):
        with pytest.raises(UserError, match=r"json: the field 'use_newest' is not known.*update br_jax"):
            read_config(write(use_newest=value))
    assert read_config(write(use_newest=None, other=False, more={}, less=0))["r"] == 8
    assert read_config(write(**dict.fromkeys(HARMLESS_FIELDS, "note")))["r"] == 8


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


# Python's `re` may take years for the first ones; ranks are in the tensors' shapes, whatever is said of them
@pytest.mark.parametrize(
    "expression", ["(a+)+b", "(.*a){12}b", "mlp|attn", r"(q)_\1", "q++_proj", "[^q]_proj", "\ud800"]
)
def test_other_expressions_are_refused_where_they_count(write, expression):
    read = read_config(write(rank_pattern={"k_proj": 4, expression: 3}))
    assert by_pattern(read, "rank_pattern", "model.layers.0.self_attn.k_proj", 8) == 4
    assert by_pattern(read, "rank_pattern", "model.layers.0.self_attn.q_proj", 8) is None
    with pytest.raises(UserError, match=r'json: "alpha_pattern" holds .*more than names.*list the modules by name'):
        read_config(write(alpha_pattern={"k_proj": 4, expression: 4}))


def test_so_many_patterns(write):
    read = read_config(write(rank_pattern={f"{i}.q_proj": 3 for i in range(2000)}))
    assert by_pattern(read, "rank_pattern", "layers.7.q_proj", 8) == 3
    with pytest.raises(UserError, match="at most 2,000"):
        read_config(write(alpha_pattern={f"{i}.q_proj": 3 for i in range(2001)}))


def test_a_file_that_is_no_config(tmp_path):
    for content in (b"{", b"[]", b"\xff", b"[" * 200_000):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_config\.json: .*save the adapter again|not UTF-8"):
            read_config(tmp_path / "adapter_config.json")
