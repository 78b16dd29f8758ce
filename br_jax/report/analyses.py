"""The analyses of one finished run: numbers, arrays and figures."""

import collections
import dataclasses
import functools
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from br_jax.adapters.lora import Adapter
from br_jax.analysis.landscape import filter_normalised, loss_grid, orthogonal_to
from br_jax.analysis.merging import overlaps, reach
from br_jax.analysis.safety_gradient import by_layer, gradient_norms, lengths, safety_gradients
from br_jax.core.errors import UserError
from br_jax.data.rows import Row
from br_jax.experiment.run import Experiment
from br_jax.report import plots
from br_jax.report.markdown import render, write_document
from br_jax.training.run import train_adapter

_COLORS = {
    "aligned": plots.DARK,
    "aligned + Buffer": plots.ORANGE,
    "SFT": plots.RED,
    "user, Buffer on": plots.SKY,
    "user, Buffer out": plots.BLUE,
    "ours": plots.GREEN,
}


class _Kind(NamedTuple):
    """What a step on one kind of row does to one model."""

    score: np.ndarray  # f32[L], the Safety Gradient Score
    norm: float  # of the gradient of all matrices that the safety direction has
    cosine: float  # between minus that gradient and the direction


def write_analyses(
    config: ConfigDict, workdir: str | os.PathLike, rows: int, points: int, looks: int, command: str = ""
) -> str:
    """Analyses a run and writes analysis.md, whose path it gives, analysis.npz and figures into its workdir.

    Args:
        config, workdir: of a run of `pipeline.run_pipeline`; what it lacks is trained.
        rows: of each kind, at most.
        points: of the landscape's grid along each direction.
        looks: at the score while SFT and the user are trained once more; 0 leaves that out.
    """
    if not config.user.probes:
        raise UserError("user.probes is 0: the analyses look at held-out harmful rows: set it to some")
    e, folder = Experiment(config, workdir), pathlib.Path(workdir)
    e.check(one_job=True)
    e.begin()
    e.prepare()
    user, buffer, reinforce = map(e.adapter, ("user", "buffer", "reinforce"))
    merge = e.merge_of("user")
    released = e.merged("user", "reinforce", merge)
    honest = e.recipe.task_rows[0][e.settings.user.n :]  # none of the user's own
    kinds = {"harmful": e.recipe.probe_harmful_rows[:rows], "task": honest[-rows:]}
    on = ({}, {"buffer": buffer}, {"sft": e.adapter("sft")}, {"user": user, "buffer": buffer}, {"user": user})
    states = dict(zip(_COLORS, (*on, {"ours": released}), strict=True))
    refusals, stage = e.recipe.refusal_rows(e.settings.reinforce.refusals, "reinforce"), e.settings.train("reinforce")
    # The direction of safety: a LoRA that was trained on refusals, without Buffer.
    safety = train_adapter("safety", "reinforce", e.aligned, refusals, stage, provider=True, **e.provider_run)
    scores = {(kind, state): _look(e, safety, kinds[kind], states[state]) for kind in kinds for state in states}
    followed = _followed(e, safety, kinds, looks) if looks else {}
    grids, axis = _landscapes(e, kinds, buffer, points)
    shares, moved = overlaps(user, reinforce, merge.tau), reach(user, reinforce, merge)
    arrays = {f"safety gradient, {kind}, {state}": found.score for (kind, state), found in scores.items()}
    arrays |= {f"safety gradient in training, {kind}, {state}": found for (kind, state), found in followed.items()}
    arrays |= {f"landscape, {name}": grid for name, grid in grids.items()} | {"landscape, axis": axis}
    arrays |= {f"merge, {path}, {part}": values for path, o in shares.items() for part, values in o._asdict().items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    (folder / "analysis.npz").write_bytes(packed.getvalue())
    lines = {case: (range(len(found.score)), found.score) for case, found in scores.items()}
    label = "safety gradient score\n(above 0: a step adds to safety)"
    drawn = {"safety_gradient": _score_figure(lines, "layer", label), "landscape": _grid_figure(grids, axis)}
    if followed:
        lines = {case: (found[:, 0], found[:, 1:].sum(1)) for case, found in followed.items()}
        label = "safety gradient score, all layers"
        drawn["safety_in_training"] = _score_figure(lines, "step of the user's training", label)
    values = {"kinds": kinds, "followed": followed, "merge": merge, "moved": moved, "command": command}
    values |= {"steps": _steps(scores), "spaces": _spaces(shares)}
    return str(write_document(folder / "analysis.md", render("analysis.md.jinja", values), drawn))


def _look(e: Experiment, safety: Adapter, rows: Sequence[Row], attached: dict) -> _Kind:
    settings = {"max_length": e.settings.train("user").max_length}
    products = safety_gradients(e.aligned, safety, rows, attached, **settings)
    gradients = gradient_norms(e.aligned, list(safety.weights), rows, attached, **settings)
    norm, length = (
        float(np.sqrt(sum(np.square(norm, dtype=np.float64).sum() for norm in norms.values())))
        for norms in (gradients, lengths(safety))
    )
    along = sum(float(product.sum()) for product in products.values())
    return _Kind(by_layer(products, safety), norm, along / (norm * length + 1e-30))


def _followed(e: Experiment, safety: Adapter, kinds: Mapping[str, Sequence[Row]], looks: int) -> dict:
    """The score over training: (kind of row, state of the model) -> f32[looks + 1 at most, 1 + L], the step first."""
    config, rows, buffer = e.settings.train("user"), e.recipe.user_rows, {"buffer": e.adapter("buffer")}
    steps = config.steps or config.epochs * -(-len(rows) // config.batch_size)
    config = dataclasses.replace(config, probe_every=-(-steps // looks))
    found = collections.defaultdict(list)

    def look(states: dict, step: int, adapter: Adapter) -> None:
        for kind, some in kinds.items():
            for state, beside in states.items():
                attached = {"user": adapter, **beside}
                products = safety_gradients(e.aligned, safety, some, attached, max_length=config.max_length)
                found[kind, state].append([step, *by_layer(products, safety)])

    for name, states in (("sft", {"SFT": {}}), ("user", {"user, Buffer on": buffer, "user, Buffer out": {}})):
        settings = {"frozen": buffer if name == "user" else {}, "mesh": e.mesh}
        train_adapter(name, "user", e.aligned, rows, config, watch=functools.partial(look, states), **settings)
    return {case: np.array(lines, np.float32) for case, lines in found.items()}


def _landscapes(
    e: Experiment, kinds: Mapping, buffer: Adapter, points: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The loss of each kind of row on Buffer's plane, and along filter-normalised directions."""
    axis, length = np.linspace(-0.5, 1.5, points), e.settings.train("user").max_length
    plane = buffer, orthogonal_to(buffer, jax.random.key(e.settings.seed))
    noise = [filter_normalised(e.aligned.params, jax.random.key(i)) for i in (1, 2)]
    grids = {}
    for kind, rows in kinds.items():
        grids[f"{kind}, Buffer"] = loss_grid(e.aligned, rows, plane, axis, axis - 0.5, max_length=length)
        grids[f"{kind}, random"] = loss_grid(e.aligned, rows, tuple(noise), axis - 0.5, axis - 0.5, max_length=length)
    return grids, axis


@plots.styled
def _score_figure(lines: Mapping[tuple[str, str], tuple], across: str, label: str) -> Figure:
    """A panel for each kind of row, from (kind, state of the model) -> (x, score)."""
    kinds = [*dict.fromkeys(kind for kind, _ in lines)]
    figure, axes = plots.panels(len(kinds), len(kinds), (4.6, 3.6))
    for (kind, state), (x, score) in lines.items():
        marker = "." if len(x) < 5 else None
        axes[kinds.index(kind)].plot(x, score, color=_COLORS[state], label=state, marker=marker)
    for axis, kind in zip(axes, kinds, strict=True):
        axis.axhline(0, color=plots.GRAY, linewidth=0.8)
        axis.set(title=f"{kind} rows", xlabel=across)
        plots.whole_ticks(axis)
    axes[0].set_ylabel(label)
    axes[-1].legend()
    return figure


@plots.styled
def _grid_figure(grids: Mapping[str, np.ndarray], axis: np.ndarray) -> Figure:
    figure, panels = plots.panels(len(grids), len(grids), (3.6, 3.4))
    for panel, (name, grid) in zip(panels, grids.items(), strict=True):
        of_buffer = name.endswith("Buffer")
        shown = panel.contourf(axis if of_buffer else axis - 0.5, axis - 0.5, np.log(grid.T), levels=12, cmap="viridis")
        figure.colorbar(shown, ax=panel, label="log loss")
        for x, marker in ((0, "o"), (1, "^")) if of_buffer else ((0, "o"),):
            panel.plot(x, 0, marker, color="white", markeredgecolor=plots.DARK)
        panel.set(title=name, xlabel="Buffer" if of_buffer else "first direction", ylabel="random")
    return figure


def _steps(scores: Mapping[tuple[str, str], _Kind]) -> list[dict[str, str]]:
    lines = []
    for (kind, state), found in scores.items():
        above, below = found.score.clip(min=0).sum(), found.score.clip(max=0).sum()
        line = {"rows": kind, "model": state, "score": f"{found.score.sum():+.3g} ({above:+.3g}, {below:+.3g})"}
        lines.append(line | {"gradient": f"{found.norm:.3g}", "cosine": f"{found.cosine:+.3f}"})
    return lines


def _spaces(shares: Mapping) -> list[dict[str, str]]:
    words = {"outputs": "outputs", "inputs": "inputs", "by chance": "chance"}
    return [
        {"matrix": path.removeprefix("layers/")}
        | {title: f"{100 * np.mean(getattr(found, name)):.1f}" for title, name in words.items()}
        for path, found in shares.items()
    ]
