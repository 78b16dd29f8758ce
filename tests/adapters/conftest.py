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
        "attn": {"q": (24, 32), "k": (24, 16), "v": (24, 16), "o": (32, 24)},
        "mlp": {"gate": (24, 40), "up": (24, 40), "down": (40, 24)},
    }
    rng = np.random.default_rng(0)
    kernel = lambda shape: {"kernel": jnp.asarray(rng.normal(size=(3, *shape)), jnp.float32)}  # noqa: E731
    return {"layers": {part: {n: kernel(shape) for n, shape in group.items()} for part, group in shapes.items()}}


@pytest.fixture
def trained():
    """trained(params, rank=4, alpha=6.0, role="user", targets, seed=0) -> an adapter whose B is not zero."""

    def make(params, rank=4, alpha=6.0, role="user", targets=lora.DEFAULT_TARGETS, seed=0):
        adapter = lora.init(jax.random.key(seed), lora.target_shapes(params, targets), rank, alpha, role)
        rng = np.random.default_rng(seed)
        b = {path: jnp.asarray(rng.normal(size=pair["b"].shape), jnp.float32) for path, pair in adapter.weights.items()}
        return adapter.replace(weights={path: pair | {"b": b[path]} for path, pair in adapter.weights.items()})

    return make
