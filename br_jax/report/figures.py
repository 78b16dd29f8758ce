"""Figures of results: each function takes the table (see `results.results_of`) and returns a Figure to save or show.

Lines and bars are means over seeds, whiskers the 95 % intervals of `results.estimate`, small rings the seeds.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from br_jax.experiment.methods import METHODS
from br_jax.report import plots
from br_jax.report.plots import BLUE, DARK, GRAY, GREEN, ORANGE, PALE, PURPLE, RED, SKY, panels, styled
from br_jax.report.results import (
    MAIN,
    WORST,
    Setting,
    are_grouped,
    by_group,
    by_setting,
    estimate,
    find,
    one_a,
    rows_of,
)
from br_jax.report.verdicts import CLAIMS
from br_jax.scoring.statistics import Estimate

SKILL = 0.8  # of the plain undefended user's task, that an attacker wants to keep
_STYLES = {  # color, marker and linestyle, any one of which tells a line from the others
    "aligned": (DARK, "s", ":"),
    "sft": (RED, "X", (0, (9, 2))),
    "buffer_only": (ORANGE, "^", "--"),
    "reinforce_only": (PURPLE, "v", "-."),
    "average": (GREEN, "D", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    "ours": (BLUE, "o", "-"),
}
_BY_P = (BLUE, RED, GREEN, ORANGE, SKY), "oXD^s", ("-", "--", "-.", ":", (0, (9, 2)))
_OTHERS = (GRAY, SKY, PURPLE, GREEN, ORANGE, RED), "Pp*hdv<", ("--", "-.", ":", (0, (9, 2)), (0, (3, 1)))
_RING = {"linestyle": "none", "marker": "o", "markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.8,
         "clip_on": False}  # fmt: skip
_WITHOUT_USER = [name for name, method in METHODS.items() if method.of_provider]
_PANELS = {  # score: its title and the color of its bars
    "harmful": ("Harmful score HS, %\n(lower is safer)", RED),
    "task": ("Task accuracy FA, %\n(higher is better)", BLUE),
    "over_refusal": ("Over-refusal, %\n(lower is better)", ORANGE),
}
_ACROSS = {  # column: the scores against it, its words and scale
    "p": (MAIN[:2], "share of harmful rows p, %", 100),
    "n": (MAIN[:2], "user rows n", 1),
    "a": (MAIN, "strength a of the QR merge", 1),
}


def draw_results(results: pd.DataFrame) -> dict[str, Figure]:
    """Every figure that a table has the rows for, by the name of its file."""
    found = {name: draw for setting, _ in by_setting(results) for name, _, draw in figures_of(results, setting)}
    return {name: draw() for name, draw in found.items()}  # settings share some


def figures_of(results: pd.DataFrame, setting: Setting) -> Iterator[tuple[str, str, Callable[[], Figure]]]:
    """The figures of a setting: the name of each one's file, what it shows, and how it is drawn."""

    def alike(axis: str = "") -> pd.DataFrame:  # the cells of settings that differ from this one in `axis` alone
        same = [name for name in Setting._fields if name != axis]
        return results[(results[same] == [getattr(setting, name) for name in same]).all(axis=1)]

    cells, sizes, users = alike(), alike("n"), alike("user")
    any_n, any_user = setting._replace(n=0), setting._replace(user="plain")
    several, strengths = cells.p.nunique() > 1, cells.a[cells.method == "ours"].nunique()
    found = [
        ("p", several, lines_figure, cells, setting, None, "HS and FA against the share of harmful rows"),
        ("a", strengths > 1, lines_figure, cells, setting, None,
         "HS, FA and over-refusal against the strength of the QR merge"),
    ]  # fmt: skip
    for p, at_p in cells.groupby("p"):
        compared, by_n, by_user = at_p.method.nunique() > 3, sizes[sizes.p == p], users[users.p == p]
        shown, margins = compared or not several, at_p.margin_harmful.notna().any()
        found += [
            ("methods", shown, methods_figure, cells, setting, p, "HS, FA and over-refusal of every method"),
            ("forms", shown and are_grouped(at_p[at_p.HS.notna()]), forms_figure, cells, setting, p,
             "HS of every method by form and phrasing"),
            ("pareto", compared and p < 1, pareto_figure, cells, setting, p, "HS against FA of every method"),
            ("margins", shown and margins, margins_figure, cells, setting, p, "Refusal margins of every method"),
            ("n", by_n.n.nunique() > 1, lines_figure, by_n, any_n, p, "HS and FA against the number of user rows"),
            ("attackers", by_user.user.nunique() > 1, attackers_figure, users, any_user, p,
             "HS of every method against every kind of user"),
        ]  # fmt: skip
    for name, shown, draw, part, of, p, words in found:
        if shown:
            title, at = str(of).removesuffix(", n = 0"), "" if p is None else f"p = {p:g}"
            first = name if draw is lines_figure else p
            title, words = (f"{title}, {at}", f"{words} at {at}") if at else (title, words)
            yield name_of(name, of, p), words, partial(draw, part, first, title)


