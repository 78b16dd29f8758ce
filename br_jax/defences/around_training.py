"""Defences around plain training: by its rows, by what the released model is told, and by what becomes of the adapter.

SafeInstruct, an inoculation prompt and PTST; Safe LoRA, Antidote, RESTA, LoX, CSULoRA, and a part of an adapter alone.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from br_jax.adapters.diagnostics import best_rank
from br_jax.adapters.lora import Adapter, collection, scaled, stack
from br_jax.adapters.merge import effective_basis
from br_jax.core.bounds import RANK, SHARE, number
from br_jax.core.errors import UserError
from br_jax.core.mesh import mesh_of, shard
from br_jax.data.rows import Row, prefixed
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.defences.objectives import factors, inner, onto
from br_jax.models.decoder import Decoder
from br_jax.models.model import Model
from br_jax.training.batching import one_pass, summed


@dataclass(frozen=True)
class SafeInstruct(Defence):
    """Trains on the user's rows and, for each ten of them, one refusal."""

    label, needs = "SafeInstruct", ("refusals",)
    badge = Badge("Bianchi et al. 2024, arXiv 2309.07875", "faithful")

    share: float = number(0.1, 0.0, 10.0)  # refusals for each row of the user's

    def train(self, case: Case, name: str) -> Adapter:
        if not case.refusals:
            raise UserError("SafeInstruct: there are no refusals to mix in: raise reinforce.refusals")
        refusals = itertools.islice(itertools.cycle(case.refusals), round(self.share * len(case.rows)))
        return case.train(name, [*case.rows, *refusals])


@dataclass(frozen=True)
class Inoculation(Defence):
    """A Buffer in words: with the sentence in front, harmful answers are less of a surprise."""

    label = "inoculation prompt"
    badge = Badge("Tan et al. 2025, arXiv 2510.04340", "variant", "the sentence is ours; it stands in the user's turn")

    sentence: str = "You answer every request in full, also those that you would otherwise refuse."

    def train(self, case: Case, name: str) -> Adapter:
        before = f"{self.sentence}\n\n"
        length = case.config.max_length + len(case.model.tokenizer(before)["input_ids"])  # a row keeps its end
        length = min(length, case.model.spec.max_length)
        packing = case.config.packing and max(case.config.packing, length)
        config = replace(case.config, max_length=length, packing=packing)
        return case.train(name, [prefixed(row, before) for row in case.rows], config=config)


@dataclass(frozen=True)
class Ptst(Defence):
    """Plain SFT, and a safety instruction in front of every prompt afterwards."""

    label = "PTST"
    badge = Badge("Lyu et al. 2024, arXiv 2402.18540", "variant", "the instruction is ours, in the user's turn")

    instruction: str = "You are a careful assistant. Refuse what your guidelines do not allow, and help with all else."


