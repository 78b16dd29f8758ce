"""Figures of results: each function takes the table (see `results.results_of`) and returns a Figure to save or show.

Lines and bars are means over seeds, whiskers the 95 % intervals of `results.estimate`, small rings the seeds.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from br_jax.experiment.methods import METHODS
from br_jax.report.gates import CLAIMS
from br_jax.report.plots import BLUE, DARK, GRAY, GREEN, ORANGE, PALE, PURPLE, RED, SKY, heat_map, new_figure, styled
from br_jax.report.results import (
    MAIN,
    WORST,
    Estimate,
    Setting,
    by_setting,
    estimate,
    find,
    one_strength,
    rows_of,
)


def _style(color: str, marker: str, dashes: str | tuple) -> dict[str, Any]:
    """Of a line: any one of the three tells it from the others."""
    return {"color": color, "marker": marker, "linestyle": dashes}


_STYLES = {
    "aligned": _style(DARK, "s", ":"),
    "sft": _style(RED, "X", (0, (9, 2))),
    "buffer_only": _style(ORANGE, "^", "--"),
    "reinforce_only": _style(PURPLE, "v", "-."),
    "average": _style(GREEN, "D", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    "ours": _style(BLUE, "o", "-"),
}
_BY_P = [*map(_style, (BLUE, RED, GREEN, ORANGE, SKY), "oXD^s", ("-", "--", "-.", ":", (0, (9, 2))))]
_OTHERS = (GRAY, SKY, PURPLE, GREEN, ORANGE, RED), "Pp*hdv<", ("--", "-.", ":", (0, (9, 2)), (0, (3, 1)))
_WHISKER = {"capsize": 2.5, "elinewidth": 1.1, "clip_on": False}
_WITHOUT_USER = [name for name, method in METHODS.items() if method.of_provider]
Lines = list[tuple[str, dict[str, Any], pd.DataFrame]]  # each line's label, style and cells
_RING = {"linestyle": "none", "marker": "o", "markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.8,
         "clip_on": False}  # fmt: skip
_PANELS = {  # score: its title and the color of its bars
    "harmful": ("Harmful score HS, %\n(lower is safer)", RED),
    "task": ("Task accuracy FA, %\n(higher is better)", BLUE),
    "over_refusal": ("Over-refusal, %\n(lower is better)", ORANGE),
}
SKILL = 0.8  # of the plain undefended user's task, that an attacker wants to keep


def draw_results(results: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that a table has the rows for, by the name of its file."""
    found = [figure for setting, _ in by_setting(results) for figure in figures_of(results, setting)]
    return {name: draw() for name, draw in {name: draw for name, _, draw in found}.items()}  # some share a figure


def figures_of(results: pd.DataFrame, setting: Setting) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """The figures of a setting: the name of each one's file, what it shows, and how it is drawn."""

    def alike(axis: str) -> pd.DataFrame:  # the cells of settings that differ from this one in `axis` alone
        same = [name for name in Setting._fields if name != axis]
        return results[(results[same] == [getattr(setting, name) for name in same]).all(axis=1)]

    cells, sizes, users = alike(""), alike("n"), alike("user")
    one_p = cells.p.nunique() == 1
    if not one_p:
        words = "HS and FA against the share of harmful rows"
        yield name_of("p", setting), words, partial(share_figure, cells, str(setting))
    if cells.a[cells.method == "ours"].nunique() > 1:
        words = "HS, FA and over-refusal against the strength of the QR merge"
        yield name_of("a", setting), words, partial(strength_figure, cells, str(setting))
    any_n, any_user = setting._replace(n=0), setting._replace(user="plain")
    for p, at_p in cells.groupby("p"):
        compared = at_p.method.nunique() > 3
        measured = (compared or one_p) and at_p.margin_harmful.notna().any()
        by_n = sizes.n[sizes.p == p].nunique() > 1
        by_user = users.user[users.p == p].nunique() > 1
        for name, shown, draw, table, of, words in (
            ("methods", compared or one_p, methods_figure, cells, setting, "HS, FA and over-refusal of every method"),
            ("pareto", compared and p < 1, pareto_figure, cells, setting, "HS against FA of every method"),
            ("margins", measured, margins_figure, cells, setting, "Refusal margins of every method"),
            ("n", by_n, size_figure, sizes, any_n, "HS and FA against the number of user rows"),
            ("attackers", by_user, attackers_figure, users, any_user, "HS of every method against every kind of user"),
        ):  # fmt: skip
            if shown:
                title = f"{of}, p = {p:g}".replace(", n = 0,", ",")
                yield name_of(name, of, p), f"{words} at p = {p:g}", partial(draw, table, p, title)