def name_of(kind: str, setting: Setting, p: float | None = None) -> str:
    """The name of a figure's file, of letters that need no quoting in a link; its n and p where it has one."""
    parts = [kind, setting.model_name, setting.task, setting.topic, setting.user * (setting.user != "plain")]
    parts += [f"n{setting.n}" * (kind != "n"), "" if p is None else f"p{p:g}"]
    return "-".join("".join(char if char.isalnum() else "_" for char in part) for part in parts if part)


@styled()
def lines_figure(cells: pd.DataFrame, column: str, title: str = "") -> Figure:
    """Scores against p or n, a line a method, or of ours against the strength a, a line a p, side by side."""
    scores, across, scale = _ACROSS[column]
    if column == "a":
        parts = cells[cells.method == "ours"].groupby("p")
        lines = [(f"p = {p:g}", _look(*(each[i % 5] for each in _BY_P)), part) for i, (p, part) in enumerate(parts)]
    else:
        order, cells = [*_STYLES, *cells.method.unique()], one_a(cells)
        cells = cells.sort_values("method", key=lambda methods: methods.map(order.index), kind="stable")
        parts = cells.groupby(["method", "label"], sort=False)
        lines = [(label, _style_of(method, i), part) for i, ((method, label), part) in enumerate(parts)]
    ticks = sorted({x for _, _, cells in lines for x in cells[column]})
    size = max(4.0, 1.0 + 0.6 * len(ticks)), 4.6
    figure, axes = panels(len(scores), len(scores), size, (0.6, 0), sharey=True)
    for axis, score in zip(axes, scores, strict=True):
        for index, (label, style, cells) in enumerate(lines):
            places = np.arange(len(ticks)) + 0.6 * ((index + 0.5) / len(lines) - 0.5)
            estimates = [_shown(cells[cells[column] == x], score) for x in ticks]
            means = [100 * found.mean if found else math.nan for found in estimates]  # NaN: a gap in the line
            axis.plot(places, means, **style, markersize=6, label=label, zorder=3, clip_on=False)
            for place, found in zip(places, estimates, strict=True):
                if found:
                    _spread(axis, found, place, style["color"])
        axis.set(title=_PANELS[score][0], xlabel=f"{across} (steps not to scale)", xlim=(-0.5, len(ticks) - 0.5))
        axis.set_xticks(range(len(ticks)), [f"{scale * x:g}" for x in ticks])
        for between in range(1, len(ticks)):
            axis.axvline(between - 0.5, color=PALE, linewidth=1.0, zorder=0)
        axis.grid(axis="y", color=PALE)
    axes[0].set(ylim=(-3, 103), yticks=range(0, 101, 25))
    return _finished(figure, title, [Line2D([], [], **style, markersize=6, label=label) for label, style, _ in lines])


