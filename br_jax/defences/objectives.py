"""Defences by what a step of training descends (see `training.step.Objective`), each its paper's formula.

Of the user's training: Lisa, constrained SFT, LDIFS, AsFT, SafeGrad and Panacea. Of the provider's: Security Vector,
and Booster and Vaccine, alignments that are harder to undo, after which users are trained as they come.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.data.batches import SHARED
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.training.loss import answer_loss, batch_loss, hidden_states, token_losses
from br_jax.training.run import train_adapter
from br_jax.training.step import Objective, Step

product = functools.partial(jnp.einsum, precision="highest")


def onto(b: Float[Array, "L R O"], v: dict[str, Array]) -> Float[Array, "L R O"]:
    """b C of every layer, for the factors {"a": [L, I, S], "b": [L, S, O]} of V^T; 0 where V is 0."""
    gram = product("lis,lit->lst", v["a"], v["a"])
    norm = jnp.sqrt(jnp.sum(gram * product("lso,lto->lst", v["b"], v["b"]), axis=(1, 2), keepdims=True))
    along = product("lrs,lst,lto->lro", product("lro,lso->lrs", b, v["b"]), gram, v["b"])
    return along / jnp.where(norm > 0, norm, 1.0)


def inner(a: Float[Array, "L I R"], x: Float[Array, "L R O"], y: Float[Array, "L R O"]) -> Float[Array, " L"]:
    """The inner product of A X and A Y, layer by layer."""
    return jnp.sum(product("lir,lis->lrs", a, a) * product("lro,lso->lrs", x, y), axis=(1, 2))


def factors(direction: Adapter, path: str) -> dict[str, Array]:
    """V^T of a path, the adapter's scale in its b."""
    pair = direction.weights[path]
    return {"a": pair["a"], "b": direction.scale * pair["b"]}


def _added(grads: dict, weight: float, *more: dict) -> dict:
    """grads + weight * (the first of `more` - the second, if there is one)."""
    return jax.tree.map(lambda g, x, *y: g + weight * (x - y[0] if y else x), grads, *more)


class _UserObjective(Defence, Objective):
    """One that the user's training descends, beside the rows, and the direction, that it needs."""

    rows: int | None = None  # of each kind that it needs, at most

    def train(self, case: Case, name: str, **changes: Any) -> Adapter:
        streams = {kind: getattr(case, kind)[: self.rows] for kind in self.needs if kind != "direction"}
        aux = {"direction": case.direction()} if "direction" in self.needs else {}
        return case.train(name, objective=self, streams=streams, aux=aux, **changes)


@dataclass(frozen=True)
class Lisa(_UserObjective):
    """Bi-state optimization with a proximal term, rho / 2 ||w - anchor||^2."""

    label, needs = "Lisa", ("refusals",)
    badge = Badge("Huang et al. 2024, arXiv 2405.18641", "simplified", "one turn where a run has fewer than 100 steps")

    aligning: int = number(10, 1, 10**6)  # steps of a phase on refusals, which comes first
    fitting: int = number(90, 1, 10**6)  # steps of a phase on the user's rows
    rho: float = number(10.0, 0.0, 1e6)
    free: float = number(0.1, 0.0, 1.0)  # share of the run without the proximal term

    def begin(self, trainable: dict) -> dict:
        """The anchors: where each of the phases ended last."""
        return {phase: jax.tree.map(jnp.copy, trainable) for phase in ("aligning", "fitting")}

    def gradient(self, step: Step, state: dict) -> tuple:
        def where(condition, these: dict, those: dict) -> dict:
            return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, those)

        place = step.number % (self.aligning + self.fitting)
        now = place < self.aligning
        ended = {"aligning": place == self.aligning, "fitting": (place == 0) & (step.number > 0)}
        anchors = {phase: where(over, step.trainable, state[phase]) for phase, over in ended.items()}
        loss, grads = jax.lax.cond(now, lambda: step.gradient(rows=step.streams["refusals"]), step.gradient)
        rho = jnp.where(step.progress < self.free, 0.0, self.rho)
        anchor = where(now, anchors["fitting"], anchors["aligning"])
        return loss, _added(grads, rho, step.trainable, anchor), anchors


