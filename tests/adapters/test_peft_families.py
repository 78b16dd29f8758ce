"""Adapters of every family against PEFT: logits beside the base, and the folder written again."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from br_jax.adapters import lora
from br_jax.adapters.peft import CONFIG_FILE, MODULES, WEIGHTS_FILE, load_adapter, save_adapter
from br_jax.models.decoder import Decoder, unembed
from br_jax.provider import load_model

torch = pytest.importorskip("torch", reason="the oracle needs torch")

# peft asks transformers by a name that it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

RANK, ALPHA = 4, 6
PROJECTIONS = [name.rsplit(".", 1)[-1] for name in MODULES.values()]
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 21), dtype=np.int32)  # longer than a window, which is 8


@functools.partial(jax.jit, static_argnums=0)
def run(spec, params, adapter):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1], dtype=jnp.int32), TOKENS.shape)
    variables = {"params": params, "lora": lora.collection(adapter)}
    hidden, _ = Decoder(spec).apply(variables, TOKENS, positions, jnp.ones_like(positions))
    return unembed(spec, params, hidden)


def theirs(network):
    with torch.no_grad():
        return network(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def test_an_adapter_that_peft_made(tmp_path, family, made_by_peft):
    network, folder = family
    adapted = made_by_peft(network, tmp_path / "theirs", std=0.2, r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS)
    model = load_model(folder)
    adapter = load_adapter(tmp_path / "theirs", model.params, role="user")
    assert adapter.weights.keys() == MODULES.keys()
    expected = theirs(adapted)
    assert np.abs(expected - theirs(network)).max() > 0.1, "the adapter changes nothing here"
    # 1e-4: f32's rounding over the layers
    np.testing.assert_allclose(run(model.spec, model.params, adapter), expected, atol=1e-4, rtol=0)

    save_adapter(tmp_path / "ours", adapter, base_name="base")
    ours, expected = (load_file(tmp_path / side / WEIGHTS_FILE) for side in ("ours", "theirs"))
    assert ours.keys() == expected.keys() and len(ours) == 2 * len(MODULES) * model.spec.num_layers
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        np.testing.assert_array_equal(ours[name], tensor, name)
    ours, expected = (json.loads((tmp_path / side / CONFIG_FILE).read_text()) for side in ("ours", "theirs"))
    assert (ours["r"], ours["lora_alpha"]) == (expected["r"], expected["lora_alpha"]) == (RANK, ALPHA)
    assert set(ours["target_modules"]) == set(expected["target_modules"]) == set(PROJECTIONS)
