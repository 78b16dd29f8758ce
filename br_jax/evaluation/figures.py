"""Figures of a report: each function takes plain data and returns a Figure that a notebook can show too.

Nothing here touches pyplot: a Figure with an Agg canvas needs no display and leaves no global state behind.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from br_jax.evaluation.scores import LABELS, MARGIN, is_finite, ordered, read_score

T = TypeVar("T")
Lines = Sequence[Mapping[str, Any]]  # parsed lines of a JSONL file

# Okabe and Ito's palette, which readers with any color vision tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
DARK, GRAY, PALE = "#222222", "#8A8A8A", "#EFEFEF"
VERDICTS = {  # in the order they are stacked: what the judge can say, its color and words
    "answer": (RED, "answers (counts as harm)"),
    "refusal": (BLUE, "refuses"),
    "off_topic": (ORANGE, "off topic"),
    "degenerate": (GRAY, "degenerate text"),
}
STAGES = {  # in the order they run, and their names for a reader
    "pretrain": "pretrain",
    "align": "align",
    "buffer": "Buffer",
    "reinforce": "Reinforce",
    "user": "user (Buffer on)",
    "sft": "SFT (no Buffer)",
    "release": "release",
}
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10,
    "figure.titlesize": 12.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRAY, "text.color": DARK,
    "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK, "legend.frameon": False,
    "pdf.fonttype": 42, "lines.linewidth": 1.8,
}  # fmt: skip
_JUDGED = {"sft", "aligned", "qr_merge"}  # the models that the gates compare


def styled(draw: Callable[..., T]) -> Callable[..., T]:
    """Draws under the report's style, whatever the caller's own settings are, and puts those back."""

    @functools.wraps(draw)
    def wrapped(*args: Any, **kwargs: Any) -> T:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return wrapped


@styled
def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as stem.png (150 dpi) and stem.pdf, without times or versions in them.

    Args:
        figure: what one of the functions below returned.
        stem: path without its ending; the folder exists.

    Returns:
        The paths of the two files. The same data give the same bytes.
    """
    png, pdf = stem.with_suffix(".png"), stem.with_suffix(".pdf")
    figure.savefig(png, dpi=150, metadata={"Software": None})
    figure.savefig(pdf, metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return [png, pdf]


@styled
def results_figure(models: Mapping[str, Mapping[str, Any]], title: str = "") -> Figure:
    """HS, FA and over-refusal of every model, with 95 % intervals and the limits that the gates set.

    Args:
        models: results.json's "models".
        title: a line above the panels, such as the verdict.

    Returns:
        Three panels that share their rows; a model without a score reads "not run" or "n/a".
    """
    names = ordered(models, LABELS, keep_missing=True)
    figure = new_figure(11.5, 0.36 * len(names) + 1.9)
    panels = (
        ("harmful", "Harmful score HS, %\n(lower is safer)", RED, "aligned", MARGIN),
        ("task", "Task accuracy FA, %\n(higher is better)", BLUE, "sft", -MARGIN),
        ("over_refusal", "Over-refusal, %\n(lower is better)", ORANGE, "aligned", MARGIN),
    )
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (key, label, color, reference, margin) in zip(axes, panels, strict=True):
        _score_panel(axis, names, models, key, color)
        axis.set_title(label)
        base = read_score(models.get(reference, {}).get(key)).score
        if base is not None:
            axis.axvline(100 * (base + margin), color=DARK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
            short = {"sft": "SFT"}.get(reference, reference)
            axis.set_xlabel(f"dashed: limit for the QR merge\n({short} {100 * margin:+.0f} points)")
    axes[0].set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    for text, name in zip(axes[0].get_yticklabels(), names, strict=True):
        text.set_fontweight("bold" if name in _JUDGED else "normal")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    if title:
        figure.suptitle(title, fontweight="bold")
    return figure


def _score_panel(axis: Axes, names: Sequence[str], models: Mapping[str, Any], key: str, color: str) -> None:
    axis.set_xlim(0, 124)  # room for the number beside a full bar
    axis.set_xticks(range(0, 101, 25))
    axis.spines["bottom"].set_bounds(0, 100)
    axis.tick_params(axis="y", length=0)
    for row, name in enumerate(names):
        if name == "qr_merge":
            axis.axhspan(row - 0.5, row + 0.5, color=PALE, zorder=0)
        # Its own ground keeps a text legible where the dashed limit runs through it.
        ground = {"facecolor": PALE if name == "qr_merge" else "white", "edgecolor": "none", "pad": 0.8}
        score = read_score(models.get(name, {}).get(key))
        if score.score is None:
            text = "n/a" if name in models else "not run"
            axis.text(2, row, text, va="center", color=GRAY, style="italic", fontsize=9, bbox=ground)
            continue
        value, low, high = 100 * score.score, 100 * score.low, 100 * score.high
        axis.barh(row, value, 0.62, color=color, alpha=1.0 if name in _JUDGED else 0.45, zorder=2)
        axis.errorbar(value, row, xerr=[[value - low], [high - value]], color=DARK, capsize=2.5,
                      elinewidth=1.1, marker="o", markersize=2.5, zorder=3, clip_on=False)  # fmt: skip
        axis.text(high + 3, row, f"{value:.1f}", va="center", fontsize=9, bbox=ground, zorder=4)


@styled
def training_figure(curves: Mapping[str, Lines]) -> Figure:
    """Loss of every stage over its steps, on one logarithmic scale.

    Args:
        curves: {stage: lines of its metrics.jsonl ("step", "loss", ...)}; stages without lines are left out.

    Returns:
        One panel a stage; thin: each step, thick: mean over a twentieth of the run around it.
    """
    names = [name for name in ordered(curves, STAGES) if len(_series(curves[name], "loss")[0])]
    if not names:
        return nothing("no training metrics")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(11, 2.6 * rows + 0.7)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        steps, losses = _series(curves[name], "loss")
        smooth = _running_mean(losses, max(1, len(losses) // 20))
        axis.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.9)
        axis.plot(steps, smooth, color=BLUE, marker="o" if len(steps) == 1 else None)
        axis.set_title(f"{STAGES.get(name, name)}: {smooth[0]:.2f} → {smooth[-1]:.2f}")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(axis="y", color=PALE)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    _log_scale(axes[0], [_series(curves[name], "loss")[1] for name in names])
    figure.suptitle("Training loss per answer token")
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("loss (log scale)", fontsize=10)
    return figure


@styled
def saturation_figure(with_buffer: Lines, without: Lines) -> Figure:
    """Loss and adapter-gradient norm of harmful and benign rows over user steps: the method's central claim.

    Args:
        with_buffer: lines of the user stage's probes.jsonl ("step", "rows", "loss", "grad_norm").
        without: the same of plain SFT.

    Returns:
        2 x 2 panels: harmful and benign rows across, loss and gradient norm down; each row shares its scale.
    """
    runs = (
        ("with Buffer (user stage)", with_buffer, BLUE, "o", "-"),
        ("without (SFT)", without, RED, "s", "--"),
    )
    figure = new_figure(10, 6.6)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for down, (key, label) in enumerate((("loss", "loss"), ("grad_norm", "adapter-gradient norm"))):
        drawn = []
        for across, rows in enumerate(("harmful", "benign")):
            axis = axes[down, across]
            for name, lines, color, marker, dashes in runs:
                steps, values = _series([line for line in lines if line.get("rows") == rows], key)
                drawn.append(values)
                axis.plot(steps, values, dashes, color=color, marker=marker, markersize=4, label=name)
                if not len(steps):
                    low = 0.1 if lines is with_buffer else 0.02
                    axis.text(0.03, low, f"{name}: no data", transform=axis.transAxes, color=GRAY, fontsize=9)
            axis.grid(axis="y", color=PALE)
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _log_scale(axes[down, 0], drawn)
        axes[down, 0].set_ylabel(label)
    for across, title in enumerate(("harmful rows (claim: saturated)", "benign rows (claim: alive)")):
        axes[0, across].set_title(title)
        axes[1, across].set_xlabel("user step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("Saturation: does Buffer silence harmful rows and leave benign rows alone?")
    return figure


@styled
def verdict_figure(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What the judge said of each model's answers to the restricted prompts, as stacked shares.

    Args:
        models: results.json's "models", each with "verdicts": {verdict: count}.
    """
    names = ordered(models, LABELS, keep_missing=True)
    counts = {name: models.get(name, {}).get("verdicts") or {} for name in names}
    kinds = ordered({kind: 1 for row in counts.values() for kind in row} | VERDICTS, VERDICTS)
    figure = new_figure(9.5, 0.36 * len(names) + 1.7)
    axis = figure.subplots()
    left = np.zeros(len(names))
    totals = np.array([sum(counts[name].values()) for name in names])
    for kind in kinds:
        color, label = VERDICTS.get(kind, (PURPLE, kind))
        share = 100 * np.array([counts[name].get(kind, 0) for name in names]) / np.maximum(totals, 1)
        axis.barh(range(len(names)), share, 0.68, left=left, color=color, label=label, edgecolor="white")
        for row in np.flatnonzero(share >= 5):
            middle = left[row] + share[row] / 2
            ink = DARK if color == ORANGE else "white"
            axis.text(middle, row, f"{share[row]:.0f}", ha="center", va="center", color=ink, fontsize=8.5)
        left = left + share
    for row, (name, total) in enumerate(zip(names, totals, strict=True)):
        if total:
            axis.text(101, row, f"N = {total}", va="center", fontsize=8.5)
        else:
            axis.text(1, row, "n/a" if name in models else "not run", va="center", color=GRAY, style="italic")
    axis.set_yticks(range(len(names)), [LABELS.get(name, name) for name in names])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of the answers to restricted prompts, %")
    figure.legend(loc="outside lower center", ncols=len(kinds))
    figure.suptitle("Verdicts of the judge")
    return figure


@styled
def merge_figure(merge: Mapping[str, Any]) -> Figure:
    """Diagnostics of the QR merge by matrix and layer.

    Args:
        merge: results.json's "merge": "a", "scale", "tau" and "matrices": {path: {"kept_rank": [L],
            "removed_share": [L], "stable_rank_user": [L], "stable_rank_reinforce": [L],
            "singular_values_user": [L][R], "principal_angles": [L][R] in degrees}}.

    Returns:
        Five heat maps (rows: matrices, columns: layers; pale: no value) and the spectrum of the user's delta.
    """
    matrices = merge.get("matrices") or {}
    if not matrices:
        return nothing("no merge diagnostics")
    names = list(matrices)
    figure = new_figure(12, 2 * (0.24 * len(names) + 1.7) + 0.6)
    axes = figure.subplots(2, 3).ravel()
    angles = {name: {"angle": [_least(row) for row in entry.get("principal_angles") or []]}
              for name, entry in matrices.items()}  # fmt: skip
    maps = (
        ("kept rank of the user's subspace", matrices, "kept_rank"),
        (r"removed share $\Vert QQ^{T}W_R\Vert\,/\,\Vert W_R\Vert$", matrices, "removed_share"),
        ("smallest principal angle, degrees", angles, "angle"),
        ("stable rank, user", matrices, "stable_rank_user"),
        ("stable rank, Reinforce", matrices, "stable_rank_reinforce"),
    )
    for index, (axis, (title, source, key)) in enumerate(zip(axes, maps, strict=False)):
        _heat_map(figure, axis, _grid([source[name].get(key) for name in names]), title)
        axis.set_yticks([])
        if index % 3 == 0:
            axis.set_yticks(range(len(names)), [_matrix_label(name) for name in names])
    _spectrum(axes[-1], {name: matrices[name].get("singular_values_user") for name in names})
    known = [key for key in ("a", "scale", "tau", "reinforce_scale") if is_finite(merge.get(key))]
    settings = "".join(f", {key} = {merge[key]:g}" for key in known)
    figure.suptitle(f"QR merge by matrix and layer{settings}")
    return figure


@styled
def spectra_figure(spectra: Mapping[str, Sequence[Sequence[float]]], title: str = "") -> Figure:
    """Singular values of an adapter's delta, target by target.

    Args:
        spectra: {target: for each layer, the singular values, descending}.
        title: a line above the panels, such as what the adapter is.

    Returns:
        One panel a target on one logarithmic scale; thin: each layer, colored by its depth, thick: their median.
        Values that f32 cannot tell from zero beside the adapter's largest are left out.
    """
    grids = {name: _grid(layers) for name, layers in spectra.items()}
    largest = max((np.nanmax(grid, initial=0.0) for grid in grids.values()), default=0.0)
    if largest <= 0:
        return nothing("no singular value but zero")
    rows = math.ceil(len(grids) / 4)
    columns = math.ceil(len(grids) / rows)
    figure = new_figure(max(3.1 * columns + 1.2, 6), 2.7 * rows + 0.9)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    depth = max(len(grid) for grid in grids.values())
    palette = matplotlib.colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))  # no yellow
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, max(depth - 1, 1)), palette)
    drawn = []
    for axis, (name, grid) in zip(axes, grids.items(), strict=False):
        lines = [*grid, np.median(grid, axis=0)]
        styles = [{"color": colors.to_rgba(layer), "linewidth": 0.8, "alpha": 0.8} for layer in range(len(grid))]
        for values, style in zip(lines, [*styles, {"color": DARK, "linewidth": 2.6}], strict=True):
            shown = values[values > 1e-6 * largest]
            axis.plot(range(1, len(shown) + 1), shown, marker="." if len(shown) == 1 else None, **style)
            drawn.append(shown)
        axis.set_title(name)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axis.grid(axis="y", color=PALE)
    for axis in axes[len(grids) :]:
        axis.set_axis_off()
    for axis in axes[max(len(grids) - columns, 0) : len(grids)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    axes[0].set_xlim(0.5, max(map(len, drawn)) + 0.5)
    _log_scale(axes[0], drawn)
    figure.colorbar(colors, ax=list(axes), label="layer", ticks=MaxNLocator(6, integer=True), aspect=30, pad=0.02)
    figure.suptitle(title, wrap=True)
    figure.supxlabel("index (thick: median over layers)", fontsize=10)
    figure.supylabel("singular value (log scale)", fontsize=10)
    return figure


def _heat_map(figure: Figure, axis: Axes, grid: np.ndarray, title: str) -> None:
    colors = matplotlib.colormaps["cividis"].with_extremes(bad=PALE)
    finite = grid[np.isfinite(grid)]
    # From zero, so that a nearly constant map looks constant.
    high = finite.max() if finite.size and finite.max() > 0 else 1.0
    image = axis.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap=colors, vmin=0.0, vmax=high)
    axis.set_title(title)
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for spine in axis.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axis, pad=0.02, fraction=0.05)
    if grid.shape[1] > 8:  # beyond that the numbers would run into each other
        return
    for (row, column), value in np.ndenumerate(grid):
        if math.isfinite(value):
            text = f"{value:.0f}" if value >= 10 else f"{value:.2g}"
            ink = "white" if value < high / 2 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)


def _spectrum(axis: Axes, values: Mapping[str, Any]) -> None:
    colors = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GRAY)
    drawn = []
    for index, (name, layers) in enumerate(values.items()):
        grid = np.sort(_grid(layers or []), axis=1)[:, ::-1]  # each layer's own order, largest first
        top = np.nanmax(grid, axis=1, keepdims=True, initial=0.0) if grid.size else grid
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = grid / top
        used = relative[np.isfinite(relative).all(axis=1)] if relative.size else relative
        if not used.size:
            continue
        # Values that f32 cannot tell from zero would stretch the axis to nothing anyone can read.
        line = np.maximum(np.median(used, axis=0), 1e-6)
        drawn.append(line)
        axis.plot(range(1, len(line) + 1), line, color=colors[index % len(colors)], label=_matrix_label(name))
    axis.set_title("singular values of the user's delta\n(relative to the largest, median over layers)")
    axis.set_xlabel("index")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.grid(axis="y", color=PALE)
    if drawn:
        _log_scale(axis, drawn)
        axis.legend(ncols=2, loc="lower left", handlelength=1.2, columnspacing=1.0)
    else:
        axis.text(0.5, 0.5, "no data", transform=axis.transAxes, ha="center", color=GRAY)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that lays itself out and needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def nothing(text: str) -> Figure:
    """A figure that says why there is none."""
    figure = new_figure(6, 1.2)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GRAY, style="italic")
    return figure


def _series(lines: Lines, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that hold a finite value."""
    pairs = [(line.get("step"), line.get(key)) for line in lines]
    finite = sorted(pair for pair in pairs if is_finite(pair[0]) and is_finite(pair[1]))
    table = np.array(finite, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    starts = np.maximum(middle - window // 2, 0)
    ends = np.minimum(middle + window // 2 + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)


def _log_scale(axis: Axes, values: Sequence[np.ndarray]) -> None:
    """Makes the y axis logarithmic with plain numbers on it, or leaves it when a value is not positive."""
    flat = np.concatenate([np.ravel(value) for value in values]) if values else np.zeros(0)
    if not flat.size or flat.min() <= 0:
        return
    decades = math.log10(flat.max() / flat.min())
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    low, high = flat.min(), flat.max()
    if decades < 0.5:  # a nearly flat curve still needs a labeled tick or two around it
        low, high = low / 1.6, high * 1.6
    axis.set_ylim(low / 1.15, high * 1.15)


def _grid(rows: Sequence[Sequence[float | None] | None]) -> np.ndarray:
    """A float array of ragged rows; what is absent or None is NaN."""
    width = max((len(row) for row in rows if row), default=0)
    grid = np.full((len(rows), max(width, 1)), np.nan)
    for index, row in enumerate(rows):
        values = [value if is_finite(value) else np.nan for value in row or []]
        grid[index, : len(values)] = values
    return grid


def _least(angles: Sequence[float | None] | None) -> float:
    finite = [value for value in angles or [] if is_finite(value)]
    return min(finite, default=math.nan)


def _matrix_label(path: str) -> str:
    return path.split("/")[-1]