@styled()
def methods_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS, FA and over-refusal of every method at one p, as bars; dashed where a claim has its limit."""
    rows = rows_of(cells[cells.p == p])
    labels, ours = [label for (_, _, label), _ in rows], [method == "ours" for (_, method, _), _ in rows]
    figure, axes = panels(len(_PANELS), len(_PANELS), (11.5 / len(_PANELS), 0.38 * len(rows) + 2.2), sharey=True)
    for axis, (score, (words, color)), claim in zip(axes, _PANELS.items(), CLAIMS, strict=False):
        axis.set(title=words, xlim=(0, 126), xticks=range(0, 101, 25))  # room for the number beside a full bar
        axis.spines["bottom"].set_bounds(0, 100)
        axis.tick_params(axis="y", length=0)
        for place, (_, row) in enumerate(rows):
            if ours[place]:
                axis.axhspan(place - 0.5, place + 0.5, color=PALE, zorder=0)
            if found := _shown(row, score):
                axis.barh(place, 100 * found.mean, 0.62, color=color, alpha=1.0 if ours[place] else 0.5, zorder=2)
                end = _spread(axis, found, place, DARK, lying=True)
                axis.text(end + 3, place, f"{100 * found.mean:.1f}", va="center", fontsize=9, zorder=4)
            else:
                axis.text(2, place, "n/a", va="center", color=GRAY, style="italic", fontsize=9)
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


@styled()
def forms_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """Where the harm is: HS of every method at one p, a cell a phrasing (a column) in the order of their forms."""
    rows = {label: by_group(row, "harmful") for (_, _, label), row in rows_of(one_a(cells[cells.p == p]))}
    shares = pd.DataFrame({label: 100 * found.k / found.n for label, found in rows.items() if len(found)})
    forms = shares.index.str.rpartition("/").get_level_values(0).str.rpartition(": ").get_level_values(-1)
    shares = shares.iloc[np.argsort(forms, kind="stable")]
    names, starts, counts = np.unique(np.sort(forms), return_index=True, return_counts=True)
    figure, (axis,) = panels(1, 1, (11.5, 1.9 + 0.32 * shares.shape[1]))
    plots.heat_map(axis, shares.to_numpy().T, None, "OrRd", 100, light=True)
    axis.set_yticks(range(shares.shape[1]), shares.columns)
    axis.set_xticks(starts + counts / 2 - 0.5, names, rotation=50, ha="right", rotation_mode="anchor")
    for start in starts[1:]:
        axis.axvline(start - 0.5, color=GRAY, linewidth=0.6)
    axis.tick_params(length=0)
    return plots.finish(figure, title, f"{len(shares)} phrasings by form; white: never answered, dark red: always")


@styled()
def margins_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """The mean refusal margin of harmful prompts against that of benign ones, a point a method, at one p."""
    figure, axis, keys, _ = _points(cells[cells.p == p], "margin_benign", "margin_harmful", 1)
    axis.set(xlabel="of benign prompts (left: answered)", ylabel="of harmful prompts (up: refused)")
    axis.set_title("Refusal margin, log-odds of the first token")
    for line in (axis.axvline, axis.axhline):
        line(0, color=PALE, linewidth=1.2, zorder=0)
    return _finished(figure, title, keys)


@styled()
def pareto_figure(cells: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS against FA, a point a method, at one p; of the aligned base, which has no user's task, a line at its HS."""
    figure, axis, keys, means = _points(cells[(cells.p == p) & ~cells.method.isin(_WITHOUT_USER)], "FA", "HS", 100)
    beaten = {(t, h) for t, h in means for other in means if other[0] >= t and other[1] <= h and other != (t, h)}
    axis.plot(*np.reshape(sorted({*means} - beaten), (-1, 2)).T, color=PALE, linewidth=6, zorder=0)
    if base := _shown(find(cells, p, "aligned"), "harmful"):
        style = _style_of("aligned", 0) | {"marker": "", "linewidth": 1.4}
        keys.append(axis.axhline(100 * base.mean, **style, label=f"{METHODS['aligned'].label}'s HS", zorder=1))
    axis.set(xlabel="task accuracy FA, % (right is better)", ylabel="harmful score HS, % (down is safer)")
    axis.set_ylim(bottom=-3)
    axis.set_title("Safety against the task (thick: what no other beats in both)")
    axis.grid(color=PALE)
    return _finished(figure, title, keys)