@dataclass(frozen=True)
class ConstrainedSft(_UserObjective):
    """Descends -(2 / beta_t) log sigmoid(beta_t log(p(x_t) / p_aligned(x_t))), with a large beta for early tokens.

    Its gradient is the answer loss' with each token's weight times 2 sigmoid(-beta_t log(p / p_aligned)): one at the
    start, and less for what has become likelier than in the aligned model.
    """

    label = "constrained SFT"
    badge = Badge("Qi et al. 2025 (more than a few tokens deep), arXiv 2406.05946", "faithful")

    first: float = number(0.5, 0.0, 1e3, open_low=True)  # beta of an answer's first token
    early: float = number(2.0, 0.0, 1e3, open_low=True)  # of the second to fifth
    late: float = number(0.1, 0.0, 1e3, open_low=True)  # of all others

    def gradient(self, step: Step, state: dict) -> tuple:
        return *step.gradient(loss=self._loss), state

    def _loss(self, step: Step, variables: dict, rows: dict, key) -> Array:
        given = rows["targets"], rows["weights"], *step.head
        ours, base = (hidden_states(step.decoder, *of) for of in ((variables, rows, key), (step.frozen, rows)))
        # log(p / p_aligned) of each token
        ratio = token_losses(step.frozen["params"], base, *given) - token_losses(variables["params"], ours, *given)
        place = answer_places(rows["weights"])
        beta = jnp.where(place == 0, self.first, jnp.where(place < 5, self.early, self.late))
        value = jnp.sum(rows["weights"] * (-2 / beta) * jax.nn.log_sigmoid(beta * ratio))
        weights = rows["weights"] * 2 * jax.nn.sigmoid(-beta * ratio)
        through = answer_loss(variables["params"], ours, rows["targets"], weights, *step.head)
        return through + jax.lax.stop_gradient(value - through)