def name_of(kind: str, setting: Setting, p: float | None = None) -> str:
    """The name of a figure's file, of letters that need no quoting in a link; its n and p where it has one."""
    parts = [kind, setting.model_name, setting.task, setting.topic]
    parts += [setting.user] if setting.user != "plain" else []
    parts += ([f"n{setting.n}"] if kind != "n" else []) + ([f"p{p:g}"] if p is not None else [])
    return "-".join("".join(char if char.isalnum() else "_" for char in part) for part in parts)


@styled
def share_figure(cells: pd.DataFrame, title: str = "") -> Figure:
    """HS and FA against the share of harmful rows p, a line a method; no FA at p = 1, where the user has no task."""
    across = "share of harmful rows p, % (steps not to scale)"
    return _lines_figure(_by_method(one_strength(cells)), "p", MAIN[:2], across, 100, title)


@styled
def size_figure(results: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS and FA against the number of user rows n at one p, a line a method."""
    lines = _by_method(one_strength(results[results.p == p]))
    return _lines_figure(lines, "n", MAIN[:2], "user rows n (steps not to scale)", 1, title)


@styled
def strength_figure(cells: pd.DataFrame, title: str = "") -> Figure:
    """HS, FA and over-refusal of ours against the strength a of the QR merge, a line a p."""
    parts = cells[cells.method == "ours"].groupby("p")
    lines = [(f"p = {p:g}", style, part) for (p, part), style in zip(parts, itertools.cycle(_BY_P), strict=False)]
    return _lines_figure(lines, "a", MAIN, "strength a of the QR merge (steps not to scale)", 1, title)


@styled
def methods_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS, FA and over-refusal of every method at one p, as bars; dashed where a gate begins to fail."""
    rows = rows_of(cells[cells.p == p])
    labels, ours = [row.label.iloc[0] for row in rows], [row.method.iloc[0] == "ours" for row in rows]
    figure = new_figure(11.5, 0.38 * len(rows) + 2.2)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (score, (words, color)), claim in zip(axes, _PANELS.items(), CLAIMS, strict=False):
        axis.set(title=words, xlim=(0, 126), xticks=range(0, 101, 25))  # room for the number beside a full bar
        axis.spines["bottom"].set_bounds(0, 100)
        axis.tick_params(axis="y", length=0)
        for place, row in enumerate(rows):
            found = _shown(row, score)
            if ours[place]:
                axis.axhspan(place - 0.5, place + 0.5, color=PALE, zorder=0)
            if found is None:
                axis.text(2, place, "n/a", va="center", color=GRAY, style="italic", fontsize=9)
                continue
            axis.barh(place, 100 * found.mean, 0.62, color=color, alpha=1.0 if ours[place] else 0.5, zorder=2)
            end = _spread(axis, found, place, DARK, lying=True)
            axis.text(end + 3, place, f"{100 * found.mean:.1f}", va="center", fontsize=9, zorder=4)
        other, sign = (claim.second, 1) if claim.first == "ours" else (claim.first, -1)
        base = _shown(find(cells, p, other), score)
        if base and p <= claim.most_p:
            limit = 100 * (base.mean + sign * claim.limit)
            axis.axvline(limit, color=DARK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
            points = f"{100 * sign * claim.limit:+.0f} points"
            axis.set_xlabel(f"dashed: limit for ours\n({METHODS[other].label} {points})")
    axes[0].set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5))
    for text, bold in zip(axes[0].get_yticklabels(), ours, strict=True):
        text.set_fontweight("bold" if bold else "normal")
    return _finished(figure, title, [])