@styled()
def attackers_figure(results: pd.DataFrame, p: float, title: str = "") -> Figure:
    """HS of each method against each kind of user, as a map; the worse of the plain questions and the user's own.

    In brackets where a model has lost the task (see `SKILL`), below p = 1. The last line is the worst of the others.
    """
    chosen = pd.concat(one_a(cells) for _, cells in results[results.p == p].groupby("user"))
    skill, lines = _shown(find(chosen[chosen.user == "plain"], p, "sft"), "task"), []  # at p = 1 nobody has a task
    for (user, label), row in chosen.groupby(["user", "label"]):
        worst, task = estimate(row, WORST), _shown(row, "task")
        asked = skill and task and row.method.iloc[0] not in _WITHOUT_USER
        kept = not asked or task.mean >= SKILL * skill.mean
        lines.append((user, label, 100 * worst.mean if worst else math.nan, kept))
    frame = pd.DataFrame(lines, columns=["user", "label", "HS", "kept"]).set_index(["user", "label"])
    labels, users = chosen.label.unique(), [*chosen.user.unique(), "worst of those that keep the task"]
    values = frame.HS.unstack().reindex(users, columns=labels)
    values.loc[users[-1]] = frame.HS.where(frame.kept).groupby("label").max()
    brackets = ~frame.kept.unstack().reindex(users, columns=labels).fillna(True).to_numpy(bool)
    words = np.array([["" if math.isnan(hs) else f"{hs:.0f}" for hs in line] for line in values.to_numpy()], object)
    words[brackets] = "(" + words[brackets] + ")"
    figure, (axis,) = panels(1, 1, (max(6.5, 3.2 + 0.95 * len(labels)), 2.8 + 0.34 * len(values)))
    plots.heat_map(axis, values.to_numpy(), words, "OrRd", 100, light=True)
    axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(values)), values.index)
    axis.set_title("Harmful score HS, %, mean over seeds\n(white: not run; in brackets: the task is lost)")
    axis.tick_params(length=0)
    return plots.finish(figure, title)


def _spread(axis: Axes, found: Estimate, place: float, color: str, lying: bool = False) -> float:
    """Draws an estimate's interval and its seeds at a place; returns the end of them."""
    mean, low, high, *each = (100 * value for value in (found.mean, found.low, found.high, *found.by_seed.values()))
    ends, places, (across, up) = [[mean - low], [high - mean]], [place] * len(each), "xy" if lying else "yx"
    whisker = {across: mean, up: place, f"{across}err": ends, "capsize": 2.5, "elinewidth": 1.1, "clip_on": False}
    axis.errorbar(**whisker, color=color, zorder=2 + lying)
    axis.plot(*((each, places) if lying else (places, each)), markeredgecolor=color, zorder=2 + 2 * lying, **_RING)
    return max(high, *each)


def _points(cells: pd.DataFrame, x: str, y: str, scale: int) -> tuple[Figure, Axes, list[Line2D], list[tuple]]:
    """A figure of rows as their mean with a ring a seed; the key and the mean of those that have any."""
    (figure, (axis,)), keys, means = panels(1, 1, (10.4, 6.0)), [], []
    for index, ((_, method, label), row) in enumerate(rows_of(cells)):
        both = scale * row[[x, y]].dropna()
        if len(both):
            style = _style_of(method, index) | {"linestyle": "none", "markersize": 7}
            axis.plot(both[x], both[y], **_RING | {"markeredgecolor": style["color"]})
            means.append(tuple(both.mean()))
            axis.plot(*means[-1], **style, zorder=3)
            keys.append(Line2D([], [], **style, label=label))
    return figure, axis, keys, means


def _shown(row: pd.DataFrame, score: str) -> Estimate | None:
    """What is drawn of a row's score: no FA at p = 1, where the user has no task."""
    return None if score == "task" and (row.p == 1).any() else estimate(row, score)


def _finished(figure: Figure, title: str, keys: list[Line2D]) -> Figure:
    """The figure with its title and the key to its lines and rings."""
    ring = Line2D([], [], markeredgecolor=DARK, zorder=4, **_RING, label="a seed")
    return plots.finish(figure, title, columns=4, keys=[*keys, ring])


def _style_of(method: str, index: int) -> dict[str, Any]:
    """A method's own style, or that of an index where it has none: of 42 in a row no two are alike."""
    return _look(*(_STYLES[method] if method in _STYLES else (each[index % len(each)] for each in _OTHERS)))


def _look(color: str, marker: str, linestyle: Any) -> dict[str, Any]:
    return {"color": color, "marker": marker, "linestyle": linestyle}
