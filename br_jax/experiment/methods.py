"""The methods of an experiment by name: what each trains and beside what, and how it becomes what is scored.

A new method is a line in `METHODS`, and one in `TRAININGS` where it trains what no other does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.training.run import train_adapter

if TYPE_CHECKING:
    from br_jax.experiment.run import Experiment


def _align(e: Experiment) -> Adapter:
    """Teaches the raw model to refuse: no part of the method, whose starting point is an aligned model."""
    rows = [*e.recipe.refusal_rows(e.config.align.refusals, "align"), *e.recipe.benign_rows(e.config.align.benign)]
    return train_adapter("align", "align", e.raw, rows, e.train("align"), provider=True, **e.provider_run)


def _reinforce(e: Experiment) -> Adapter:
    refusals = e.recipe.refusal_rows(e.config.reinforce.refusals, "reinforce")
    benign = e.recipe.benign_rows(e.config.reinforce.benign)
    return method.train_reinforce(
        e.aligned, e.adapter("buffer"), refusals, benign, e.train("reinforce"), **e.provider_run
    )


# name of the adapter (and of its folder) -> how it is trained
TRAININGS: dict[str, Callable[[Experiment], Adapter]] = {
    "align": _align,
    "buffer": lambda e: method.train_buffer(e.aligned, e.recipe.buffer_rows, e.train("buffer"), **e.provider_run),
    "reinforce": _reinforce,
    "sft": lambda e: method.train_user(e.aligned, e.user_rows, e.train("user"), **e.user_run),
    "user": lambda e: method.train_user(
        e.aligned, e.user_rows, e.train("user"), buffer=e.adapter("buffer"), **e.user_run
    ),
}
OF_PROVIDER = ("align", "buffer", "reinforce")


class Method(NamedTuple):
    """One line of every table.

    Attributes:
        label: for a reader.
        needs: the adapters that it is made of, names in `TRAININGS`.
        adapter: (experiment, a) -> what is put on the base; None is nothing.
        merges: whether the QR merge's strength a plays a part.
        raw: whether it stands on the raw model, not on the aligned base.
    """

    label: str
    needs: tuple[str, ...] = ()
    adapter: Callable[[Experiment, float | None], Adapter | None] = lambda e, a: None
    merges: bool = False
    raw: bool = False

    @property
    def of_provider(self) -> bool:
        """Whether no user is in it, so that it is the same for all of them."""
        return set(self.needs) <= set(OF_PROVIDER)


METHODS = {
    "raw": Method("raw model", raw=True),
    "aligned": Method("aligned base"),
    "aligned_buffer": Method("aligned + Buffer", ("buffer",), lambda e, a: e.adapter("buffer")),
    "aligned_reinforce": Method("aligned + Reinforce", ("reinforce",), lambda e, a: e.adapter("reinforce")),
    "sft": Method("SFT (undefended)", ("sft",), lambda e, a: e.adapter("sft")),
    "buffer_on": Method(
        "user, Buffer still on", ("user", "buffer"), lambda e, a: lora.stack([e.adapter("user"), e.adapter("buffer")])
    ),
    "buffer_only": Method("Buffer only", ("user",), lambda e, a: e.adapter("user")),
    "reinforce_only": Method("Reinforce only", ("sft", "reinforce"), lambda e, a: e.merged("sft", a=a), merges=True),
    "average": Method(
        "naive average",
        ("user", "reinforce"),
        lambda e, a: e.merged("user", a=0.0, scale=0.5, reinforce_scale=1.0),
    ),
    "ours": Method("Buffer-and-Reinforce", ("user", "reinforce"), lambda e, a: e.merged("user", a=a), merges=True),
}
# What a single run scores: the method, what it is held against, and each of its steps.
STEPS = ("raw", "aligned", "aligned_buffer", "sft", "buffer_on", "buffer_only", "aligned_reinforce", "ours")