def answer_places(weights: Float[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its answer are before each answer token, and no matter what elsewhere."""
    answer = weights > 0
    index = jnp.arange(weights.shape[1])[None]
    before = jnp.pad(answer, ((0, 0), (1, 0)))[:, :-1]
    return index - jax.lax.cummax(jnp.where(answer & ~before, index, 0), axis=1)


@dataclass(frozen=True)
class Ldifs(_UserObjective):
    """Adds rho / 2 ||mlp_l(w) - mlp_l(w_0)||^2 for every layer l, as long as it is below a limit.

    The square is a mean over the tokens of a micro-batch, of which each asks for itself whether it is below the limit.
    """

    label = "LDIFS"
    badge = Badge("Mukhoti et al. 2024, arXiv 2308.13320", "simplified", "a mean over tokens; w_0 without dropout")

    rho: float = number(0.01, 0.0, 1e6)
    limit: float = number(0.1, 0.0, 1e6)  # of a layer's term
    clip_norm: float = number(5.0, 0.0, 1e30, open_low=True)

    def train(self, case: Case, name: str) -> Adapter:
        return super().train(case, name, config=replace(case.config, clip_norm=self.clip_norm))

    def gradient(self, step: Step, state: dict) -> tuple:
        return *step.gradient(loss=self._loss), state

    def _loss(self, step: Step, variables: dict, rows: dict, key) -> jax.Array:
        def outputs(variables: dict, rngs: dict) -> tuple[jax.Array, jax.Array]:
            """(final hidden states, what each layer's MLP gives [L, B, T, D])."""
            given = rows["tokens"], rows["positions"], rows["segment_ids"]
            (hidden, _), sown = step.decoder.apply(variables, *given, rngs=rngs, mutable=["outputs"])
            return hidden, sown["outputs"]["layers"]["mlp"]["out"][0]

        hidden, ours = outputs(variables, {} if key is None else {"dropout": key})
        _, theirs = outputs(step.frozen, {})
        loss = answer_loss(variables["params"], hidden, rows["targets"], rows["weights"], *step.head)
        segments = rows["segment_ids"]  # what segments of a packed row share counts for each of them
        real = jnp.where(segments == SHARED, segments.max(1, keepdims=True), jnp.sign(segments)).astype(jnp.float32)
        off = jnp.sum((ours - jax.lax.stop_gradient(theirs)).astype(jnp.float32) ** 2, axis=-1)  # [L, B, T]
        terms = self.rho / 2 * jnp.sum(off * real[None], axis=(1, 2)) / jnp.maximum(jnp.sum(real), 1)
        penalty = jnp.sum(rows["weights"]) * jnp.sum(jnp.where(terms < self.limit, terms, 0.0))
        return loss + (penalty - jax.lax.stop_gradient(penalty))  # what is reported is the loss of answers alone


@dataclass(frozen=True)
class AsFT(_UserObjective):
    """Adds weight * sum ||A (B - B C)||_F^2, C = V V^T / ||V||_F, over all matrices, without alpha / r."""

    label, needs = "AsFT", ("direction",)
    badge = Badge("Yang et al. 2025, arXiv 2506.08473", "variant", "the direction is align's adapter, of low rank")

    weight: float = number(10.0, 0.0, 1e6)

    def gradient(self, step: Step, state: dict[str, Any]) -> tuple:
        loss, grads = step.gradient()
        pull = jax.grad(self._off)(step.trainable["lora_trainable"], step.aux["direction"])
        return loss, {**grads, "lora_trainable": _added(grads["lora_trainable"], self.weight, pull)}, state

    @staticmethod
    def _off(adapter: dict, direction: dict) -> jax.Array:
        """The sum over the matrices of two collections, see `lora.collection`."""
        flat, v = (traverse_util.flatten_dict(tree, sep="/") for tree in (adapter, direction))
        total = jnp.float32(0)
        for path in sorted({key.rsplit("/", 1)[0] for key in flat}):
            a, b = flat[f"{path}/a"], flat[f"{path}/b"]
            if f"{path}/a" in v:
                b = b - onto(b, {name: v[f"{path}/{name}"] for name in "ab"})
            total += jnp.sum(inner(a, b, b))
        return total


@dataclass(frozen=True)
class SafeGrad(_UserObjective):
    """Projects the user's gradient onto the plane across the alignment gradient, where the two are at odds.

    The alignment loss is KL(aligned base || model) at the answer tokens of refusals.
    """

    label, needs = "SafeGrad", ("refusals",)
    badge = Badge("Yi et al. 2025, arXiv 2508.07172", "variant", "read in its abstract; KL at answer tokens only")

    weight: float = number(1.0, 0.0, 1e3)  # of the alignment gradient that is added

    def gradient(self, step: Step, state: dict) -> tuple:
        loss, grads = step.gradient()
        _, safe = step.gradient(rows=step.streams["refusals"], loss=distance_to_base)
        return loss, _added(across(grads, safe), self.weight, safe), state


def across(grads: dict, safe: dict) -> dict:
    """A gradient without its part against another one, where it has one."""
    along = optax.tree.vdot(grads, safe) / jnp.maximum(optax.tree.norm(safe, squared=True), 1e-20)
    return jax.tree.map(lambda g, s: g - jnp.minimum(along, 0.0) * s, grads, safe)


def distance_to_base(step: Step, variables: dict, rows: dict, key) -> jax.Array:
    """KL(what is frozen || the model), summed over answer tokens by their weights."""
    theirs = jax.lax.stop_gradient(hidden_states(step.decoder, step.frozen, rows))
    ours = hidden_states(step.decoder, variables, rows, key)
    return answer_loss(variables["params"], ours, theirs, rows["weights"], *step.head)


@dataclass(frozen=True)
class Panacea(_UserObjective):
    """Takes lambda (grad min(L_H(w + e), cap) - h) from the user's gradient; h = grad L_H(w), e = rho h / ||h||."""

    label, needs = "Panacea", ("harmful",)
    badge = Badge("Wang et al. 2025, arXiv 2501.18100", "faithful")

    rho: float = number(1.0, 0.0, 1e3)
    weight: float = number(1e-4, 0.0, 1e3)  # lambda
    cap: float = number(5.0, 0.0, 1e3)  # of the harmful loss
    rows: int = number(999, 1, 10**6)  # harmful ones, at most

    def begin(self, trainable: dict) -> dict:
        """The last perturbation."""
        return {"perturbation": jax.tree.map(jnp.zeros_like, trainable)}

    def gradient(self, step: Step, state: dict) -> tuple:
        harmful = step.streams["harmful"]
        _, h = step.gradient(rows=harmful)
        size = self.rho / (optax.tree.norm(h) + 1e-7)
        e = jax.tree.map(lambda x: size * x, h)
        raised, there = step.gradient(jax.tree.map(jnp.add, step.trainable, e), harmful)
        inside = jnp.where(raised < self.cap, 1.0, 0.0)
        loss, grads = step.gradient()
        grads = jax.tree.map(lambda g, x, y: g - self.weight * (inside * x - y), grads, there, h)
        return loss, grads, {"perturbation": e}

    def end(self, trainable: dict, state: dict) -> dict:
        """The weights with the last perturbation."""
        return jax.tree.map(jnp.add, trainable, state["perturbation"])


@dataclass(frozen=True)
class SecurityVector(Defence, Objective):
    """The vector learns harmful answers, held to the base on benign ones; it is left out afterwards, nothing merged."""

    label, needs = "Security Vector", ("harmful", "benign")
    badge = Badge("Zhou et al. 2023, arXiv 2311.02105", "faithful")

    weight: float = number(0.01, 0.0, 1e3)  # of KL(base || base + vector) on benign answers
    rows: int = number(1000, 1, 10**6)  # benign ones, at most
    epochs: int = number(1, 1, 1000)  # times Buffer's

    def provide(self, case: Case, name: str) -> Adapter:
        """The vector: a Buffer by another recipe."""
        epochs, steps = self.epochs * case.config.epochs, self.epochs * case.config.steps
        # without what is this project's own
        plain = replace(case.config, epochs=epochs, steps=steps, cycles=1, loss_mean="tokens")
        streams, run = {"benign": case.benign[: self.rows]}, {**case.run, "provider": True}
        return train_adapter(name, "buffer", case.model, case.harmful, plain, objective=self, streams=streams, **run)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, frozen={"buffer": case.provided})

    def gradient(self, step: Step, state: dict) -> tuple:
        loss, grads = step.gradient()
        _, held = step.gradient(rows=step.streams["benign"], loss=distance_to_base)
        return loss, _added(grads, self.weight, held), state


class _Alignment(Defence, Objective):
    """Plain SFT on a base that is aligned by another objective, in place of the align stage's own."""

    aligns, needs = True, ("alignment",)

    def provide(self, case: Case, name: str, **changes: Any) -> Adapter:
        given = {"config": case.align_config, "objective": self, **case.run, "provider": True, **changes}
        return train_adapter(name, "align", case.raw, case.alignment, **given)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name)


@dataclass(frozen=True)
class Booster(_Alignment):
    """Adds weight * (h(w) - h(w - step h / ||h||)) to the gradient, h = grad of the harmful loss."""

    label, needs = "Booster", ("alignment", "harmful")
    badge = Badge("Huang et al. 2024, arXiv 2409.01586", "faithful")

    weight: float = number(5.0, 0.0, 1e3)
    step: float = number(0.1, 0.0, 1e3)

    def provide(self, case: Case, name: str) -> Adapter:
        return super().provide(case, name, streams={"harmful": case.harmful})

    def gradient(self, step: Step, state: dict) -> tuple:
        loss, grads = step.gradient()
        harmful = step.streams["harmful"]
        _, h = step.gradient(rows=harmful)
        size = self.step / (optax.tree.norm(h) + 1e-7)
        _, after = step.gradient(jax.tree.map(lambda w, x: w - size * x, step.trainable, h), harmful)
        return loss, _added(grads, self.weight, h, after), state


@dataclass(frozen=True)
class Vaccine(_Alignment):
    """The gradient where activations are moved, in all layers together by rho a micro-batch, to raise the loss most."""

    label = "Vaccine"
    badge = Badge("Huang et al. 2024, arXiv 2402.01109", "variant", "moves what layers give; its code, attention's")

    rho: float = number(2.0, 0.0, 1e3)

    def provide(self, case: Case, name: str) -> Adapter:
        unpacked = replace(case.align_config, packing=0)  # each row's own places are moved, none is shared
        return super().provide(case, name, config=unpacked)

    def gradient(self, step: Step, state: dict) -> tuple:
        return *step.gradient(loss=self._loss), state

    def _loss(self, step: Step, variables: dict, rows: dict, key) -> jax.Array:
        spec, held = step.decoder.spec, jax.lax.stop_gradient(variables)
        dtype = variables["params"]["embed"]["embedding"].dtype

        def moved(by, variables):
            given = {**variables, "perturbations": {"layers": {"out": by}}}
            return batch_loss(step.decoder, given, rows, step.loss_chunk, key)

        slope = jax.grad(moved)(jnp.zeros((spec.num_layers, *rows["tokens"].shape, spec.embed_dim), dtype), held)
        size = self.rho / (jnp.sqrt(jnp.sum(slope.astype(jnp.float32) ** 2)) + 1e-7)
        return moved(jax.lax.stop_gradient((size * slope.astype(jnp.float32)).astype(dtype)), variables)
