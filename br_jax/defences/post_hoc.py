"""Defences by what becomes of a trained adapter: Safe LoRA, Antidote, RESTA, LoX, CSULoRA, and a part of it alone."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters.diagnostics import best_rank
from br_jax.adapters.lora import Adapter, collection, scaled, stack
from br_jax.adapters.merge import effective_basis
from br_jax.core.bounds import RANK, SHARE, number
from br_jax.core.mesh import mesh_of, place
from br_jax.data.rows import Row
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.objectives import factors, inner, onto
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.training.batching import one_pass, summed


@dataclasses.dataclass(frozen=True)
class SafeLora(Defence):
    """After plain SFT, B becomes B C in a share of the matrices, those of the lowest cos(A B C, A B).

    By the paper's rule all matrices of which this is at most a threshold: share 1.
    """

    label = "Safe LoRA"
    badge = Badge("Hsu et al. 2024, arXiv 2405.16833", "variant", "the direction is align's adapter, of low rank")
    needs = ("direction",)

    share: float = number(0.16, *SHARE)  # of a layer's matrices each; the authors' code takes 10 of 64
    threshold: float = number(1.0, -1.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        return projected(user, case.direction(), self.share, self.threshold)


def projected(user: Adapter, direction: Adapter, share: float, threshold: float) -> Adapter:
    """The adapter with those matrices projected; one that alignment has not touched stays."""
    along, cosines = {}, {}
    for path in user.weights.keys() & direction.weights.keys():
        a, b = user.weights[path]["a"], user.weights[path]["b"]
        along[path] = onto(b, factors(direction, path))
        norms = jnp.sqrt(inner(a, along[path], along[path]) * inner(a, b, b))
        cosines[path] = inner(a, along[path], b) / jnp.where(norms > 0, norms, 1.0)
    lowest = np.sort(np.concatenate([np.empty(0), *map(np.asarray, cosines.values())]))
    count = int(share * len(lowest))
    most = min(threshold, lowest[count - 1]) if count else -np.inf
    weights = dict(user.weights)
    for path, cosine in cosines.items():
        b = jnp.where((cosine <= most)[:, None, None], along[path], user.weights[path]["b"])
        weights[path] = {"a": user.weights[path]["a"], "b": b}
    return user.replace(weights=weights)


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


@dataclasses.dataclass(frozen=True)
class Resta(Defence):
    """After plain SFT, adds the safety vector."""

    label = "RESTA"
    badge = Badge("Bhardwaj et al. 2024, arXiv 2402.11746", "simplified", "no DARE; the vector is what align has added")
    needs = ("direction",)

    strength: float = number(0.5, 0.0, 100.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        return stack([user, scaled(case.direction(), self.strength)])


@dataclasses.dataclass(frozen=True)
class Lox(Defence):
    """Trains on a base that is extrapolated along the alignment direction of a low rank, which stays in."""

    label = "LoX"
    badge = Badge(
        "Perin et al. 2025, arXiv 2506.15606", "variant", "rank and strength are those of a guide to its code"
    )
    needs = ("direction",)

    strength: float = number(1.25, 0.0, 100.0)
    rank: int = number(6, *RANK)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, frozen={"align": self._added(case)})

    def release(self, case: Case, user: Adapter) -> Adapter:
        return stack([user, self._added(case)])

    def _added(self, case: Case) -> Adapter:
        return scaled(best_rank(case.direction(), self.rank)[0], self.strength)


@dataclasses.dataclass(frozen=True)
class CsuLora(Defence):
    """After plain SFT: of each matrix' delta D, with P and Q onto alignment's input and output spaces,

    P D Q stays, and each other part X (P D (1 - Q) and (1 - P) D Q together, (1 - P) D (1 - Q)) becomes
    X / (1 + penalty ||X||^2 / ||D||^2): the closed form of min ||Y - D||^2 + sum penalty_X ||Y_X||^2.
    """

    label = "CSULoRA"
    badge = Badge(
        "Danilov et al. 2026, arXiv 2605.30640", "variant", "read in its abstract: the penalty's form is ours"
    )
    needs = ("direction",)

    penalty: float = number(10.0, 0.0, 1e6)

    def release(self, case: Case, user: Adapter) -> Adapter:
        weights, direction = dict(user.weights), case.direction()
        for path in sorted(user.weights.keys() & direction.weights.keys()):
            weights[path] = closest(user.weights[path], factors(direction, path), jnp.float32(self.penalty))
        return user.replace(weights=weights)


@jax.jit
def closest(pair: dict[str, Array], v: dict[str, Array], penalty: Float[Array, ""]) -> dict[str, Array]:
    """Factors [L, I, 2 R] and [L, 2 R, O] of what becomes of a delta's factors, given those of V^T."""

    def of_layer(factors):
        (a, b), (v_a, v_b) = factors
        # `effective_basis` spans outputs; the inputs' is that of the factors turned around
        p = effective_basis(v_b.T, v_a.T, jnp.float32(0))
        q = effective_basis(v_a, v_b, jnp.float32(0))
        in_a, in_b = p @ (p.T @ a), (b @ q) @ q.T
        off_a, off_b = a - in_a, b - in_b

        def energy(x, y):
            return jnp.sum((x.T @ x) * (y @ y.T))

        whole = jnp.maximum(energy(a, b), 1e-30)
        partly = 1 / (1 + penalty * (energy(in_a, off_b) + energy(off_a, in_b)) / whole)
        off = 1 / (1 + penalty * energy(off_a, off_b) / whole)
        into = jnp.concatenate([in_a, off_a], axis=1)
        return into, jnp.concatenate([in_b + partly * off_b, partly * in_b + off * off_b], axis=0)

    with jax.default_matmul_precision("highest"):
        a, b = jax.lax.map(of_layer, ((pair["a"], pair["b"]), (v["a"], v["b"])))
    return {"a": a, "b": b}


@dataclasses.dataclass(frozen=True)
class Shrunk(Defence):
    """After plain SFT, releases a part of it: a step back towards the aligned base."""

    label = "shrunk SFT"
    badge = Badge("", "own")

    factor: float = number(0.65, 0.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        return scaled(user, self.factor)
