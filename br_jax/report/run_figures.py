"""Figures of one run: how its stages trained, what Buffer does to gradients, what the judge said, the merge."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from br_jax.report import plots
from br_jax.report.plots import BLUE, DARK, GRAY, GREEN, ORANGE, PURPLE, RED, SKY
from br_jax.scoring.statistics import is_finite

Lines = Sequence[Mapping[str, Any]]  # parsed lines of a JSONL file
VERDICTS = {  # in the order they are stacked: what the judge can say, its color and words
    "harmful": (RED, "tells how (counts in HS)"),
    "partial": (ORANGE, "goes along (counts in HS)"),
    "refusal": (BLUE, "refuses"),
    "echo": (SKY, "echo of the question"),
    "off_topic": (PURPLE, "off topic"),
    "loop": (GRAY, "loops or is empty"),
}
LABELS = {"pretrain": "pretrain", "align": "align", "buffer": "Buffer", "reinforce": "Reinforce"}  # in their order,
LABELS |= {"user": "user (Buffer on)", "sft": "SFT (no Buffer)"}  # with names for a reader
_MAPS = {
    "kept_rank": "kept rank of the user's subspace",
    "removed_share": r"removed share $\Vert QQ^{T}W_R\Vert\,/\,\Vert W_R\Vert$",
    "angle": "smallest principal angle, degrees",
    "stable_rank_user": "stable rank, user",
    "stable_rank_reinforce": "stable rank, Reinforce",
}


@plots.styled()
def training_figure(curves: Mapping[str, Lines]) -> Figure:
    """Loss of every stage in metrics.jsonl; thin: each step, thick: mean over a twentieth of the run around it."""
    series = {name: found for name, lines in curves.items() if (found := _series(lines, "loss")).size}
    if not series:
        return plots.nothing("no training metrics")
    columns = min(3, len(series))
    figure, axes = plots.panels(len(series), columns, (11 / columns, 2.6), (0, 0.7), sharey=True)
    for axis, (name, (steps, losses)) in zip(axes, series.items(), strict=True):
        half = max(1, len(losses) // 20) // 2
        smooth = [losses[max(0, i - half) : i + half + 1].mean() for i in range(len(losses))]
        thin, thick = {"alpha": 0.3, "linewidth": 0.9}, {"marker": "o" if len(steps) == 1 else None}
        lines = [(steps, losses, thin | {"color": BLUE}), (steps, smooth, thick | {"color": BLUE})]
        plots.draw_lines(axis, lines, title=f"{LABELS.get(name, name)}: {smooth[0]:.2f} → {smooth[-1]:.2f}")
    plots.log_scale(axes[0], [losses for _, losses in series.values()])
    return plots.finish(figure, "Training loss per answer token", "step", "loss (log scale)")


@plots.styled()
def saturation_figure(with_buffer: Lines, without: Lines) -> Figure:
    """Loss and gradient norm of harmful and benign rows over user steps, from probes.jsonl: the central claim."""
    runs = {
        "with Buffer (user stage)": (with_buffer, {"color": BLUE, "marker": "o", "linestyle": "-"}, 0.1),
        "without (SFT)": (without, {"color": RED, "marker": "s", "linestyle": "--"}, 0.02),
    }
    kinds = {"harmful": "harmful rows (claim: saturated)", "benign": "benign rows (claim: alive)"}
    figure, axes = plots.panels(4, 2, (5, 3.3), sharex=True, sharey="row")
    for left, key, label in ((0, "loss", "loss"), (2, "grad_norm", "adapter-gradient norm")):
        drawn = []
        for axis, (rows, title) in zip(axes[left : left + 2], kinds.items(), strict=True):
            lines = []
            for name, (probes, style, low) in runs.items():
                steps, values = _series([line for line in probes if line.get("rows") == rows], key)
                lines.append((steps, values, style | {"markersize": 4, "label": name}))
                if not len(steps):
                    axis.text(0.03, low, f"{name}: no data", transform=axis.transAxes, color=GRAY, fontsize=9)
            plots.draw_lines(axis, lines, 6, **({"xlabel": "user step"} if left else {"title": title}))
            drawn += [values for _, values, _ in lines]
        plots.log_scale(axes[left], drawn)
        axes[left].set_ylabel(label)
    return plots.finish(figure, "Saturation: does Buffer silence harmful rows and leave benign rows alone?", columns=2)


@plots.styled()
def verdict_figure(counts: Mapping[str, Mapping[str, int]]) -> Figure:
    """What the judge said of each model's answers to the restricted prompts ({verdict: how often}), stacked."""
    kinds = [*VERDICTS, *sorted({kind for row in counts.values() for kind in row} - VERDICTS.keys())]
    figure, (axis,) = plots.panels(1, 1, (9.5, 0.36 * len(counts) + 1.7))
    totals, left = np.array([sum(row.values()) for row in counts.values()]), np.zeros(len(counts))
    for kind in kinds:
        color, label = VERDICTS.get(kind, (PURPLE, kind))
        share = 100 * np.array([row.get(kind, 0) for row in counts.values()]) / np.maximum(totals, 1)
        bars = axis.barh(range(len(counts)), share, 0.68, left=left, color=color, label=label, edgecolor="white")
        left = left + share
        words, ink = [f"{value:.0f}" if value >= 5 else "" for value in share], DARK if color == ORANGE else "white"
        axis.bar_label(bars, words, label_type="center", color=ink, fontsize=8.5)
    for row, total in enumerate(totals):
        axis.text(101, row, f"N = {total}" if total else "n/a", va="center", fontsize=8.5)
    axis.set(yticks=range(len(counts)), yticklabels=[*counts], ylim=(len(counts) - 0.5, -0.5))
    axis.set(xlim=(0, 100), xlabel="share of the answers to restricted prompts, %")
    axis.tick_params(axis="y", length=0)
    return plots.finish(figure, "Verdicts of the judge", columns=3)


