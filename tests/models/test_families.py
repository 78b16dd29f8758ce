"""Every family against its makers' code: logits, KV cache, greedy answers, folders, PEFT's adapters; see conftest."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import logits_of_torch as theirs
from safetensors.numpy import load_file

from br_jax.adapters import lora
from br_jax.adapters.peft import CONFIG_FILE, MODULES, WEIGHTS_FILE, load_adapter, save_adapter
from br_jax.inference.generate import decode, generate_ids, prefill
from br_jax.models.decoder import Decoder, init_cache, unembed, write_rows
from br_jax.models.io.hf import write_hf
from br_jax.provider import load_model

torch = pytest.importorskip("torch", reason="transformers' models, the oracle, need torch")
from transformers import AutoModelForCausalLM  # noqa: E402

torch.set_num_threads(1)  # several wait for each other longer than so small a model takes
LENGTHS = (1, 7, 8, 9, 31)  # the window, where there is one, is 8
STEPS = 40


@pytest.fixture(scope="session")
def rows():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="session")
def network(family):
    return family[0]


@pytest.fixture(scope="session")
def model(family):
    return load_model(family[1])


@functools.partial(jax.jit, static_argnums=0)
def forward(spec, variables, tokens, positions, segments):
    hidden, _ = Decoder(spec).apply(variables, tokens, positions, segments)
    return unembed(spec, variables["params"], hidden)


def ours(model, rows, left=False, **adapters):
    """Logits of each row [T, V], all run as one padded batch."""
    width = max(map(len, rows))
    tokens, positions, segments = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    places = [slice(width - len(ids), width) if left else slice(len(ids)) for ids in rows]
    for i, (ids, place) in enumerate(zip(rows, places, strict=True)):
        tokens[i, place], positions[i, place], segments[i, place] = ids, np.arange(len(ids)), 1
    logits = np.asarray(forward(model.spec, {"params": model.params, **adapters}, tokens, positions, segments))
    return [row[place] for row, place in zip(logits, places, strict=True)]


def test_logits_are_those_of_transformers(network, model, rows):
    expected = [theirs(network, ids) for ids in rows]
    for left in (False, True):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=0), ours(model, rows, left), expected
        )


@pytest.mark.slow
def test_bf16_is_as_near_to_f32_as_transformers_bf16(family, rows):
    network, folder = family
    found = ours(load_model(folder, dtype="bfloat16"), rows)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    exact = np.concatenate([theirs(network, ids) for ids in rows])

    def distance(logits):
        return np.sqrt(np.mean((np.concatenate(logits) - exact) ** 2))

    assert distance(found) <= distance([theirs(rounded, ids) for ids in rows])


# No window, some layers' window, every layer's, and caps: the others' caches are the same code.
@pytest.mark.parametrize("name", ["llama 3.1", "qwen3 bias window", "mistral", "gemma2"])
def test_prefill_and_40_steps_equal_the_full_forward(make_family, name, rows):
    network, folder = make_family(name)
    model = load_model(folder)
    variables, decoder, prompts = {"params": model.params}, Decoder(model.spec), rows[:2]
    lengths = np.asarray([len(ids) for ids in prompts], np.int32)
    width, more = max(lengths), np.random.default_rng(1).integers(0, 256, (STEPS, len(prompts))).astype(np.int32)
    tokens = np.asarray([ids + [0] * (width - len(ids)) for ids in prompts], np.int32)

    @jax.jit
    def run(variables, tokens, more):
        hidden, cache = prefill(decoder, variables, None, tokens, lengths)
        cache = write_rows(
            init_cache(model.spec, len(prompts), width + STEPS, jnp.float32, stacked=False),
            cache,
            jnp.arange(len(prompts)),
        )

        def step(cache, xs):
            t, token = xs
            return decode(decoder, variables, token, lengths + t, cache, width + t)[::-1]

        _, states = jax.lax.scan(step, cache, (jnp.arange(STEPS), more))
        return unembed(model.spec, variables["params"], jnp.concatenate([hidden[None], states]))

    logits = np.asarray(run(variables, tokens, more))
    for i, ids in enumerate(prompts):
        expected = theirs(network, ids + more[:, i].tolist())[len(ids) - 1 :]
        np.testing.assert_allclose(logits[:, i], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # of the others, the test above has the logits
def test_greedy_tokens_are_those_of_transformers(make_family, name, rows):
    """Each is what transformers puts first after all before it; behind EOS comes EOS."""
    network, folder = make_family(name)
    model = load_model(folder)
    eos = model.tokenizer.eos_token_id
    for ids, new in zip(rows, generate_ids(model, rows, stops=(eos,), max_new_tokens=STEPS, batch_size=5), strict=True):
        ended = new.tolist().index(eos) + 1 if eos in new else STEPS
        assert theirs(network, [*ids, *new])[len(ids) - 1 : -1].argmax(-1)[:ended].tolist() == new[:ended].tolist()
        assert (new[ended:] == eos).all()


def test_a_folder_comes_back_bit_equal(family, model, rows, tmp_path):
    """With a config of our own, or, of every other, like theirs."""
    network, folder = family
    like = folder if model.spec.tie_embeddings else None
    write_hf(tmp_path / "ours", model.spec, model.params, model.tokenizer, like=like, shard_bytes=30_000)
    before = load_file(folder / "model.safetensors")
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    after = {name: (tensor, file.name) for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2 and after.keys() == before.keys() == index["weight_map"].keys()
    for name, tensor in before.items():
        assert after[name][0].dtype == tensor.dtype and after[name][0].tobytes() == tensor.tobytes(), name
        assert index["weight_map"][name] == after[name][1]
    again = load_model(tmp_path / "ours")
    assert (again.spec, again.fingerprint, again.stop_tokens) == (model.spec, model.fingerprint, model.stop_tokens)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_array_equal(theirs(loaded, rows[-1]), theirs(network, rows[-1]))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("name", ["qwen3 bias window", "gemma2"])
def test_an_adapter_that_peft_made(make_family, name, rows, tmp_path, made_by_peft):
    """Its logits beside the base, and the folder written again."""
    network, folder = make_family(name)
    model = load_model(folder)
    projections, ids = [name.rsplit(".", 1)[-1] for name in MODULES.values()], rows[-1]
    adapted = made_by_peft(network, tmp_path / "theirs", std=0.2, r=4, lora_alpha=6, target_modules=projections)
    adapter = load_adapter(tmp_path / "theirs", model.params, role="user")
    assert adapter.weights.keys() == MODULES.keys()
    expected = theirs(adapted, ids)
    assert np.abs(expected - theirs(network, ids)).max() > 0.1, "the adapter changes nothing here"
    # 1e-4: f32's rounding over the layers
    found = ours(model, [ids], lora=lora.collection(adapter))[0]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)

    save_adapter(tmp_path / "ours", adapter, base_name="base")
    after, before = (load_file(tmp_path / side / WEIGHTS_FILE) for side in ("ours", "theirs"))
    assert len(after) == 2 * len(MODULES) * model.spec.num_layers
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), after, before)
    after, before = (json.loads((tmp_path / side / CONFIG_FILE).read_text()) for side in ("ours", "theirs"))
    assert (after["r"], after["lora_alpha"]) == (before["r"], before["lora_alpha"]) == (4, 6)
    assert set(after["target_modules"]) == set(before["target_modules"]) == set(projections)
