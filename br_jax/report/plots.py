"""How figures look: one style and palette, and the parts that they share. Nothing here touches pyplot or a display."""

import contextlib
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

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
_FILES = {  # without times or versions
    "png": {"dpi": 150, "metadata": {"Software": None}},
    "pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
}


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Has figures drawn in the report's style, whatever the caller's own settings are, and puts those back."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@styled()
def encode(figure: Figure) -> dict[str, bytes]:
    """A figure's files by kind, "png" (150 dpi) and "pdf": the same data, the same bytes."""
    files = {kind: io.BytesIO() for kind in _FILES}
    for kind, file in files.items():
        figure.savefig(file, format=kind, **_FILES[kind])
    return {kind: file.getvalue() for kind, file in files.items()}


def panels(
    count: int, columns: int, size: tuple[float, float], around: tuple[float, float] = (0, 0), **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, row by row: the size of one and what is around them, in inches."""
    rows = math.ceil(count / columns)
    figure = Figure((size[0] * columns + around[0], size[1] * rows + around[1]), layout="constrained")
    FigureCanvasAgg(figure)  # needs no display
    axes = [*figure.subplots(rows, columns, squeeze=False, **shared).flat]
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def nothing(text: str) -> Figure:
    """A figure that says why there is none."""
    figure, (axis,) = panels(1, 1, (6, 1.2))
    axis.set_axis_off()
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GRAY, style="italic")
    return figure


def finish(
    figure: Figure, title: str, across: str = "", up: str = "", columns: int = 0, keys: Sequence | None = None
) -> Figure:
    """The figure with its title, its axes' common words and, in so many columns, a key, else the first panel's."""
    if columns:
        keys = figure.axes[0].get_legend_handles_labels()[0] if keys is None else keys
        figure.legend(handles=keys, loc="outside lower center", ncols=columns)
    figure.suptitle(title, wrap=True)
    if across:
        figure.supxlabel(across, fontsize=10)
        figure.supylabel(up, fontsize=10)
    return figure


def draw_lines(axis: Axes, lines: Sequence[tuple], ticks: dict[str, Any] | int = 5, **labels: Any) -> None:
    """Draws lines, (x, y, style) each, over at most so many whole numbers, on a pale grid."""
    for x, y, style in lines:
        axis.plot(x, y, **style)
    axis.set(**labels)
    axis.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))
    axis.grid(axis="y", color=PALE)


def heat_map(
    axis: Axes, grid: np.ndarray, words: Sequence[Sequence[str]] | None, colors: str, high: float, light: bool = False
) -> AxesImage:
    """Draws a grid (pale: NaN) on a scale from 0 with words in its cells, white on the dark half of the colors."""
    scale = matplotlib.colormaps[colors].with_extremes(bad="white" if light else PALE)
    image = axis.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap=scale, vmin=0.0, vmax=high)
    for (row, column), value in np.ndenumerate(grid) if words is not None else ():
        dark = value > 0.6 * high if light else value < 0.5 * high
        ink = "white" if dark else DARK if light else "black"
        axis.text(column, row, words[row][column], ha="center", va="center", fontsize=8 + light, color=ink)
    axis.spines[:].set_visible(False)
    return image


def log_scale(axis: Axes, values: Sequence[np.ndarray]) -> None:
    """Makes the y axis logarithmic with plain numbers on it, or leaves it when a value is not positive."""
    flat = np.concatenate([np.zeros(0), *values])
    if not flat.size or flat.min() <= 0:
        return
    low, high = flat.min(), flat.max()
    decades = math.log10(high / low)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set(minor_locator=NullLocator(), minor_formatter=NullFormatter())
    around = 1.15 * (1.6 if decades < 0.5 else 1)  # a nearly flat curve still needs a labeled tick or two around it
    axis.set_ylim(low / around, high * around)


def grid_of(rows: Sequence[Sequence[float | None] | None]) -> np.ndarray:
    """A float array of ragged rows; what is absent, None or not finite is NaN."""
    grid = np.array([*itertools.zip_longest(*(row or [None] for row in rows))], float).T
    return np.where(np.isfinite(grid), grid, np.nan)