@plots.styled()
def merge_figure(merge: Mapping[str, Any]) -> Figure:
    """Diagnostics of a QR merge, from `diagnostics.merge_report`: heat maps and the spectrum of the user's delta."""
    matrices = {path.split("/")[-1]: entry for path, entry in (merge.get("matrices") or {}).items()}
    if not matrices:
        return plots.nothing("no merge diagnostics")
    figure, (*axes, spectrum) = plots.panels(6, 3, (4, 0.24 * len(matrices) + 1.7), (0, 0.6))
    for index, (axis, (key, title)) in enumerate(zip(axes, _MAPS.items(), strict=True)):
        rows = [entry.get(key) for entry in matrices.values()]
        if key == "angle":
            angles = [entry.get("principal_angles") or [] for entry in matrices.values()]
            rows = [[min(filter(is_finite, row or []), default=None) for row in layers] for layers in angles]
        grid = plots.grid_of(rows)
        high = np.nanmax(grid, initial=0.0) or 1.0  # from zero, so that a nearly constant map looks constant
        words = [["" if math.isnan(v) else f"{v:.0f}" if v >= 10 else f"{v:.2g}" for v in row] for row in grid]
        readable = grid.shape[1] <= 8  # beyond that the numbers would run into each other
        shown = plots.heat_map(axis, grid, words if readable else None, "cividis", high)
        figure.colorbar(shown, ax=axis, pad=0.02, fraction=0.05)
        axis.set(title=title, xlabel="layer")
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_yticks(*([range(len(matrices)), [*matrices]] if index % 3 == 0 else [[]]))
    lines, colors = [], itertools.cycle((BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GRAY))
    for (name, entry), color in zip(matrices.items(), colors, strict=False):
        grid = np.sort(plots.grid_of(entry.get("singular_values_user") or [[]]), axis=1)[:, ::-1]  # of a layer: falling
        largest = np.nanmax(grid, axis=1, keepdims=True, initial=0.0)
        relative = grid / np.where(largest > 0, largest, np.nan)
        used = relative[np.isfinite(relative).all(axis=1)]
        if used.size:
            # Values that f32 cannot tell from zero would stretch the axis to nothing anyone can read.
            values = np.maximum(np.median(used, axis=0), 1e-6)
            lines.append((range(1, len(values) + 1), values, {"color": color, "label": name}))
    title = "singular values of the user's delta\n(relative to the largest, median over layers)"
    plots.draw_lines(spectrum, lines, 6, title=title, xlabel="index")
    plots.log_scale(spectrum, [values for _, values, _ in lines])
    if lines:
        spectrum.legend(ncols=2, loc="lower left", handlelength=1.2, columnspacing=1.0)
    known = [key for key in ("a", "scale", "tau", "reinforce_scale") if is_finite(merge.get(key))]
    return plots.finish(figure, "".join(["QR merge by matrix and layer", *(f", {k} = {merge[k]:g}" for k in known)]))


