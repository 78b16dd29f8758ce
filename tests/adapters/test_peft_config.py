"""adapter_config.json by peft's own functions, and every field that peft knows."""

import dataclasses
import json
import math
import re

import pytest

from br_jax.adapters.peft_config import (
    HARMLESS_FIELDS,
    READ_FIELDS,
    REFUSED_FIELDS,
    adapted_modules,
    read_config,
)
from br_jax.errors import UserError

PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
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


def saved_by_peft(folder, **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **settings})
    config.save_pretrained(str(folder))
    return config, read_config(folder / "adapter_config.json")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "mlp.up_proj", "proj", "attn.k_proj"]},
        {"target_modules": ["1.self_attn.q_proj", "layers.11.mlp.down_proj", "model.layers.3.mlp.up_proj"]},
        {"target_modules": r".*\.1\..*_proj"},
        {"target_modules": "q_proj"},  # an expression is for the whole name
        {"target_modules": r"model\.layers\.1"},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": r".*(embed_tokens|lm_head)"},
        {"exclude_modules": ["layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"]},
        {"exclude_modules": r"model\.layers\.[0-3]\.self.*"},
        {"exclude_modules": "q_proj"},
        {"exclude_modules": r"model\.layers"},
        {"target_modules": r".*_proj", "exclude_modules": ["q_proj"]},
        {"layers_to_transform": 0},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1, 4, 40]},
        {"layers_to_transform": []},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["h", "l.*s"]},
        {"layers_to_transform": [1], "layers_pattern": "h"},
        {"layers_to_transform": [1], "layers_pattern": []},
        # layers do not limit a full name
        {"layers_to_transform": [1], "target_modules": ["model.layers.7.mlp.up_proj", "lm_head", "q_proj"]},
    ],
    ids=str,
)
def test_modules_are_those_that_peft_matches(tmp_path, settings):
    theirs, ours = saved_by_peft(tmp_path, **settings)
    from peft.tuners.tuners_utils import check_target_module_exists

    for module in [*MODULES, "model.embed_tokens", "lm_head", "model.norm", "model.layers.1.mlp"]:
        assert ours.adapts(module) == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        {},
        {"q_proj": 3},
        {"proj": 3, "_proj": 5},  # neither is a whole part of a name
        {"layers.1.self_attn.q_proj": 3, "1.mlp.down_proj": 5},
        {".*down_proj": 3, "^model.layers.2.self_attn.q_proj": 5, "model.layers.2.self_attn.q_proj": 7},
        {".*": 3, "q_proj": 5},  # the first one counts
        {r"layers\.\d\.(mlp|self_attn)\.[dq].*": 5},
        {"mlp|self_attn.q_proj": 5},
    ],
    ids=str,
)
def test_ranks_and_scales_are_those_that_peft_matches(tmp_path, pattern, rslora):
    alphas = {key: 1.5 * value for key, value in reversed(pattern.items())}
    _, ours = saved_by_peft(tmp_path, rank_pattern=pattern, alpha_pattern=alphas, use_rslora=rslora)
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    theirs = LoraConfig.from_pretrained(str(tmp_path))
    for module in MODULES:
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert ours.rank_of(module) == rank
        assert ours.scale_of(module) == alpha / (math.sqrt(rank) if rslora else rank)


def test_every_field_of_peft_has_one_meaning():
    peft = pytest.importorskip("peft")
    ours = [*READ_FIELDS, *REFUSED_FIELDS, *HARMLESS_FIELDS]
    assert len(ours) == len(set(ours))
    assert set(ours) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_every_other_kind_of_adapter_is_refused_by_name(write):
    peft = pytest.importorskip("peft")
    for kind in [*(str(kind.value) for kind in peft.PeftType), None]:
        if kind != "LORA":
            with pytest.raises(UserError, match=rf'"peft_type" is {kind!r}.*retrain as plain LoRA'):
                read_config(write(peft_type=kind))


@pytest.mark.parametrize("field", REFUSED_FIELDS)
def test_what_is_more_than_plain_lora_is_refused(write, field):
    for value in (True, {"some": 1}, {}):
        with pytest.raises(UserError, match=f'adapter_config.json: "{field}" is .*retrain'):
            read_config(write(**{field: value}))
    for nothing in (None, False, []):
        assert read_config(write(**{field: nothing})).rank == 8


