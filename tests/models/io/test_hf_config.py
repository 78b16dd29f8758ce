"""config.json, field by field: what transformers' class of a family makes of each is what ours does, or an error."""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import tempfile

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.models.decoder import Decoder, init_cache, unembed
from br_jax.models.io.hf import Stored, load_params, tensor_names
from br_jax.models.io.hf_config import EVERY, FAMILIES, HARMLESS, ONLY, READ, SAME, read_config, write_config
from br_jax.models.spec import ModelSpec

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig  # noqa: E402

torch.set_num_threads(1)  # several wait for each other longer than so small a model takes

BASE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "rope_theta": 500.0, "rms_norm_eps": 1e-2, "tie_word_embeddings": False,
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 50,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 61, (1, 12))
ABSENT = "<absent>"  # in place of a value: the file does not say
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
UNSAID = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
WINDOW = {"use_sliding_window": True, "sliding_window": 3}
MIXED = ["full_attention", "sliding_attention"]
# Each begins with the field in question. Its values matter wherever it is read, as a test below makes sure.
CHANGES = [
    {"vocab_size": 67},
    {"hidden_size": 40, "head_dim": ABSENT},
    {"intermediate_size": 14},
    {"num_hidden_layers": 1},
    {"num_attention_heads": 2},
    *({"num_key_value_heads": heads} for heads in (4, None, 3, 0)),
    *({"head_dim": width} for width in (6, None)),
    {"hidden_act": "gelu_pytorch_tanh"},
    *({"hidden_activation": name} for name in ("silu", None)),
    {"max_position_embeddings": 16, "rope_scaling": UNSAID},
    *({"rms_norm_eps": value} for value in (0.5, ABSENT)),
    *({"tie_word_embeddings": value} for value in (True, ABSENT)),
    *({"rope_theta": value} for value in (7.0, ABSENT)),
    *({"rope_parameters": rope} for rope in ({"rope_type": "default", "rope_theta": 7.0}, LLAMA3)),
    *({"rope_scaling": rope} for rope in (LLAMA3, {"type": "llama3", "rope_theta": 7.0} | LLAMA3)),
    {"attention_bias": True},
    {"mlp_bias": True},
    {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 0},
    *({"sliding_window": window} for window in (3, None)),
    {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    {"max_window_layers": -5, **WINDOW},
    *({"layer_types": MIXED, "sliding_window": window} for window in (3, None)),
    *({"layer_types": types, **WINDOW} for types in (MIXED, ["chunked_attention", MIXED[1]], None)),
    *({"query_pre_attn_scalar": value} for value in (2, 0)),
    {"attn_logit_softcapping": 0.2},
    *({"final_logit_softcapping": value} for value in (0.2, ABSENT)),
    {"use_bidirectional_attention": False},
    {"attention_dropout": 0.0},
    {"is_causal": True},
]
# None of these moves a logit.
UNSEEN = {
    "initializer_range": 0.5, "use_cache": False, "pad_token_id": 5, "bos_token_id": 3, "eos_token_id": [3, 4],
    "torch_dtype": "float16", "dtype": "bfloat16", "pretraining_tp": 2, "cache_implementation": "hybrid",
    "architectures": ["Other"], "transformers_version": "4.0.0", "output_attentions": True,
    "output_hidden_states": True, "return_dict": True, "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0}, "num_labels": 7, "problem_type": "regression", "chunk_size_feed_forward": 2,
    "is_encoder_decoder": True, "_name_or_path": "elsewhere",
}  # fmt: skip
# What the decoder does not have is refused wherever it is read, or where br_jax does not know who reads it.
REFUSED = [
    {"hidden_act": "relu"},
    {"hidden_activation": "relu"},
    {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
    {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 7.0} for kind in MIXED}},
    *({"rope_scaling": {"type": kind, "factor": 4.0}} for kind in ("linear", "dynamic", "yarn")),
    {"partial_rotary_factor": 0.5},
    {"original_max_position_embeddings": 4, "rope_scaling": UNSAID},
    {"attention_dropout": 0.5},
    {"use_bidirectional_attention": True},
    {"is_causal": False},
    {"is_causal": None},
    {"attention_chunk_size": 3},
    {"quantization_config": {"quant_method": "awq"}},
]