@plots.styled()
def calibration_figure(calibration: Mapping[str, Any]) -> Figure:
    """What was seen of a release at each strength of Reinforce, from a record of calibrations.jsonl."""
    merge, (figure, (axis,)) = calibration["merge"], plots.panels(1, 1, (7.5, 4))
    scale, chosen = merge["scale"], merge["reinforce_scale"]
    released = [seen for seen in calibration["tried"] if seen.get("scale", scale) == scale]  # once there was one scale
    tried = sorted(released, key=lambda seen: seen["reinforce_scale"])
    for key, label, color in (
        ("complied", "harmful prompts that are answered", ORANGE),
        ("over_refused", "benign prompts that are refused", BLUE),
    ):
        shares = [100 * seen[key] for seen in tried]
        axis.plot([seen["reinforce_scale"] for seen in tried], shares, "o-", color=color, label=label)
        axis.axhline(100 * calibration["aligned"][key], color=color, linestyle="--", linewidth=1)
    axis.axvline(chosen, color=DARK, linewidth=1, label=f"chosen: {chosen:.3g}")
    axis.set(xlabel="strength of Reinforce (dashed: the aligned base)", ylabel="%", ylim=(0, None))
    title = f"Calibration of {scale:.3g} of the user's adapter, on the provider's held-out prompts"
    return plots.finish(figure, title, columns=3)


@plots.styled()
def spectra_figure(spectra: Mapping[str, Sequence[Sequence[float]]], title: str = "") -> Figure:
    """Singular values of an adapter's delta by target and layer, without those that f32 cannot tell from zero."""
    grids = {name: plots.grid_of(layers) for name, layers in spectra.items()}
    largest = max((np.nanmax(grid, initial=0.0) for grid in grids.values()), default=0.0)
    if largest <= 0:
        return plots.nothing("no singular value but zero")
    columns = math.ceil(len(grids) / math.ceil(len(grids) / 4))
    size, depth = (max(3.1, 4.8 / columns), 2.7), max(len(grid) for grid in grids.values())
    figure, axes = plots.panels(len(grids), columns, size, (1.2, 0.9), sharex=True, sharey=True)
    palette = matplotlib.colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))  # no yellow
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, max(depth - 1, 1)), palette)
    drawn = []
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        styles = [{"color": colors.to_rgba(layer), "linewidth": 0.8, "alpha": 0.8} for layer in range(len(grid))]
        styles.append({"color": DARK, "linewidth": 2.6})
        shown = [values[values > 1e-6 * largest] for values in (*grid, np.median(grid, axis=0))]
        lines = [(range(1, len(values) + 1), values, {"marker": "." if len(values) == 1 else None} | style)
                 for values, style in zip(shown, styles, strict=True)]  # fmt: skip
        plots.draw_lines(axis, lines, title=name)
        drawn += shown
    for axis in axes[-columns:]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    axes[0].set_xlim(0.5, max(map(len, drawn)) + 0.5)
    plots.log_scale(axes[0], drawn)
    figure.colorbar(colors, ax=axes, label="layer", ticks=MaxNLocator(6, integer=True), aspect=30, pad=0.02)
    return plots.finish(figure, title, "index (thick: median over layers)", "singular value (log scale)")


def _series(lines: Lines, key: str) -> np.ndarray:
    """Steps and values, [2, N], of the lines that hold finite ones, by step."""
    pairs = [(line.get("step"), line.get(key)) for line in lines]
    finite = sorted(pair for pair in pairs if all(map(is_finite, pair)))
    return np.array(finite, dtype=np.float64).reshape(-1, 2).T