def test_notes_are_read_over(write):
    assert read_config(write(**dict.fromkeys(HARMLESS_FIELDS, "note"))).rank == 8


def test_a_field_that_is_not_known_is_not_ignored(write):
    for value in (True, 1, "on", [0], {"a": 1}):
        with pytest.raises(UserError, match=r"json: the field 'use_newest' is not known.*update br_jax") as caught:
            read_config(write(use_newest=value))
        assert "\n" not in str(caught.value)
    assert read_config(write(use_newest=None, other=False, more={}, less=0)).rank == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, '"r" is 0.*at least 1'),
        ({"r": 10**400}, '"r" is 10000.*at least 1'),
        ({"r": True}, '"r" is True'),
        ({"lora_alpha": 1e39}, '"lora_alpha" is 1e\\+39.*finite'),
        ({"lora_alpha": math.inf}, '"lora_alpha" is inf'),
        ({"rank_pattern": {"q_proj": 0}}, r'"rank_pattern\[\'q_proj\'\]" is 0.*at least 1'),
        ({"rank_pattern": {"q_proj": 2.5}}, r'"rank_pattern\[\'q_proj\'\]" is 2.5'),
        ({"alpha_pattern": {"q_proj": "4"}}, r'"alpha_pattern\[\'q_proj\'\]" is \'4\'.*finite'),
        ({"alpha_pattern": {"q_proj": math.nan}}, r'"alpha_pattern\[\'q_proj\'\]" is nan'),
        ({"rank_pattern": [4]}, '"rank_pattern" is .*object'),
        ({"rank_pattern": {"(q": 4}}, r"\"rank_pattern\" holds '\(q', which is no regular expression"),
        ({"target_modules": "(q"}, r"\"target_modules\" holds '\(q', which is no regular expression"),
        ({"exclude_modules": "*q"}, r"\"exclude_modules\" holds '\*q', which is no regular expression"),
        ({"target_modules": {"q_proj": 1}}, '"target_modules" is .*list of names'),
        ({"target_modules": [1]}, '"target_modules" is .*list of names'),
        ({"layers_to_transform": "1"}, '"layers_to_transform" is .*layer numbers'),
        ({"layers_to_transform": [0.5]}, '"layers_to_transform" is .*layer numbers'),
        ({"layers_to_transform": [1], "layers_pattern": 3}, '"layers_pattern" is 3'),
        ({"layers_to_transform": [1], "layers_pattern": "("}, r"\"layers_pattern\" holds"),
        ({"layers_pattern": "layers"}, '"layers_pattern" needs "layers_to_transform"'),
        ({"layers_to_transform": 0, "target_modules": ".*q_proj"}, '"layers_to_transform" needs "target_modules"'),
        ({"bias": "lora_only"}, '"bias" is'),
        ({"init_lora_weights": "loftq"}, '"init_lora_weights" is'),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_named(write, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        read_config(write(**fields))
    assert "\n" not in str(caught.value) and "adapter_config.json" in str(caught.value)


def test_a_nest_that_no_parser_can_follow(tmp_path):
    (tmp_path / "adapter_config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"not valid JSON"):
        read_config(tmp_path / "adapter_config.json")


def test_all_linear_modules_are_those_of_the_layers(write):
    for name in ("all-linear", "All-Linear"):
        assert adapted_modules(read_config(write(target_modules=name)), MODULES) == MODULES


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (["q_proj", "lm_head"], "lm_head"),
        (["q_proj", "embed_tokens"], "model.embed_tokens"),
        (r".*(q_proj|lm_head)", "lm_head"),
        (r".*", "model.embed_tokens"),
    ],
)
def test_the_embedding_and_the_head_are_refused_by_name(write, targets, name):
    with pytest.raises(UserError, match=rf'"target_modules" takes in {re.escape(name)}.*retrain without'):
        adapted_modules(read_config(write(target_modules=targets)), MODULES)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": []},
        {"target_modules": ["c_attn"]},
        {"target_modules": ".*query"},
        {"layers_to_transform": [12]},
        {"exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_a_config_that_adapts_nothing_of_this_model(write, fields):
    with pytest.raises(UserError, match=r"no module of this model is adapted.*another model"):
        adapted_modules(read_config(write(**fields)), MODULES)