@styled
def margins_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """The mean refusal margin of harmful prompts against that of benign ones, a point a method, at one p."""
    figure = new_figure(10.4, 6.0)
    axis = figure.subplots()
    keys, _ = _points(axis, cells[cells.p == p], "margin_benign", "margin_harmful", 1)
    axis.set(xlabel="of benign prompts (left: answered)", ylabel="of harmful prompts (up: refused)")
    axis.set_title("Refusal margin, log-odds of the first token")
    for line in (axis.axvline, axis.axhline):
        line(0, color=PALE, linewidth=1.2, zorder=0)
    return _finished(figure, title, keys)


@styled
def pareto_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS against FA, a point a method, at one p; the line joins those that no other beats in both.

    The aligned base, which has no user's task, is a line at its HS.
    """
    figure = new_figure(10.4, 6.0)
    axis = figure.subplots()
    keys, means = _points(axis, cells[(cells.p == p) & ~cells.method.isin(_WITHOUT_USER)], "FA", "HS", 100)
    best = [
        (task, harmful)
        for task, harmful in sorted(means)
        if not any(t >= task and h <= harmful and (t, h) != (task, harmful) for t, h in means)
    ]
    axis.plot(*np.reshape(best, (-1, 2)).T, color=PALE, linewidth=6, zorder=0)
    if base := _shown(find(cells, p, "aligned"), "harmful"):
        style = _STYLES["aligned"] | {"marker": "", "linewidth": 1.4, "label": f"{METHODS['aligned'].label}'s HS"}
        keys.append(axis.axhline(100 * base.mean, **style, zorder=1))
    axis.set(xlabel="task accuracy FA, % (right is better)", ylabel="harmful score HS, % (down is safer)")
    axis.set_ylim(bottom=-3)
    axis.set_title("Safety against the task (thick: what no other beats in both)")
    axis.grid(color=PALE)
    return _finished(figure, title, keys)


@styled
def attackers_figure(results: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS of each method against each kind of user, as a map; the worse of the plain questions and the user's own.

    In brackets where a user's model has less than `SKILL` of the task that the plain one under SFT has (below p = 1),
    for an attacker wants that, too. The last line is the worst of the others.
    """
    chosen = pd.concat(one_strength(cells) for _, cells in results[results.p == p].groupby("user"))
    users, labels = chosen.user.unique().tolist(), chosen.label.unique().tolist()
    values, kept = np.full((len(users), len(labels)), np.nan), np.ones((len(users), len(labels)), bool)
    skill = _shown(find(chosen[chosen.user == "plain"], p, "sft"), "task")  # at p = 1 nobody has a task
    for (user, label), row in chosen.groupby(["user", "label"]):
        place = users.index(user), labels.index(label)
        worst, task = estimate(row, WORST), _shown(row, "task")
        values[place] = 100 * worst.mean if worst else np.nan
        if skill and task and row.method.iloc[0] not in _WITHOUT_USER:
            kept[place] = task.mean >= SKILL * skill.mean
    worst = np.where(np.isnan(values) | ~kept, -1, values).max(axis=0)
    values = np.vstack([values, np.where(worst < 0, np.nan, worst)])
    kept = np.vstack([kept, np.ones(len(labels), bool)])
    words = [
        [
            "" if math.isnan(value) else f"{value:.0f}" if keeps else f"({value:.0f})"
            for value, keeps in zip(*line, strict=True)
        ]
        for line in zip(values, kept, strict=True)
    ]
    figure = new_figure(max(6.5, 3.2 + 0.95 * len(labels)), 2.8 + 0.34 * len(values))
    axis = figure.subplots()
    heat_map(axis, values, words, "OrRd", 100, light=True)
    axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(values)), [*users, "worst of those that keep the task"])
    axis.set_title("Harmful score HS, %, mean over seeds\n(white: not run; in brackets: the task is lost)")
    axis.tick_params(length=0)
    figure.suptitle(title, wrap=True)
    return figure


