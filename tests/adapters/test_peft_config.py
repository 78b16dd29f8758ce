"""adapter_config.json by peft's own functions, and every field that peft knows."""

import dataclasses
import json
import math

import pytest

from br_jax.adapters.peft_config import HARMLESS_FIELDS, KNOWN_FIELDS, REFUSED_FIELDS, read_config
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


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        {},
        {"proj": 3, "_proj": 5},  # neither is a whole part of a name
        {"layers.1.self_attn.q_proj": 3, "1.mlp.down_proj": 5},
        {".*down_proj": 3, "^model.layers.2.self_attn.q_proj": 5, "model.layers.2.self_attn.q_proj": 7},
        {".*": 3, "q_proj": 5},  # the first one counts
        {r"layers\.\d\.(mlp|self_attn)\.[dq].*": 5},
        {"mlp|self_attn.q_proj": 5},
        # as they are written for "the last layers", "all but the MLP", one pair by name, and as EVA saves them
        {r"model\.layers\.(9|1[01])\..*": 3, r"layers.[0-3]\.self_attn\..*_proj$": 5},
        {r".*\.self_attn\.(?:q|v)_proj": 3, r"^.*mlp\.\w+_proj$": 5, r"(?P<part>k|o)_proj": 7},
        {r".*layers\.([5-9]|\d{2,})\..*up_proj": 3, r"[^.]+\.o_proj": 5},
        {"model.layers.7.self_attn.k_proj": 3, "layers.7.self_attn": 5, r"\bself_attn\b.q_proj": 6, "(?i:Q_PROJ)": 7},
        {r"(a+)+": 3, r"": 4, r"\S+?\.1\.\D{3,12}": 5, "[dD]own_proj|up_proj|": 6},
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
    assert ours.scale == theirs.lora_alpha / (math.sqrt(theirs.r) if rslora else theirs.r)
    for module in MODULES:
        rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern.keys(), module), theirs.r)
        alpha = theirs.alpha_pattern.get(get_pattern_key(theirs.alpha_pattern.keys(), module), theirs.lora_alpha)
        assert ours.rank_of(module) == rank
        assert ours.scale_of(module) == alpha / (math.sqrt(rank) if rslora else rank)


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
        assert read_config(write(**{field: nothing})).rank == 8


def test_a_field_that_is_not_known_is_not_ignored(write):
    for value in (True, 1, "on", [0], {"a": 1}):
        with pytest.raises(UserError, match=r"json: the field 'use_newest' is not known.*update br_jax"):
            read_config(write(use_newest=value))
    assert read_config(write(use_newest=None, other=False, more={}, less=0)).rank == 8
    assert read_config(write(**dict.fromkeys(HARMLESS_FIELDS, "note"))).rank == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "\"peft_type\" is 'IA3'.*'LORA'"),
        ({"r": 0}, '"r" is 0.*at least 1'),
        ({"r": 10**400}, '"r" is 10000.*at least 1'),
        ({"r": True}, '"r" is True'),
        ({"lora_alpha": None}, '"lora_alpha" is None'),
        ({"lora_alpha": 1e39}, '"lora_alpha" is 1e\\+39.*finite'),
        ({"rank_pattern": {"q_proj": 0}}, "\"rank_pattern\" is {'q_proj': 0}.*at least 1"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "\"alpha_pattern\" is {'q_proj': nan}"),
        ({"rank_pattern": [4]}, '"rank_pattern" is .*object'),
        ({"rank_pattern": {"(q": 4}}, "\"rank_pattern\" holds '\\(q', no regular expression"),
        ({"bias": "lora_only"}, '"bias" is'),
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_named(write, fields, message):
    with pytest.raises(UserError, match=message) as caught:
        read_config(write(**fields))
    assert "\n" not in str(caught.value) and "adapter_config.json" in str(caught.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("expression", ["(a+)+b", "(a|a)*b", "(.*a){12}b", "(x+x+)+y"])
def test_an_expression_takes_no_longer_than_the_name(write, expression):
    """With `re` each of these takes years."""
    read = read_config(write(rank_pattern={expression: 3}))
    for letter in "ax":
        assert read.rank_of("model." + letter * 5000) == 8


# Such as RE2 does not know, reads in another way than Python, or would take much memory for.
REFUSED = [r"(q)_\1", "(?=q).*", "(?<!k)_proj", "(?>q)_proj", "q++_proj", r"q_proj\Z", "(?#note)q_proj", "\ud800"]
REFUSED += ["[[:alpha:]]_proj", "q{,3}_proj", "q{1001}", r"(?:\pL{1,9}|x){1,99}", "q" * 1001]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("expression", REFUSED)
def test_an_expression_of_another_language_is_refused(write, expression, field):
    with pytest.raises(UserError, match=f'json: "{field}" holds .*no regular expression of linear time .*again'):
        read_config(write(**{field: {"k_proj": 4, expression: 4}}))


def test_so_many_expressions(write):
    for count in (2000, 2001):
        file = write(rank_pattern={f"{i}.q_proj": 3 for i in range(count)})
        if count == 2000:
            assert read_config(file).rank_of("model.layers.7.q_proj") == 3
            continue
        with pytest.raises(UserError, match='"rank_pattern" has 2,001 expressions, 2,000 are the most'):
            read_config(file)
    with pytest.raises(UserError, match=r"too large, together with those before it"):
        read_config(write(rank_pattern={rf"{i}\..*_proj": 3 for i in range(2000)}))


def test_a_file_that_is_no_config(tmp_path):
    for content in (b"{", b"[]", b"\xff", b"[" * 200_000):
        (tmp_path / "adapter_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_config\.json: .*save the adapter again|not UTF-8"):
            read_config(tmp_path / "adapter_config.json")
