"""The analyses of one finished run: numbers, arrays and figures."""

import dataclasses
import functools
import io
import os
import pathlib
from collections import defaultdict
from collections.abc import Mapping

import jax
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from br_jax import analysis
from br_jax.adapters.lora import Adapter
from br_jax.core.errors import UserError
from br_jax.core.io import write_bytes
from br_jax.experiment.run import Experiment
from br_jax.report import plots
from br_jax.report.markdown import write_document
from br_jax.training.run import train_adapter

_COLORS = {"aligned": plots.DARK, "aligned + Buffer": plots.ORANGE, "SFT": plots.RED}
_COLORS |= {"user, Buffer on": plots.SKY, "user, Buffer out": plots.BLUE, "ours": plots.GREEN}


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
    honest = e.recipe.task_rows[0][e.settings.user.n :]  # none of the user's own
    kinds = {"harmful": e.recipe.probe_harmful_rows[:rows], "task": honest[-rows:]}
    on = ({}, {"buffer": buffer}, {"sft": e.adapter("sft")}, {"user": user, "buffer": buffer}, {"user": user})
    states = dict(zip(_COLORS, (*on, {"ours": e.merged("user", "reinforce", merge)}), strict=True))
    refusals, stage = e.recipe.refusal_rows(e.settings.reinforce.refusals, "reinforce"), e.settings.train("reinforce")
    # The direction of safety: a LoRA that was trained on refusals, without Buffer.
    safety = train_adapter("safety", "reinforce", e.aligned, refusals, stage, provider=True, **e.provider_run)
    scores, steps = _scores(e, safety, kinds, states)
    followed = _followed(e, safety, kinds, looks) if looks else {}
    axis, across = np.linspace(-0.5, 1.5, points), analysis.orthogonal_to(buffer, jax.random.key(e.settings.seed))
    noise = tuple(analysis.filter_normalised(e.aligned.params, jax.random.key(i)) for i in (1, 2))
    grids, length = {}, e.settings.train("user").max_length
    for kind, some in kinds.items():
        grids[f"{kind}, Buffer"] = analysis.loss_grid(
            e.aligned, some, (buffer, across), axis, axis - 0.5, max_length=length
        )
        grids[f"{kind}, random"] = analysis.loss_grid(e.aligned, some, noise, axis - 0.5, axis - 0.5, max_length=length)
    shares = analysis.overlaps(user, reinforce, merge.tau)
    arrays = {f"safety gradient, {kind}, {state}": score for (kind, state), score in scores.items()}
    arrays |= {f"safety gradient in training, {kind}, {state}": found for (kind, state), found in followed.items()}
    arrays |= {f"landscape, {name}": grid for name, grid in grids.items()} | {"landscape, axis": axis}
    arrays |= {f"merge, {path}, {part}": values for path, o in shares.items() for part, values in o._asdict().items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    write_bytes(folder / "analysis.npz", packed.getvalue())
    label = "safety gradient score\n(above 0: a step adds to safety)"
    lines = {case: (range(len(score)), score) for case, score in scores.items()}
    drawn = {"safety_gradient": _score_figure(lines, "layer", label), "landscape": _grid_figure(grids, axis)}
    if followed:
        lines = {case: (found[:, 0], found[:, 1:].sum(1)) for case, found in followed.items()}
        label = "safety gradient score, all layers"
        drawn["safety_in_training"] = _score_figure(lines, "step of the user's training", label)
    spaces = [
        {"matrix": path.removeprefix("layers/"), **dict(zip(("outputs", "inputs", "by chance"), part, strict=True))}
        for path, part in ((path, [f"{100 * np.mean(each):.1f}" for each in found]) for path, found in shares.items())
    ]
    values = {"kinds": kinds, "followed": followed, "merge": merge, "moved": analysis.reach(user, reinforce, merge)}
    values |= {"command": command, "steps": steps, "spaces": spaces}
    return str(write_document(folder / "analysis.md", "analysis.md.jinja", values, drawn))


def _scores(e: Experiment, safety: Adapter, kinds: Mapping, states: Mapping) -> tuple[dict, list[dict[str, str]]]:
    """(kind of row, state of the model) -> the Safety Gradient Score, f32[L]; and the lines of a table of them."""
    scores, steps, length = {}, [], e.settings.train("user").max_length
    along = np.sqrt(sum(np.square(norm, dtype=np.float64).sum() for norm in analysis.lengths(safety).values()))
    for kind, state in ((kind, state) for kind in kinds for state in states):
        part = kinds[kind], states[state]
        products = analysis.safety_gradients(e.aligned, safety, *part, max_length=length)
        norms = analysis.gradient_norms(e.aligned, list(safety.weights), *part, max_length=length).values()
        norm = np.sqrt(sum(np.square(norm, dtype=np.float64).sum() for norm in norms))
        cosine = sum(float(product.sum()) for product in products.values()) / (norm * along + 1e-30)
        score = scores[kind, state] = analysis.by_layer(products, safety)
        above, below = score.clip(min=0).sum(), score.clip(max=0).sum()
        line = {"rows": kind, "model": state, "score": f"{score.sum():+.3g} ({above:+.3g}, {below:+.3g})"}
        steps.append(line | {"gradient": f"{norm:.3g}", "cosine": f"{cosine:+.3f}"})
    return scores, steps


def _followed(e: Experiment, safety: Adapter, kinds: Mapping, looks: int) -> dict[tuple[str, str], np.ndarray]:
    """The score over training: (kind of row, state of the model) -> f32[looks + 1 at most, 1 + L], the step first."""
    config, rows, buffer = e.settings.train("user"), e.recipe.user_rows, {"buffer": e.adapter("buffer")}
    steps = config.steps or config.epochs * -(-len(rows) // config.batch_size)
    config = dataclasses.replace(config, probe_every=-(-steps // looks))
    found = defaultdict(list)

    def look(states: dict, step: int, adapter: Adapter) -> None:
        for (kind, some), (state, beside) in ((kind, state) for kind in kinds.items() for state in states.items()):
            attached = {"user": adapter, **beside}
            products = analysis.safety_gradients(e.aligned, safety, some, attached, max_length=config.max_length)
            found[kind, state].append([step, *analysis.by_layer(products, safety)])

    for name, states in (("sft", {"SFT": {}}), ("user", {"user, Buffer on": buffer, "user, Buffer out": {}})):
        settings = {"frozen": buffer if name == "user" else {}, "mesh": e.mesh}
        train_adapter(name, "user", e.aligned, rows, config, watch=functools.partial(look, states), **settings)
    return {case: np.array(lines, np.float32) for case, lines in found.items()}


@plots.styled()
def _score_figure(lines: Mapping[tuple[str, str], tuple], across: str, label: str) -> Figure:
    """A panel for each kind of row, from (kind, state of the model) -> (x, score)."""
    kinds = [*dict.fromkeys(kind for kind, _ in lines)]
    figure, axes = plots.panels(len(kinds), len(kinds), (4.6, 3.6))
    for axis, kind in zip(axes, kinds, strict=True):
        for (_, state), (x, score) in ((case, line) for case, line in lines.items() if case[0] == kind):
            axis.plot(x, score, color=_COLORS[state], label=state, marker="." if len(x) < 5 else None)
        axis.axhline(0, color=plots.GRAY, linewidth=0.8)
        axis.set(title=f"{kind} rows", xlabel=across)
        axis.xaxis.set_major_locator(plots.MaxNLocator("auto", integer=True))
    axes[0].set_ylabel(label)
    axes[-1].legend()
    return figure


@plots.styled()
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
