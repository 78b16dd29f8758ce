"""How figures look: one style and palette, and how they are written. Nothing here touches pyplot or a display."""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from br_jax.scoring.statistics import is_finite

T = TypeVar("T")

# Okabe and Ito's palette, which readers with any color vision tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
DARK, GRAY, PALE = "#222222", "#8A8A8A", "#EFEFEF"
_STYLE = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 10.5, "axes.labelsize": 10,
    "figure.titlesize": 12.5, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRAY, "text.color": DARK,
    "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK, "legend.frameon": False,
    "pdf.fonttype": 42, "lines.linewidth": 1.8,
}  # fmt: skip


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
    """Writes a figure as stem.png (150 dpi) and stem.pdf, without times or versions: the same data, the same bytes."""
    kinds = {
        ".png": {"dpi": 150, "metadata": {"Software": None}},
        ".pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    }
    files = [stem.with_suffix(ending) for ending in kinds]
    for file, settings in zip(files, kinds.values(), strict=True):
        drawn = io.BytesIO()  # where a disk is full, matplotlib would raise an error of its own
        figure.savefig(drawn, format=file.suffix[1:], **settings)
        file.write_bytes(drawn.getvalue())
    return files


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that lays itself out and needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(
    count: int, columns: int, size: tuple[float, float], around: tuple[float, float] = (0, 0), **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, row by row: the size of one and what is around them, in inches."""
    rows = math.ceil(count / columns)
    figure = new_figure(size[0] * columns + around[0], size[1] * rows + around[1])
    axes = [*figure.subplots(rows, columns, squeeze=False, **shared).flat]
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def key_below(figure: Figure, columns: int, title: str, keys: Sequence[Any] | None = None) -> Figure:
    """The figure with its title and, below, the key to what is drawn, by default the labels of the first panel."""
    keys = figure.axes[0].get_legend_handles_labels()[0] if keys is None else keys
    figure.legend(handles=keys, loc="outside lower center", ncols=columns)
    figure.suptitle(title, wrap=True)
    return figure


def whole_ticks(axis: Axes, most: int | str = "auto", **options: Any) -> None:
    """Ticks at whole numbers across."""
    axis.xaxis.set_major_locator(MaxNLocator(most, integer=True, **options))


def heat_map(
    axis: Axes, grid: np.ndarray, words: Sequence[Sequence[str]] | None, colors: str, high: float, light: bool = False
) -> AxesImage:
    """Draws a grid (pale: NaN) on a scale from 0 with words in its cells, white on the dark half of the colors."""
    scale = matplotlib.colormaps[colors].with_extremes(bad="white" if light else PALE)
    image = axis.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap=scale, vmin=0.0, vmax=high)
    for (row, column), value in np.ndenumerate(grid) if words else ():
        dark = value > 0.6 * high if light else value < 0.5 * high
        ink = "white" if dark else DARK if light else "black"
        axis.text(column, row, words[row][column], ha="center", va="center", fontsize=8 + light, color=ink)
    axis.spines[:].set_visible(False)
    return image


def nothing(text: str) -> Figure:
    """A figure that says why there is none."""
    figure = new_figure(6, 1.2)
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GRAY, style="italic")
    return figure


@styled
def spectra_figure(spectra: Mapping[str, Sequence[Sequence[float]]], title: str = "") -> Figure:
    """Singular values of an adapter's delta by target and layer, descending; thin: each layer, thick: their median.

    Those that f32 cannot tell from zero beside the largest are left out.
    """
    grids = {name: grid_of(layers) for name, layers in spectra.items()}
    largest = max((np.nanmax(grid, initial=0.0) for grid in grids.values()), default=0.0)
    if largest <= 0:
        return nothing("no singular value but zero")
    columns = math.ceil(len(grids) / math.ceil(len(grids) / 4))
    figure, axes = panels(len(grids), columns, (max(3.1, 4.8 / columns), 2.7), (1.2, 0.9), sharex=True, sharey=True)
    depth = max(len(grid) for grid in grids.values())
    palette = matplotlib.colors.ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))  # no yellow
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, max(depth - 1, 1)), palette)
    drawn = []
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        lines = [*grid, np.median(grid, axis=0)]
        styles = [{"color": colors.to_rgba(layer), "linewidth": 0.8, "alpha": 0.8} for layer in range(len(grid))]
        for values, style in zip(lines, [*styles, {"color": DARK, "linewidth": 2.6}], strict=True):
            shown = values[values > 1e-6 * largest]
            axis.plot(range(1, len(shown) + 1), shown, marker="." if len(shown) == 1 else None, **style)
            drawn.append(shown)
        axis.set_title(name)
        whole_ticks(axis, 5, min_n_ticks=1)
        axis.grid(axis="y", color=PALE)
    for axis in axes[-columns:]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    axes[0].set_xlim(0.5, max(map(len, drawn)) + 0.5)
    log_scale(axes[0], drawn)
    figure.colorbar(colors, ax=axes, label="layer", ticks=MaxNLocator(6, integer=True), aspect=30, pad=0.02)
    figure.suptitle(title, wrap=True)
    figure.supxlabel("index (thick: median over layers)", fontsize=10)
    figure.supylabel("singular value (log scale)", fontsize=10)
    return figure


def log_scale(axis: Axes, values: Sequence[np.ndarray]) -> None:
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


def grid_of(rows: Sequence[Sequence[float | None] | None]) -> np.ndarray:
    """A float array of ragged rows; what is absent or None is NaN."""
    width = max((len(row) for row in rows if row), default=0)
    grid = np.full((len(rows), max(width, 1)), np.nan)
    for index, row in enumerate(rows):
        values = [value if is_finite(value) else np.nan for value in row or []]
        grid[index, : len(values)] = values
    return grid