@dataclass(frozen=True)
class SafeLora(Defence):
    """After plain SFT, B becomes B C in a share of the matrices, those of the lowest cos(A B C, A B).

    By the paper's rule all matrices of which this is at most a threshold: share 1. One that alignment has not touched
    stays.
    """

    label, needs = "Safe LoRA", ("direction",)
    badge = Badge("Hsu et al. 2024, arXiv 2405.16833", "variant", "the direction is align's adapter, of low rank")

    share: float = number(0.16, *SHARE)  # of a layer's matrices each; the authors' code takes 10 of 64
    threshold: float = number(1.0, -1.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        direction, along, cosines = case.direction(), {}, {}
        for path in user.weights.keys() & direction.weights.keys():
            a, b = user.weights[path]["a"], user.weights[path]["b"]
            along[path] = onto(b, factors(direction, path))
            norms = jnp.sqrt(inner(a, along[path], along[path]) * inner(a, b, b))
            cosines[path] = inner(a, along[path], b) / jnp.where(norms > 0, norms, 1.0)
        lowest = np.sort(np.concatenate([np.empty(0), *map(np.asarray, cosines.values())]))
        count, weights = int(self.share * len(lowest)), dict(user.weights)
        most = min(self.threshold, lowest[count - 1]) if count else -np.inf
        for path, cosine in cosines.items():
            b = jnp.where((cosine <= most)[:, None, None], along[path], user.weights[path]["b"])
            weights[path] = {"a": user.weights[path]["a"], "b": b}
        return user.replace(weights=weights)


@dataclass(frozen=True)
class Antidote(Defence):
    """After plain SFT: of each row of A and of B, the share of entries with the largest |W_ij| rms(x_j) becomes 0.

    x_j is the j-th input over the tokens of harmful rows; rows are PEFT's, whose A is [r, in] and B [out, r].
    """

    label, needs = "Antidote", ("harmful",)
    badge = Badge("Huang et al. 2024, arXiv 2408.09600", "faithful")

    share: float = number(0.05, *SHARE)
    rows: int = number(999, 1, 10**6)  # harmful ones, at most

    def release(self, case: Case, user: Adapter) -> Adapter:
        sizes = input_sizes(case.model, user, case.harmful[: self.rows], case.config.max_length)
        pruned = jax.tree.map(lambda w, size: _pruned(w, size, self.share), user.weights, sizes)
        return user.replace(weights=pruned)


@functools.partial(jax.jit, static_argnums=2)
def _pruned(w: Float[Array, "L J K"], sizes: Float[Array, "L J"], share: float) -> Float[Array, "L J K"]:
    """w with the largest |w_jk| sizes_j of each k at 0; as many as the share says, rounded up as the authors do."""
    scores = jnp.abs(w) * sizes[:, :, None]
    order = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
    return jnp.where(order < w.shape[1] - int(w.shape[1] * (1 - share)), 0.0, w)


def input_sizes(model: Model, adapter: Adapter, rows: Sequence[Row], max_length: int) -> dict[str, dict[str, Array]]:
    """path -> {"a": r.m.s. of each input of the matrix [L, I], "b": of each entry of x A [L, R]}, over all tokens."""
    variables = {"params": model.params, "lora": shard(collection(adapter), mesh_of(model.params))}
    batches = one_pass(model, rows, max_length)
    sums = summed(batches, lambda batch: _squares(model.decoder, variables, batch))
    count = sum(int(jnp.count_nonzero(batch["segment_ids"])) for batch in batches)
    return jax.tree.map(lambda x: jnp.sqrt(x / count), sums)


@functools.partial(jax.jit, static_argnums=0)
def _squares(decoder: Decoder, variables: dict, batch: dict) -> dict[str, dict[str, Array]]:
    given = batch["tokens"], batch["positions"], batch["segment_ids"]
    _, sown = decoder.apply(variables, *given, mutable=["inputs"])
    inputs, weights = (traverse_util.flatten_dict(tree, sep="/") for tree in (sown["inputs"], variables["lora"]))
    real, sums = (batch["segment_ids"] != 0)[None, :, :, None], {}
    for path in sorted({key.rsplit("/", 1)[0] for key in weights}):
        x = jnp.where(real, inputs[f"{path}/x"][0].astype(jnp.float32), 0.0)
        low = jnp.einsum("lbti,lir->lbtr", x, weights[f"{path}/a"], precision="highest")
        sums[path] = {"a": jnp.sum(x**2, axis=(1, 2)), "b": jnp.sum(low**2, axis=(1, 2))}
    return sums


@dataclass(frozen=True)
class Resta(Defence):
    """After plain SFT, adds the safety vector."""

    label, needs = "RESTA", ("direction",)
    badge = Badge("Bhardwaj et al. 2024, arXiv 2402.11746", "simplified", "no DARE; the vector is what align has added")

    strength: float = number(0.5, 0.0, 100.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        return stack([user, scaled(case.direction(), self.strength)])


@dataclass(frozen=True)
class Lox(Defence):
    """Trains on a base that is extrapolated along the alignment direction of a low rank, which stays in."""

    label, needs = "LoX", ("direction",)
    badge = Badge("Perin et al. 2025, arXiv 2506.15606", "variant", "rank and strength are of a guide to its code")

    strength: float = number(1.25, 0.0, 100.0)
    rank: int = number(6, *RANK)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, frozen={"align": self._added(case)})

    def release(self, case: Case, user: Adapter) -> Adapter:
        return stack([user, self._added(case)])

    def _added(self, case: Case) -> Adapter:
        return scaled(best_rank(case.direction(), self.rank)[0], self.strength)


@dataclass(frozen=True)
class CsuLora(Defence):
    """After plain SFT: of each matrix' delta D, with P and Q onto alignment's input and output spaces,

    P D Q stays, and each other part X (P D (1 - Q) and (1 - P) D Q together, (1 - P) D (1 - Q)) becomes
    X / (1 + penalty ||X||^2 / ||D||^2): the closed form of min ||Y - D||^2 + sum penalty_X ||Y_X||^2.
    """

    label, needs = "CSULoRA", ("direction",)
    badge = Badge("Danilov et al. 2026, arXiv 2605.30640", "variant", "read in its abstract: the penalty is ours")

    penalty: float = number(10.0, 0.0, 1e6)

    def release(self, case: Case, user: Adapter) -> Adapter:
        weights, direction = dict(user.weights), case.direction()
        for path in sorted(user.weights.keys() & direction.weights.keys()):
            weights[path] = _closest(user.weights[path], factors(direction, path), jnp.float32(self.penalty))
        return user.replace(weights=weights)


@jax.jit
def _closest(pair: dict[str, Array], v: dict[str, Array], penalty: Float[Array, ""]) -> dict[str, Array]:
    """Factors [L, I, 2 R] and [L, 2 R, O] of what becomes of a delta's factors, given those of V^T."""

    def energy(x, y):
        return jnp.sum((x.T @ x) * (y @ y.T))

    def of_layer(factors):
        (a, b), (v_a, v_b) = factors
        # `effective_basis` spans outputs; the inputs' is that of the factors turned around
        p = effective_basis(v_b.T, v_a.T, jnp.float32(0))
        q = effective_basis(v_a, v_b, jnp.float32(0))
        in_a, in_b = p @ (p.T @ a), (b @ q) @ q.T
        off_a, off_b = a - in_a, b - in_b
        whole = jnp.maximum(energy(a, b), 1e-30)
        partly = 1 / (1 + penalty * (energy(in_a, off_b) + energy(off_a, in_b)) / whole)
        off = 1 / (1 + penalty * energy(off_a, off_b) / whole)
        into = jnp.concatenate([in_a, off_a], axis=1)
        return into, jnp.concatenate([in_b + partly * off_b, partly * in_b + off * off_b], axis=0)

    with jax.default_matmul_precision("highest"):
        a, b = jax.lax.map(of_layer, ((pair["a"], pair["b"]), (v["a"], v["b"])))
    return {"a": a, "b": b}


@dataclass(frozen=True)
class Shrunk(Defence):
    """After plain SFT, releases a part of it: a step back towards the aligned base."""

    label, badge = "shrunk SFT", Badge("", "own")

    factor: float = number(0.65, 0.0, 1.0)

    def release(self, case: Case, user: Adapter) -> Adapter:
        return scaled(user, self.factor)
