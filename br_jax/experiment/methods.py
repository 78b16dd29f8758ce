"""The methods of an experiment by name: which adapters each is made of, how they are trained, and how they are joined.

Tables alone; `run.Experiment` makes what they say. A new method is a line in `METHODS`, and one in `ABLATIONS` where it
trains what no other does. Other defences are in br_jax/defences, and come here by themselves.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from br_jax.defences.registry import DEFENCES

OF_ALIGNMENT = "alignment"  # in place of a folder in `reinforce.adapter`: what alignment has added
DIRECTION = "direction"  # in Reinforce's place, and not trained: what alignment has added
PROVIDER_STAGES = ("align", "buffer", "reinforce")  # each with a part of the config
_PAPER = {"loss_mean": "tokens", "cycles": 1}  # what the paper's recipe changes in every stage


class Training(NamedTuple):
    """How an adapter is trained."""

    stage: str  # whose rows and hyper-parameters, a part of the config
    buffer: str = ""  # the Buffer that is beside it, frozen
    changes: Mapping[str, Any] = {}  # of hyper-parameters


# Name of the adapter (and of its folder) -> how it is trained.
TRAININGS = {
    "align": Training("align"),  # no part of the method, whose starting point is an aligned model
    "buffer": Training("buffer"),
    "reinforce": Training("reinforce", "buffer"),
    "sft": Training("user"),
    "user": Training("user", "buffer"),
}
# Those of ablations alone, on the same rows.
ABLATIONS = {
    "buffer_paper": Training("buffer", changes=_PAPER),
    "reinforce_paper": Training("reinforce", "buffer_paper", _PAPER),
    "sft_paper": Training("user", changes=_PAPER),
    "user_paper": Training("user", "buffer_paper", _PAPER),
    "user_tokens": Training("user", "buffer", {"loss_mean": "tokens"}),
    "buffer_unrested": Training("buffer", changes={"cycles": 1}),
    "user_unrested": Training("user", "buffer_unrested"),
}
PROVIDED = {name: f"{name}_provided" for name, kind in DEFENCES.items() if kind.provides()}  # what a provider makes
OF_PROVIDER = {name for name, training in (TRAININGS | ABLATIONS).items() if training.stage != "user"}
OF_PROVIDER |= {*PROVIDED.values(), DIRECTION}
OF_USER = [name for name in TRAININGS | ABLATIONS if name not in OF_PROVIDER]
OF_USER += [name for name, kind in DEFENCES.items() if kind.trains()]


class Method(NamedTuple):
    """One line of every table."""

    label: str  # for a reader
    needs: tuple[str, ...] = ()  # the adapters that are put on the base: one, several side by side, or two to be merged
    merge: Mapping[str, float] | None = None  # QR-merges the second into the first, with these settings in the config's
    after: Mapping[str, float] = {}  # settings that are changed once calibration has chosen the others
    merges: bool = False  # whether the QR merge's strength a is an axis of its cells
    base: str = "aligned"  # what it stands on, see `Experiment.model`
    defence: str = ""  # one of `DEFENCES`, which makes a release of the adapter

    @property
    def requires(self) -> tuple[str, ...]:
        """The adapters and the parts of a `Case` that it cannot do without."""
        return self.needs + (DEFENCES[self.defence].needs if self.defence else ())

    @property
    def of_provider(self) -> bool:
        """Whether no user is in it, so that it is the same for all of them."""
        return set(self.needs) <= OF_PROVIDER


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


_OURS = ("user", "reinforce")
METHODS = {
    "raw": Method("raw model", base="raw"),
    "aligned": Method("aligned base"),
    "aligned_buffer": Method("aligned + Buffer", ("buffer",)),
    "aligned_reinforce": Method("aligned + Reinforce", ("reinforce",)),
    "sft": Method("SFT (undefended)", ("sft",)),
    "buffer_on": Method("user, Buffer still on", ("user", "buffer")),
    "buffer_only": Method("Buffer only", ("user",)),
    "reinforce_only": Method("Reinforce only", ("sft", "reinforce"), {}, merges=True),
    "average": Method("naive average", _OURS, {"a": 0.0, "scale": 0.5, "reinforce_scale": 1.0}),
    # What each part is worth: the method without it, and the paper's recipe, on the same rows.
    "no_rows": Method("without row-mean loss", ("user_tokens", "reinforce"), {}, merges=True),
    "no_rest": Method("without Buffer at rest", ("user_unrested", "reinforce"), {}, merges=True),
    "no_calibration": Method("without calibration", _OURS, {"reinforce_scale": 1.0}, merges=True),
    "no_reinforce": Method("without Reinforce", _OURS, {}, {"a": 0.0, "reinforce_scale": 0.0}, merges=True),
    "sum": Method("plain sum, same scales", _OURS, {}, {"a": 0.0}, merges=True),
    # What Reinforce's training is worth: in its place, as much of what alignment has added as calibration asks for.
    "direction": Method("Buffer, then more alignment", ("user", DIRECTION), {"scale": 1.0}, merges=True),
    "direction_only": Method("SFT, then more alignment", ("sft", DIRECTION), {"scale": 1.0}, merges=True),
    "sft_paper": Method("SFT, token-mean loss", ("sft_paper",)),
    "paper": Method("the paper's recipe", ("user_paper", "reinforce_paper"), {"scale": 0.5, "reinforce_scale": 1.0}),
    "ours": Method("Buffer-and-Reinforce", _OURS, {}, merges=True),
}
METHODS |= {
    name: Method(kind.label, (name if kind.trains() else "sft",), base=name if kind.aligns else "aligned", defence=name)
    for name, kind in DEFENCES.items()
}
# What "all" stands for: the defences side by side, and what they are held against.
COMPARED = ("aligned", "sft", "ours", *DEFENCES)
# What a single run scores: the method, what it is held against, and each of its steps.
STEPS = ("raw", "aligned", "aligned_buffer", "sft", "buffer_on", "buffer_only", "aligned_reinforce", "ours")
