"""How much a model would still learn of each row: the norm of its gradient."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import make_mesh, mesh_of, place, whole_batch
from br_jax.core.progress import progress
from br_jax.data.batches import encode, make_batches
from br_jax.data.rows import Row
from br_jax.models.model import Model
from br_jax.training.config import TrainConfig
from br_jax.training.stage import Stage, frozen_collections, probe, trainable_adapter


def gradient_norms(
    model: Model,
    rows: Sequence[Row],
    config: TrainConfig,
    frozen: Mapping[str, Adapter] | None = None,
) -> Float[np.ndarray, " n"]:
    """The norm of each row's gradient, in an adapter that is not trained yet (so of its b alone).

    Args:
        config: how long rows may be, and the adapter's rank, targets and seed.
        frozen: adapters that are attached.

    Returns:
        f32, of each row's mean loss over its answer tokens; 0 for a row that is too long to have any.
    """
    mesh = mesh_of(model.params) or make_mesh(devices=jax.devices()[:1])
    shapes = lora.target_shapes(model.params, config.targets)
    fresh = lora.init(jax.random.key(config.seed), shapes, config.rank, config.alpha, "user", model.fingerprint)
    stage = Stage.of(model.decoder, config, mesh)._replace(accumulation=1)
    trainable = place(trainable_adapter(fresh), mesh)
    base = place(frozen_collections(model.params, frozen or {}, config.frozen), mesh)
    found: list[Any] = [0.0] * len(rows)  # on devices until all are there
    size = whole_batch(1, mesh)  # the others of a batch are empty
    with jax.set_mesh(mesh), progress(len(rows), "gradients", "row", keep=False) as bar:
        for i, row in enumerate(rows):
            example = encode(row, model.tokenizer, model.template)
            example = {name: values[: config.max_length] for name, values in example.items()}
            if example["answer"][1:].any():
                batch = make_batches([example], batch_size=size, seed=0, buckets=(config.max_length,))[0]
                batch = place(jax.tree.map(jnp.asarray, batch), mesh)
                found[i] = probe(stage, trainable, base, batch, fresh.scale)[1]
            bar.update(1)
    return np.array(jax.device_get(found), np.float32)
