"""What a defence is: a frozen dataclass of its settings that says how a user is trained and what is handed out.

A new one is such a class in a file here, and an entry in `registry`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from br_jax.adapters.lora import Adapter
from br_jax.core.bounds import require_bounds
from br_jax.data.rows import Row
from br_jax.models.model import Model
from br_jax.training.config import TrainConfig
from br_jax.training.run import train_adapter

KINDS = ("faithful", "simplified", "variant", "own")


class Badge(NamedTuple):
    """How near an implementation is to its paper."""

    paper: str  # whose, and its arXiv number; "" for one's own
    kind: str  # of `KINDS`
    differs: str = ""  # in what; "" for a faithful one, and one's own


@dataclasses.dataclass(frozen=True)
class Case:
    """What a provider has at hand when a user's rows come in."""

    model: Model  # the aligned base
    rows: Sequence[Row]  # the user's
    config: TrainConfig  # how users are trained
    refusals: Sequence[Row]  # harmful prompts with refusals
    benign: Sequence[Row]  # benign prompts with answers
    harmful: Sequence[Row]  # harmful prompts with harmful answers
    direction: Callable[[], Adapter]  # of alignment: what was added to the raw model
    raw: Model  # the model before
    alignment: Sequence[Row]  # what it was aligned on
    align_config: TrainConfig  # and how
    provided: Adapter | None = None  # what `Defence.provide` has made
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # workdir, mesh, probes

    def train(self, name: str, rows: Sequence[Row] | None = None, **changes: Any) -> Adapter:
        """A user's adapter; `changes` are arguments of `training.run.train_adapter`."""
        rows, config = self.rows if rows is None else rows, changes.pop("config", self.config)
        return train_adapter(name, "user", self.model, rows, config, **self.run, **changes)


@dataclasses.dataclass(frozen=True)
class Defence:
    """Plain SFT; a subclass says what it does otherwise. Fields are settings."""

    label: ClassVar[str]  # for a table
    badge: ClassVar[Badge]
    instruction = ""  # put in front of every prompt that the released model is asked
    needs: ClassVar[tuple[str, ...]] = ()  # which of `Case`'s rows, or "direction", it cannot do without
    aligns: ClassVar[bool] = False  # whether it is an alignment: `provide` makes the adapter of another aligned base

    def __post_init__(self):
        require_bounds(self, type(self).__name__)

    def provide(self, case: Case, name: str) -> Adapter | None:
        """What the provider makes once, before any user."""
        return None

    def train(self, case: Case, name: str) -> Adapter | None:
        """The user's adapter; None is that of plain SFT."""
        return None

    def release(self, case: Case, user: Adapter) -> Adapter:
        """What is handed out, of the trained adapter."""
        return user

    @classmethod
    def trains(cls) -> bool:
        """Whether it has a training of its own."""
        return cls.train is not Defence.train

    @classmethod
    def provides(cls) -> bool:
        """Whether the provider makes an adapter for it."""
        return cls.provide is not Defence.provide
