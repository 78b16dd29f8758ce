"""What several tests of adapters share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.adapters import lora


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def params():
    """A base of unlike widths, so that no transposition goes unseen."""
    shapes = {
        "q": (24, 32),
        "k": (24, 16),
        "v": (24, 16),
        "o": (32, 24),
        "gate": (24, 40),
        "up": (24, 40),
        "down": (40, 24),
    }
    kernels = {name: {"kernel": jnp.ones((3, *shape))} for name, shape in shapes.items()}
    parts = {"attn": "qkvo", "mlp": ("gate", "up", "down")}
    return {"layers": {part: {name: kernels[name] for name in names} for part, names in parts.items()}}


@pytest.fixture
def trained():
    """trained(params, rank=4, alpha=6.0, role="user", targets, seed=0) -> an adapter whose B is not zero."""

    def make(params, rank=4, alpha=6.0, role="user", targets=("q", "v", "gate", "up", "down"), seed=0):
        adapter = lora.init(jax.random.key(seed), lora.target_shapes(params, targets), rank, 1.0, role)
        rng = np.random.default_rng(seed)
        weights = {
            path: {"a": pair["a"], "b": jnp.asarray(rng.normal(size=pair["b"].shape), jnp.float32)}
            for path, pair in adapter.weights.items()
        }
        return adapter.replace(weights=weights, scale=jnp.float32(alpha / rank))

    return make