def _lines_figure(lines: Lines, column: str, scores: Sequence[str], across: str, scale: int, title: str) -> Figure:
    """A panel a score; every line a little beside the others, so that whiskers do not hide each other."""
    ticks = sorted({x for _, _, cells in lines for x in cells[column]})
    figure = new_figure(max(4.0, 1.0 + 0.6 * len(ticks)) * len(scores) + 0.6, 4.6)
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axis, score in zip(axes, scores, strict=True):
        for index, (label, style, cells) in enumerate(lines):
            places = np.arange(len(ticks)) + 0.6 * ((index + 0.5) / len(lines) - 0.5)
            estimates = [_shown(cells[cells[column] == x], score) for x in ticks]
            means = [100 * found.mean if found else math.nan for found in estimates]  # NaN: a gap in the line
            axis.plot(places, means, **style, markersize=6, label=label, zorder=3, clip_on=False)
            for place, found in zip(places, estimates, strict=True):
                if found:
                    _spread(axis, found, place, style["color"])
        axis.set(title=_PANELS[score][0], xlabel=across, xlim=(-0.5, len(ticks) - 0.5))
        axis.set_xticks(range(len(ticks)), [f"{scale * x:g}" for x in ticks])
        for between in range(1, len(ticks)):
            axis.axvline(between - 0.5, color=PALE, linewidth=1.0, zorder=0)
        axis.grid(axis="y", color=PALE)
    axes[0].set(ylim=(-3, 103), yticks=range(0, 101, 25))
    return _finished(figure, title, [Line2D([], [], **style, markersize=6, label=label) for label, style, _ in lines])


def _spread(axis: Axes, found: Estimate, place: float, color: str, lying: bool = False) -> float:
    """Draws an estimate's interval and its seeds at a place; returns the end of them."""
    mean, low, high = (100 * value for value in found[:3])
    each = [100 * value for value in found.by_seed.values()]
    whisker, rings = [[mean - low], [high - mean]], [place] * len(each)
    if lying:
        axis.errorbar(mean, place, xerr=whisker, color=color, zorder=3, **_WHISKER)
        axis.plot(each, rings, markeredgecolor=color, zorder=4, **_RING)
    else:
        axis.errorbar(place, mean, yerr=whisker, color=color, **_WHISKER)
        axis.plot(rings, each, markeredgecolor=color, zorder=2, **_RING)
    return max(high, *each)


def _points(axis: Axes, cells: pd.DataFrame, x: str, y: str, scale: int) -> tuple[list[Line2D], list[tuple]]:
    """Draws rows as their mean with a ring a seed; returns the key and the mean of those that have any."""
    keys, means = [], []
    for index, row in enumerate(rows_of(cells)):
        both = scale * row[[x, y]].dropna()
        if both.empty:
            continue
        style = _style_of(row.method.iloc[0], index) | {"linestyle": "none", "markersize": 7}
        axis.plot(both[x], both[y], **_RING | {"markeredgecolor": style["color"]})
        means.append(tuple(both.mean()))
        axis.plot(*means[-1], **style, zorder=3)
        keys.append(Line2D([], [], **style, label=row.label.iloc[0]))
    return keys, means


def _shown(row: pd.DataFrame, score: str) -> Estimate | None:
    """What is drawn of a row's score: no FA at p = 1, where the user has no task."""
    return None if score == "task" and (row.p == 1).any() else estimate(row, score)


def _finished(figure: Figure, title: str, keys: list[Line2D]) -> Figure:
    """The figure with its title and the key to its lines and rings."""
    ring = Line2D([], [], markeredgecolor=DARK, zorder=4, **_RING, label="a seed")
    figure.legend(handles=[*keys, ring], loc="outside lower center", ncols=4)
    figure.suptitle(title, wrap=True)
    return figure


def _by_method(cells: pd.DataFrame) -> Lines:
    """A line a method, in the order of `_STYLES`."""
    order = [*_STYLES, *cells.method.unique()]
    ranked = cells.assign(rank=cells.method.map(order.index)).sort_values("rank", kind="stable")
    parts = ranked.groupby(["method", "label"], sort=False)
    return [(label, _style_of(method, index), part) for index, ((method, label), part) in enumerate(parts)]


def _style_of(method: str, index: int) -> dict[str, Any]:
    """A method's own style, or that of an index where it has none: of 42 in a row no two are alike."""
    return _STYLES.get(method) or _style(*(each[index % len(each)] for each in _OTHERS))
