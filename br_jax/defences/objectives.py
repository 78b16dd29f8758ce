"""Defences by what a step of the user's training descends, each its paper's formula.

Lisa, constrained SFT, LDIFS, AsFT, security vectors, SafeGrad and Panacea.
"""

import dataclasses
import functools
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
from br_jax.training.loss import answer_loss, hidden_states, token_losses
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


@dataclasses.dataclass(frozen=True)
class Lisa(Defence, Objective):
    """Bi-state optimization with a proximal term, rho / 2 ||w - anchor||^2."""

    label = "Lisa"
    badge = Badge(
        "Huang et al. 2024, arXiv 2405.18641",
        "simplified",
        "as long as the user's run: with fewer than 100 steps, one turn",
    )
    needs = ("refusals",)

    aligning: int = number(10, 1, 10**6)  # steps of a phase on refusals, which comes first
    fitting: int = number(90, 1, 10**6)  # steps of a phase on the user's rows
    rho: float = number(10.0, 0.0, 1e6)
    free: float = number(0.1, 0.0, 1.0)  # share of the run without the proximal term

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, objective=self, streams={"refusals": case.refusals})

    def begin(self, trainable: dict) -> dict:
        """The anchors: where each of the phases ended last."""
        return {phase: jax.tree.map(jnp.copy, trainable) for phase in ("aligning", "fitting")}

    def gradient(self, step: Step, state: dict) -> tuple:
        place = step.number % (self.aligning + self.fitting)
        now = place < self.aligning
        ended = {"aligning": place == self.aligning, "fitting": (place == 0) & (step.number > 0)}
        anchors = {phase: _where(over, step.trainable, state[phase]) for phase, over in ended.items()}
        loss, grads = jax.lax.cond(now, lambda: step.gradient(rows=step.streams["refusals"]), step.gradient)
        rho = jnp.where(step.progress < self.free, 0.0, self.rho)
        anchor = _where(now, anchors["fitting"], anchors["aligning"])
        grads = jax.tree.map(lambda g, w, to: g + rho * (w - to), grads, step.trainable, anchor)
        return loss, grads, anchors


def _where(condition, these: dict, those: dict) -> dict:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), these, those)


@dataclasses.dataclass(frozen=True)
class ConstrainedSft(Defence, Objective):
    """Descends -(2 / beta_t) log sigmoid(beta_t log(p(x_t) / p_aligned(x_t))), with a large beta for early tokens.

    Its gradient is the answer loss' with each token's weight times 2 sigmoid(-beta_t log(p / p_aligned)): one at the
    start, and less for what has become likelier than in the aligned model.
    """

    label = "constrained SFT"
    badge = Badge("Qi et al. 2025 (Safety alignment should be made more than a few tokens deep), arXiv 2406.05946",
                  "faithful")  # fmt: skip

    first: float = number(0.5, 0.0, 1e3, open_low=True)  # beta of an answer's first token
    early: float = number(2.0, 0.0, 1e3, open_low=True)  # of the second to fifth
    late: float = number(0.1, 0.0, 1e3, open_low=True)  # of all others

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, objective=self)

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


@dataclasses.dataclass(frozen=True)
class Ldifs(Defence, Objective):
    """Adds rho / 2 ||mlp_l(w) - mlp_l(w_0)||^2 for every layer l, as long as it is below a limit.

    The square is a mean over the tokens of a micro-batch, of which each asks for itself whether it is below the limit.
    """

    label = "LDIFS"
    badge = Badge("Mukhoti et al. 2024, arXiv 2308.13320", "simplified",
                  "the square is a mean over tokens; the reference model is without dropout")  # fmt: skip

    rho: float = number(0.01, 0.0, 1e6)
    limit: float = number(0.1, 0.0, 1e6)  # of a layer's term
    clip_norm: float = number(5.0, 0.0, 1e30, open_low=True)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, objective=self, config=dataclasses.replace(case.config, clip_norm=self.clip_norm))

    def gradient(self, step: Step, state: dict) -> tuple:
        return *step.gradient(loss=self._loss), state

    def _loss(self, step: Step, variables: dict, rows: dict, key) -> jax.Array:
        hidden, ours = _outputs(step, variables, rows, key)
        _, theirs = _outputs(step, step.frozen, rows, None)
        loss = answer_loss(variables["params"], hidden, rows["targets"], rows["weights"], *step.head)
        segments = rows["segment_ids"]  # what segments of a packed row share counts for each of them
        real = jnp.where(segments == SHARED, segments.max(1, keepdims=True), jnp.sign(segments)).astype(jnp.float32)
        off = jnp.sum((ours - jax.lax.stop_gradient(theirs)).astype(jnp.float32) ** 2, axis=-1)  # [L, B, T]
        terms = self.rho / 2 * jnp.sum(off * real[None], axis=(1, 2)) / jnp.maximum(jnp.sum(real), 1)
        penalty = jnp.sum(rows["weights"]) * jnp.sum(jnp.where(terms < self.limit, terms, 0.0))
        return loss + (penalty - jax.lax.stop_gradient(penalty))  # what is reported is the loss of answers alone


def _outputs(step: Step, variables: dict, rows: dict, key) -> tuple[jax.Array, jax.Array]:
    """(final hidden states, what each layer's MLP gives [L, B, T, D])."""
    rngs = {} if key is None else {"dropout": key}
    given = rows["tokens"], rows["positions"], rows["segment_ids"]
    (hidden, _), sown = step.decoder.apply(variables, *given, rngs=rngs, mutable=["outputs"])
    return hidden, sown["outputs"]["layers"]["mlp"]["out"][0]