def read_by(model_type):
    """The fields that we read of a family's config: what transformers' class of it declares, and a few more."""
    return READ & (CONFIG_MAPPING[model_type]().to_dict().keys() | EVERY)


def first(changes):
    return next(iter(changes))


def named(changes):
    return f"{first(changes)}={changes[first(changes)]}"[:60]


def make_config(model_type, changes):
    config = {"model_type": model_type} | BASE | changes
    return {name: value for name, value in config.items() if value is not ABSENT}


def make_network(config):
    """The random model that transformers makes of a config.json."""
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(config))
        theirs = AutoConfig.from_pretrained(folder)
    assert theirs.model_type == config["model_type"], "it is taken for another family's"
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return network


def theirs(network):
    with torch.no_grad():
        return network(torch.tensor(TOKENS), use_cache=False)[0].numpy()


@functools.cache
def oracle(model_type, index):
    """transformers' (network, logits) of one of `CHANGES` (-1: of none), made once; its error where it fails."""
    try:
        network = make_network(make_config(model_type, CHANGES[index] if index >= 0 else {}))
        return network, theirs(network)
    except Exception as error:
        return error


@pytest.fixture(scope="module")
def ours():
    """ours(spec, network) -> logits of the network's tensors: of a spec, whatever the family's name, once.

    Operation by operation, and layer by layer: compiling would take longer.
    """
    known = {}

    def run(spec, network):
        tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        stored = {name: Stored(each.shape, "memory", lambda each=each: each) for name, each in tensors.items()}
        if spec.tie_embeddings:
            del stored["lm_head.weight"]
        params = load_params(spec, tensor_names(spec), stored, "memory", np.float32)
        positions = np.arange(TOKENS.shape[1], dtype=np.int32)[None]
        with jax.disable_jit():
            cache = init_cache(spec, *TOKENS.shape, np.float32, stacked=False)
            places = (positions, np.ones_like(positions))
            hidden, _ = Decoder(spec).apply({"params": params}, TOKENS.astype(np.int32), *places, cache)
            return unembed(spec, params, hidden)

    def once(spec, network):
        key = dataclasses.replace(spec, model_type="")
        if key not in known:
            known[key] = run(spec, network)
        return known[key]

    return once


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("index", range(len(CHANGES)), ids=lambda index: named(CHANGES[index]))
def test_a_field_does_what_it_does_in_transformers(ours, model_type, index):
    """Or, where transformers fails, it is refused."""
    config, expected = make_config(model_type, CHANGES[index]), oracle(model_type, index)
    if isinstance(expected, Exception):
        with pytest.raises(UserError, match=r"^config\.json: [^\n]*$"):
            read_config(config, "config.json")
    else:
        found = ours(read_config(config, "config.json"), expected[0])
        np.testing.assert_allclose(found, expected[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_harmless_moves_no_logit(model_type):
    """In transformers; and we read the same spec."""
    plain, changed = make_config(model_type, {}), make_config(model_type, UNSEEN)
    np.testing.assert_array_equal(
        theirs(make_network(changed | {"output_attentions": False})), oracle(model_type, -1)[1]
    )
    assert read_config(changed, "config.json") == read_config(plain, "config.json")


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("changes", REFUSED, ids=named)
def test_what_the_decoder_lacks_is_refused_where_it_is_read(model_type, changes, ours):
    config = make_config(model_type, changes)
    if first(changes) in READ - read_by(model_type):
        network = make_network(config)
        found = ours(read_config(config, "config.json"), network)
        np.testing.assert_allclose(found, theirs(network), atol=1e-4, rtol=0)
    else:
        with pytest.raises(UserError, match=rf"^config\.json: [^\n]*({first(changes)}|activation|rope_)"):
            read_config(config, "config.json")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_values_above_matter(model_type):
    """Of every field that is read, to that family's logits in transformers."""
    plain, moved = oracle(model_type, -1)[1], {"model_type"}
    for index, changes in enumerate(CHANGES):
        found = oracle(model_type, index)
        if not isinstance(found, Exception) and (
            found[1].shape != plain.shape or np.abs(found[1] - plain).max() > 1e-2
        ):
            moved.add(first(changes))
    assert read_by(model_type) <= moved


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_their_config_is_accounted_for(model_type):
    """And the default, e.g. Llama-2-7B at full size, is read and written: nothing is tiny or odd there."""
    config = CONFIG_MAPPING[model_type]().to_dict()
    assert set(config) <= READ | HARMLESS | ONLY.keys() <= {*map(first, CHANGES + REFUSED), *UNSEEN, "model_type"}
    assert not READ & HARMLESS and not ONLY.keys() & (READ | HARMLESS)
    spec = read_config(config, "config.json")
    assert read_config(write_config(spec), "config.json") == spec


@pytest.mark.parametrize(
    "switches", [{"window": 3}, {"logit_soft_cap": 5.0}, {"biases": ("q",)}, {"qk_norm": True}, {"model_type": "qwen2"}]
)
def test_a_switch_that_a_family_does_not_have_is_not_lost_in_its_file(switches):
    spec = ModelSpec(9, 8, 2, 2, 1, 4, 8, **switches)
    with pytest.raises(UserError, match=f"says {'biases' if 'model_type' in switches else next(iter(switches))} as"):
        write_config(spec)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_their_code_asks_for_no_other_field(model_type, monkeypatch):
    """Declared or not: a field that is asked for with a default is one that a config.json may have."""
    asked, getter = set(), PreTrainedConfig.__getattribute__

    def get(self, name):
        module = sys._getframe(1).f_globals["__name__"]
        if module.startswith(f"transformers.models.{model_type}.modeling") or module == "transformers.masking_utils":
            asked.add(name)
        return getter(self, name)

    monkeypatch.setattr(PreTrainedConfig, "__getattribute__", get)
    theirs(make_network(make_config(model_type, {})))
    assert asked > {"hidden_size", "rope_parameters", "is_causal"}
    assert asked - {"_attn_implementation"} <= read_by(model_type) | HARMLESS | ONLY.keys()


HOSTILE = [np.nan, np.inf, -np.inf, -1, 0, 10**15, 10**400, 1e30, True, "8", [8]]
WINDOWED = {"use_sliding_window": True, "max_window_layers": 0}
NUMBERS = {*SAME.values(), "rope_theta", "sliding_window", "query_pre_attn_scalar"}
NUMBERS -= {"model_type", "tie_word_embeddings"}
NESTED = LLAMA3.keys() - {"rope_type"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_number_that_no_model_has_is_refused(model_type):
    for name, value in itertools.product((NUMBERS & read_by(model_type)) | NESTED, HOSTILE):
        changes = {"rope_scaling": LLAMA3 | {name: value}} if name in NESTED else WINDOWED | {name: value}
        with pytest.raises(UserError, match=r"^config\.json: [^\n]*$") as caught:
            read_config(make_config(model_type, changes), "config.json")
        said = "original_length" if name == "original_max_position_embeddings" else name.removeprefix("sliding_")
        assert said in str(caught.value) or "validator 'validate_rope'" in str(caught.value)


JUNK = st.recursive(
    st.integers() | st.floats() | st.none() | st.text(max_size=4) | st.sampled_from([*HOSTILE, 2, "llama3", *MIXED]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*LLAMA3, *MIXED]), inner),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([*FAMILIES]), st.dictionaries(st.sampled_from(sorted(READ | HARMLESS)), JUNK, max_size=3))
def test_any_json_makes_a_spec_or_one_line(model_type, junk):
    try:
        assert isinstance(read_config(make_config(model_type, junk), "config.json"), ModelSpec)
    except UserError as error:
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
