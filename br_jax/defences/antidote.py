"""Antidote: the entries of an adapter that count most on harmful rows are set to zero."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters.lora import Adapter, collection
from br_jax.core.bounds import SHARE, number
from br_jax.core.mesh import mesh_of, place
from br_jax.data.rows import Row
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.training.batching import one_pass, summed


@dataclasses.dataclass(frozen=True)
class Antidote(Defence):
    """After plain SFT: of each row of A and of B, the share of entries with the largest |W_ij| rms(x_j) becomes 0.

    x_j is the j-th input over the tokens of harmful rows; rows are PEFT's, whose A is [r, in] and B [out, r].
    """

    label = "Antidote"
    badge = Badge("Huang et al. 2024, arXiv 2408.09600", "faithful")
    needs = ("harmful",)

    share: float = number(0.05, *SHARE)
    rows: int = number(999, 1, 10**6)  # harmful ones, at most

    def release(self, case: Case, user: Adapter) -> Adapter:
        """See `Defence.release`."""
        sizes = input_sizes(case.model, user, case.harmful[: self.rows], case.config.max_length)
        weights = {}
        for path, pair in user.weights.items():
            a, b = (_pruned(pair[name], sizes[path][name], self.share) for name in "ab")
            weights[path] = {"a": a, "b": b}
        return user.replace(weights=weights)


@functools.partial(jax.jit, static_argnums=2)
def _pruned(w: Float[Array, "L J K"], sizes: Float[Array, "L J"], share: float) -> Float[Array, "L J K"]:
    """w with the largest |w_jk| sizes_j of each k at 0; as many as the share says, rounded up as the authors do."""
    scores = jnp.abs(w) * sizes[:, :, None]
    order = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
    return jnp.where(order < w.shape[1] - int(w.shape[1] * (1 - share)), 0.0, w)


def input_sizes(model: Model, adapter: Adapter, rows: Sequence[Row], max_length: int) -> dict[str, dict[str, Array]]:
    """path -> {"a": r.m.s. of each input of the matrix [L, I], "b": of each entry of x A [L, R]}, over all tokens."""
    variables = {"params": model.params, "lora": place(collection(adapter), mesh_of(model.params))}
    batches = one_pass(model, rows, max_length)
    sums = summed(batches, lambda batch: _squares(model.decoder, variables, batch))
    count = sum(int(jnp.count_nonzero(batch["segment_ids"])) for batch in batches)
    return jax.tree.map(lambda x: jnp.sqrt(x / count), sums)


@functools.partial(jax.jit, static_argnums=0)
def _squares(decoder: Decoder, variables: dict, batch: dict) -> dict[str, dict[str, Array]]:
    given = batch["tokens"], batch["positions"], batch["segment_ids"]
    _, sown = decoder.apply(variables, *given, mutable=["inputs"])
    inputs = traverse_util.flatten_dict(sown["inputs"], sep="/")
    weights = traverse_util.flatten_dict(variables["lora"], sep="/")
    real = (batch["segment_ids"] != 0)[None, :, :, None]
    sums = {}
    for path in sorted({key.rsplit("/", 1)[0] for key in weights}):
        x = jnp.where(real, inputs[f"{path}/x"][0].astype(jnp.float32), 0.0)
        low = jnp.einsum("lbti,lir->lbtr", x, weights[f"{path}/a"], precision="highest")
        sums[path] = {"a": jnp.sum(x**2, axis=(1, 2)), "b": jnp.sum(low**2, axis=(1, 2))}
    return sums
