"""Booster and Vaccine: alignments that are harder to undo; users are then trained as they come."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import number
from br_jax.defences.defence import Badge, Case, Defence
from br_jax.training.config import TrainConfig
from br_jax.training.loss import batch_loss
from br_jax.training.run import train_adapter
from br_jax.training.step import Objective, Step


@dataclasses.dataclass(frozen=True)
class _Alignment(Defence, Objective):
    """Plain SFT on a base that is aligned by another objective."""

    aligns, needs = True, ("alignment",)

    def provide(self, case: Case, name: str) -> Adapter:
        """The alignment, in place of the align stage's own."""
        config, streams = self._given(case)
        given = {"objective": self, "streams": streams, **case.run, "provider": True}
        return train_adapter(name, "align", case.raw, case.alignment, config, **given)

    def train(self, case: Case, name: str) -> Adapter:
        return case.train(name)

    def _given(self, case: Case) -> tuple[TrainConfig, dict]:
        """How it is trained, and rows beside those of alignment."""
        return case.align_config, {}


@dataclasses.dataclass(frozen=True)
class Booster(_Alignment):
    """Adds weight * (h(w) - h(w - step h / ||h||)) to the gradient, h = grad of the harmful loss."""

    label = "Booster"
    badge = Badge("Huang et al. 2024, arXiv 2409.01586", "faithful")
    needs = ("alignment", "harmful")

    weight: float = number(5.0, 0.0, 1e3)
    step: float = number(0.1, 0.0, 1e3)

    def _given(self, case: Case) -> tuple[TrainConfig, dict]:
        return case.align_config, {"harmful": case.harmful}

    def gradient(self, step: Step, state: dict) -> tuple:
        loss, grads = step.gradient()
        harmful = step.streams["harmful"]
        _, h = step.gradient(rows=harmful)
        size = self.step / (optax.tree.norm(h) + 1e-7)
        _, after = step.gradient(jax.tree.map(lambda w, x: w - size * x, step.trainable, h), harmful)
        return loss, jax.tree.map(lambda g, x, y: g + self.weight * (x - y), grads, h, after), state


@dataclasses.dataclass(frozen=True)
class Vaccine(_Alignment):
    """The gradient at activations that are moved, in all layers together by rho, where the loss rises most.

    Each micro-batch is moved by rho.
    """

    label = "Vaccine"
    badge = Badge(
        "Huang et al. 2024, arXiv 2402.01109",
        "variant",
        "moves what layers give; the authors' code, what attention gives",
    )

    rho: float = number(2.0, 0.0, 1e3)

    def _given(self, case: Case) -> tuple[TrainConfig, dict]:
        return dataclasses.replace(case.align_config, packing=0), {}  # each row's own places are moved, none is shared

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
