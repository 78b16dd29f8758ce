"""The Safety Gradient Score: whether a step of training goes along alignment or against it, layer by layer.

S_l = <-grad_W L, v_l> / ||v_l||, with v_l what a refusal LoRA adds to layer l: above 0 a step adds to safety, below 0
it takes some away. Every layer comes of one backward pass: with W + t_l v_l at t = 0, dL/dt_l = <grad_W L, v_l>.
Beside the gradient's own length the score says whether something shrinks the gradient or turns it away from v.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.core.mesh import mesh_of, place
from br_jax.data.rows import Row
from br_jax.defences.objectives import inner
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.training.batching import one_pass, summed
from br_jax.training.loss import batch_loss


def safety_gradients(
    model: Model,
    safety: Adapter,
    rows: Sequence[Row],
    attached: Mapping[str, Adapter] | None = None,
    *,
    max_length: int = 512,
    batch_size: int = 16,
) -> dict[str, Float[np.ndarray, " L"]]:
    """<-grad_W L, v_l> of each matrix and layer, L the mean loss of rows, all of which count alike.

    Args:
        model: the base.
        safety: v, for instance a LoRA that was trained on refusals, without Buffer.
        attached: adapters that are on the model, such as Buffer or a user's.
        max_length: longer rows are cut.

    Returns:
        path of the matrix -> f32[L]. Divide by `lengths` for the score.
    """
    along = place(lora.collection(safety), mesh_of(model.params))
    gates = {path: jnp.zeros(pair["a"].shape[0], jnp.float32) for path, pair in safety.weights.items()}
    of = functools.partial(_slopes, model.decoder, gates, model.params, along)
    sums, total = _sums(model, rows, attached, max_length, batch_size, of)
    return {path: -np.asarray(slope) / total for path, slope in sums.items()}


def gradient_norms(
    model: Model,
    paths: Collection[str],
    rows: Sequence[Row],
    attached: Mapping[str, Adapter] | None = None,
    *,
    max_length: int = 512,
    batch_size: int = 16,
) -> dict[str, Float[np.ndarray, " L"]]:
    """||grad_W L|| of each matrix in `paths` and layer, else as `safety_gradients`; holds a gradient of their size."""
    flat = traverse_util.flatten_dict(model.params, sep="/")
    kernels = {f"{path}/kernel": flat.pop(f"{path}/kernel") for path in paths}
    of = functools.partial(_gradients, model.decoder, kernels, flat)
    sums, total = _sums(model, rows, attached, max_length, batch_size, of)
    return {path: np.asarray(jnp.linalg.norm(sums[f"{path}/kernel"], axis=(1, 2))) / total for path in paths}


def lengths(safety: Adapter) -> dict[str, Float[np.ndarray, " L"]]:
    """||v_l|| of each matrix and layer: path -> f32[L]."""
    pairs = safety.weights.items()
    return {path: np.sqrt(np.asarray(inner(p["a"], p["b"], p["b"]))) * abs(float(safety.scale)) for path, p in pairs}


def by_layer(products: Mapping[str, Float[np.ndarray, " L"]], safety: Adapter) -> Float[np.ndarray, " L"]:
    """The score S_l: all matrices of a layer together, over the length of v there."""
    norm = np.sqrt(sum(length**2 for length in lengths(safety).values()))
    return sum(products.values()) / (norm + 1e-8)


def _sums(model: Model, rows, attached, max_length: int, batch_size: int, of: Callable) -> tuple[dict, float]:
    """The sum over batches of `of(collection of what is attached, batch)`, and of the rows' weights, all alike."""
    held = place(lora.collection(lora.stack(attached)), mesh_of(model.params)) if attached else {}
    batches = one_pass(model, rows, max_length, batch_size, count_alike=True)
    return summed(batches, functools.partial(of, held)), sum(float(batch["weights"].sum()) for batch in batches)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(decoder: Decoder, kernels: dict, others: dict, held: dict, batch: dict) -> dict:
    def loss(kernels):
        params = traverse_util.unflatten_dict(others | kernels, sep="/")
        return batch_loss(decoder, {"params": params, "lora": held}, batch, 256)

    return jax.tree.map(lambda grad: grad.astype(jnp.float32), jax.grad(loss)(kernels))


@functools.partial(jax.jit, static_argnums=0)
def _slopes(decoder: Decoder, gates: dict[str, Array], params: dict, along: dict, held: dict, batch: dict) -> dict:
    held, along = (traverse_util.flatten_dict(tree, sep="/") for tree in (held, along))

    def loss(gates):
        joined = dict(held)
        for path, gate in gates.items():
            a, b = f"{path}/a", f"{path}/b"
            for key, side, axis in ((a, along[a], -1), (b, gate[:, None, None] * along[b], -2)):
                joined[key] = jnp.concatenate([held[key], side], axis) if key in held else side
        variables = {"params": params, "lora": traverse_util.unflatten_dict(joined, sep="/")}
        return batch_loss(decoder, variables, batch, 256)

    return jax.grad(loss)(gates)