@dataclasses.dataclass(frozen=True)
class AsFT(Defence, Objective):
    """Adds weight * sum ||A (B - B C)||_F^2, C = V V^T / ||V||_F, over all matrices, without alpha / r."""

    label = "AsFT"
    badge = Badge("Yang et al. 2025, arXiv 2506.08473", "variant", "the direction is align's adapter, of low rank")
    needs = ("direction",)

    weight: float = number(10.0, 0.0, 1e6)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, objective=self, aux={"direction": case.direction()})

    def gradient(self, step: Step, state: dict[str, Any]) -> tuple:
        loss, grads = step.gradient()
        pull = jax.grad(off_direction)(step.trainable["lora_trainable"], step.aux["direction"])
        pulled = jax.tree.map(lambda g, p: g + self.weight * p, grads["lora_trainable"], pull)
        return loss, {**grads, "lora_trainable": pulled}, state


def off_direction(adapter: dict, direction: dict) -> jax.Array:
    """The sum of ||A (B - B C)||_F^2 over the matrices of two collections, see `lora.collection`."""
    flat, v = (traverse_util.flatten_dict(tree, sep="/") for tree in (adapter, direction))
    total = jnp.float32(0)
    for path in sorted({key.rsplit("/", 1)[0] for key in flat}):
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        if f"{path}/a" in v:
            b = b - onto(b, {name: v[f"{path}/{name}"] for name in "ab"})
        total += jnp.sum(inner(a, b, b))
    return total


@dataclasses.dataclass(frozen=True)
class SafeGrad(Defence, Objective):
    """Projects the user's gradient onto the plane across the alignment gradient, where the two are at odds.

    The alignment loss is KL(aligned base || model) at the answer tokens of refusals.
    """

    label = "SafeGrad"
    badge = Badge("Yi et al. 2025, arXiv 2508.07172", "variant", "read in its abstract; KL at answer tokens only")
    needs = ("refusals",)

    weight: float = number(1.0, 0.0, 1e3)  # of the alignment gradient that is added

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, objective=self, streams={"refusals": case.refusals})

    def gradient(self, step: Step, state: dict) -> tuple:
        loss, grads = step.gradient()
        _, safe = step.gradient(rows=step.streams["refusals"], loss=distance_to_base)
        return loss, jax.tree.map(lambda g, s: g + self.weight * s, across(grads, safe), safe), state


def across(grads: dict, safe: dict) -> dict:
    """A gradient without its part against another one, where it has one."""
    along = optax.tree.vdot(grads, safe) / jnp.maximum(optax.tree.norm(safe, squared=True), 1e-20)
    return jax.tree.map(lambda g, s: g - jnp.minimum(along, 0.0) * s, grads, safe)


def distance_to_base(step: Step, variables: dict, rows: dict, key) -> jax.Array:
    """KL(what is frozen || the model), summed over answer tokens by their weights."""
    theirs = jax.lax.stop_gradient(hidden_states(step.decoder, step.frozen, rows))
    ours = hidden_states(step.decoder, variables, rows, key)
    return answer_loss(variables["params"], ours, theirs, rows["weights"], *step.head)


@dataclasses.dataclass(frozen=True)
class SecurityVector(Defence, Objective):
    """The vector learns harmful answers, held to the base on benign ones; it is left out afterwards, nothing merged."""

    label = "Security Vector"
    badge = Badge("Zhou et al. 2023, arXiv 2311.02105", "faithful")
    needs = ("harmful", "benign")

    weight: float = number(0.01, 0.0, 1e3)  # of KL(base || base + vector) on benign answers
    rows: int = number(1000, 1, 10**6)  # benign ones, at most
    epochs: int = number(1, 1, 1000)  # times Buffer's

    def provide(self, case: Case, name: str) -> Adapter:
        """The vector: a Buffer by another recipe."""
        epochs, steps = self.epochs * case.config.epochs, self.epochs * case.config.steps
        # without what is this project's own
        plain = dataclasses.replace(case.config, epochs=epochs, steps=steps, cycles=1, loss_mean="tokens")
        streams, run = {"benign": case.benign[: self.rows]}, {**case.run, "provider": True}
        return train_adapter(name, "buffer", case.model, case.harmful, plain, objective=self, streams=streams, **run)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, frozen={"buffer": case.provided})

    def gradient(self, step: Step, state: dict) -> tuple:
        """The vector's own, see `Objective.gradient`."""
        loss, grads = step.gradient()
        _, held = step.gradient(rows=step.streams["benign"], loss=distance_to_base)
        return loss, jax.tree.map(lambda g, h: g + self.weight * h, grads, held), state


@dataclasses.dataclass(frozen=True)
class Panacea(Defence, Objective):
    """Takes lambda (grad min(L_H(w + e), cap) - h) from the user's gradient; h = grad L_H(w), e = rho h / ||h||."""

    label = "Panacea"
    badge = Badge("Wang et al. 2025, arXiv 2501.18100", "faithful")
    needs = ("harmful",)

    rho: float = number(1.0, 0.0, 1e3)
    weight: float = number(1e-4, 0.0, 1e3)  # lambda
    cap: float = number(5.0, 0.0, 1e3)  # of the harmful loss
    rows: int = number(999, 1, 10**6)  # harmful ones, at most

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name, objective=self, streams={"harmful": case.harmful[: self.rows]})

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
