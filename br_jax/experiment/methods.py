"""The methods of an experiment by name: what each trains and beside what, and how it becomes what is scored.

A new method is a line in `METHODS`, and one in `TRAININGS` or `ABLATIONS` where it trains what no other does. Other
defences are in `br_jax/defences`, and come here by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from br_jax import method
from br_jax.adapters import lora
from br_jax.adapters.lora import Adapter
from br_jax.adapters.merge import MergeConfig
from br_jax.data.mixing import refusing_first
from br_jax.defences.registry import DEFENCES
from br_jax.training.run import keep_adapter, train_adapter

if TYPE_CHECKING:
    from br_jax.experiment.run import Experiment


def _align(e: Experiment) -> Adapter:
    """Teaches the raw model to refuse: no part of the method, whose starting point is an aligned model."""
    rows = e.recipe.guard_rows("align")
    return train_adapter("align", "align", e.raw, rows, e.train("align"), provider=True, **e.provider_run)


def _buffer(e: Experiment, name: str = "buffer", **changes) -> Adapter:
    config, rows = e.config.buffer, e.recipe.buffer_rows
    if config.refused:
        rows = refusing_first(rows, e.recipe.refusal_rows(len(rows), "buffer"), config.refused)
    return method.train_buffer(e.aligned, rows, e.train("buffer", **changes), name=name, **e.provider_run)


def _reinforce(e: Experiment, name: str = "reinforce", buffer: str = "buffer", **changes) -> Adapter:
    config = e.config.reinforce
    if name == "reinforce" and config.adapter == OF_ALIGNMENT:
        return keep_adapter(name, "reinforce", e.aligned, e.adapter("direction"), e.provider)
    refusals, benign = e.recipe.refusal_rows(config.refusals, "reinforce"), e.recipe.benign_rows(config.benign)
    given = e.aligned, e.adapter(buffer), refusals, benign, e.train("reinforce", **changes)
    return method.train_reinforce(*given, name=name, **e.provider_run)


def _user(e: Experiment, name: str, buffer: str | None, **changes) -> Adapter:
    beside = {"buffer": e.adapter(buffer)} if buffer else {"undefended": True}
    return method.train_user(
        e.aligned, e.recipe.user_rows, e.train("user", **changes), **beside, name=name, **e.user_run
    )


OF_ALIGNMENT = "alignment"  # in place of a folder in `reinforce.adapter`: what alignment has added
_PAPER = {"loss_mean": "tokens", "cycles": 1}  # what the paper's recipe changes in every stage


# name of the adapter (and of its folder) -> how it is trained
TRAININGS: dict[str, Callable[[Experiment], Adapter]] = {
    "align": _align,
    "buffer": _buffer,
    "reinforce": _reinforce,
    "sft": lambda e: _user(e, "sft", None),
    "user": lambda e: _user(e, "user", "buffer"),
}
# Those of ablations alone, on the same rows.
ABLATIONS: dict[str, Callable[[Experiment], Adapter]] = {
    "buffer_paper": lambda e: _buffer(e, "buffer_paper", **_PAPER),
    "reinforce_paper": lambda e: _reinforce(e, "reinforce_paper", "buffer_paper", **_PAPER),
    "sft_paper": lambda e: _user(e, "sft_paper", None, **_PAPER),
    "user_paper": lambda e: _user(e, "user_paper", "buffer_paper", **_PAPER),
    "user_tokens": lambda e: _user(e, "user_tokens", "buffer", loss_mean="tokens"),
    "buffer_unrested": lambda e: _buffer(e, "buffer_unrested", cycles=1),
    "user_unrested": lambda e: _user(e, "user_unrested", "buffer_unrested"),
}


def provided(name: str) -> str:
    """The name of what the provider makes for one of `DEFENCES`."""
    return f"{name}_provided"


# Those of other defences.
RIVALS: dict[str, Callable[[Experiment], Adapter]] = {
    provided(name): lambda e, name=name: e.defence(name).provide(e.case(name, providing=True), provided(name))
    for name, kind in DEFENCES.items()
    if kind.provides()
} | {
    name: lambda e, name=name: e.defence(name).train(e.case(name), name)
    for name, kind in DEFENCES.items()
    if kind.trains()
}
# In Reinforce's place, and not trained: what alignment has added.
_ADDED = {"direction": lambda e: e.direction().replace(roles=("reinforce",))}
ADAPTERS = TRAININGS | ABLATIONS | RIVALS | _ADDED
PROVIDER_STAGES = ("align", "buffer", "reinforce")  # each with a part of the config
OF_PROVIDER = (
    *PROVIDER_STAGES, "buffer_paper", "reinforce_paper", "buffer_unrested", *_ADDED,
    *(name for name in RIVALS if name not in DEFENCES),
)  # fmt: skip


class Method(NamedTuple):
    """One line of every table."""

    label: str  # for a reader
    needs: tuple[str, ...] = ()  # the adapters that it is made of, names in `ADAPTERS`
    adapter: Callable[[Experiment, float | None], Adapter | None] = lambda e, a: None  # what is put on the base
    merges: bool = False  # whether the QR merge's strength a plays a part
    base: str = "aligned"  # what it stands on, see `Experiment.base`
    instruction: Callable[[Experiment], str] = lambda e: ""  # put in front of every prompt that it is asked
    defence: str = ""  # one of `DEFENCES`, on whose settings it depends

    @property
    def asks(self) -> tuple[str, ...]:
        """The adapters and the parts of a `Case` that it cannot do without."""
        return self.needs + (DEFENCES[self.defence].needs if self.defence else ())

    @property
    def of_provider(self) -> bool:
        """Whether no user is in it, so that it is the same for all of them."""
        return set(self.needs) <= set(OF_PROVIDER)


class Cell(NamedTuple):
    """A method that is scored, at a strength of its merge."""

    method: str
    a: float | None  # None for a method without one

    @property
    def name(self) -> str:
        """Of its file, e.g. "ours-a0.1"."""
        return self.method if self.a is None else f"{self.method}-a{self.a:g}"


def cells_of(methods: Sequence[str], strengths: Sequence[float]) -> list[Cell]:
    """The cells of methods, at each strength those that merge."""
    return [Cell(method, a) for method in methods for a in (strengths if METHODS[method].merges else (None,))]


def _scales(merge: MergeConfig) -> dict[str, float]:
    """How much of each adapter a merge takes."""
    return {"scale": merge.scale, "reinforce_scale": merge.reinforce_scale}


METHODS = {
    "raw": Method("raw model", base="raw"),
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
        "naive average", ("user", "reinforce"), lambda e, a: e.merged("user", a=0.0, scale=0.5, reinforce_scale=1.0)
    ),
    # What each part is worth: the method without it, and the paper's recipe, on the same rows.
    "no_rows": Method(
        "without row-mean loss", ("user_tokens", "reinforce"), lambda e, a: e.merged("user_tokens", a=a), merges=True
    ),
    "no_rest": Method(
        "without Buffer at rest",
        ("user_unrested", "reinforce"),
        lambda e, a: e.merged("user_unrested", a=a),
        merges=True,
    ),
    "no_calibration": Method(
        "without calibration",
        ("user", "reinforce"),
        lambda e, a: e.merged("user", a=a, reinforce_scale=1.0),
        merges=True,
    ),
    "no_reinforce": Method(
        "without Reinforce",
        ("user", "reinforce"),
        lambda e, a: e.merged("user", a=0.0, **_scales(e.merge_of("user", a=a)) | {"reinforce_scale": 0.0}),
        merges=True,
    ),
    "sum": Method(
        "plain sum, same scales",
        ("user", "reinforce"),
        lambda e, a: e.merged("user", a=0.0, **_scales(e.merge_of("user", a=a))),
        merges=True,
    ),
    # What Reinforce's training is worth: in its place, as much of what alignment has added as calibration asks for.
    "direction": Method(
        "Buffer, then more alignment",
        ("user", "direction"),
        lambda e, a: e.merged("user", "direction", a=a, scale=1.0),
        merges=True,
    ),
    "direction_only": Method(
        "SFT, then more alignment",
        ("sft", "direction"),
        lambda e, a: e.merged("sft", "direction", a=a, scale=1.0),
        merges=True,
    ),
    "sft_paper": Method("SFT, token-mean loss", ("sft_paper",), lambda e, a: e.adapter("sft_paper")),
    "paper": Method(
        "the paper's recipe",
        ("user_paper", "reinforce_paper"),
        lambda e, a: e.merged("user_paper", reinforce="reinforce_paper", scale=0.5, reinforce_scale=1.0),
    ),
    "ours": Method("Buffer-and-Reinforce", ("user", "reinforce"), lambda e, a: e.merged("user", a=a), merges=True),
}


def _rival(name: str) -> Method:
    kind = DEFENCES[name]
    trained = name if kind.trains() else "sft"
    return Method(
        kind.label,
        (trained,),
        lambda e, a: e.defence(name).release(e.case(name), e.adapter(trained)),
        base=name if kind.aligns else "aligned",
        instruction=lambda e: e.defence(name).instruction,
        defence=name,
    )


METHODS |= {name: _rival(name) for name in DEFENCES}
# What "all" stands for: the defences side by side, and what they are held against.
COMPARED = ("aligned", "sft", "ours", *DEFENCES)
# What a single run scores: the method, what it is held against, and each of its steps.
STEPS = ("raw", "aligned", "aligned_buffer", "sft", "buffer_on", "buffer_only", "aligned_reinforce", "ours")
