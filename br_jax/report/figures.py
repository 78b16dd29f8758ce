"""Figures of a frame: each function takes rows and returns a Figure that a notebook can show too.

Lines and bars are means over seeds, whiskers the 95 % intervals of `frame.estimate`, small rings the seeds.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from br_jax.experiment.methods import METHODS
from br_jax.report.gates import CLAIMS
from br_jax.report.plots import BLUE, DARK, GRAY, GREEN, ORANGE, PALE, PURPLE, RED, SKY, new_figure, styled
from br_jax.report.results import Estimate, Frame, Row, Setting, at_worst, find, one_strength, shares, strengths


def _style(color: str, marker: str, dashes: str | tuple) -> dict[str, Any]:
    """Of a line: any one of the three tells it from the others."""
    return {"color": color, "marker": marker, "linestyle": dashes}


Lines = Mapping[str, tuple[dict, Mapping[float, Row]]]  # label -> its style, and the row at each place across
_LIMITS = {gate.score: gate for gate in CLAIMS}  # drawn where what they compare was run
_STYLES = {
    "aligned": _style(DARK, "s", ":"),
    "sft": _style(RED, "X", (0, (9, 2))),
    "buffer_only": _style(ORANGE, "^", "--"),
    "reinforce_only": _style(PURPLE, "v", "-."),
    "average": _style(GREEN, "D", (0, (6, 1.5, 1, 1.5, 1, 1.5))),
    "ours": _style(BLUE, "o", "-"),
}
SKILL = 0.8  # of the plain undefended user's task, that an attacker wants to keep
_BY_P = list(map(_style, (BLUE, RED, GREEN, ORANGE, SKY), "oXD^s", ("-", "--", "-.", ":", (0, (9, 2)))))
_OTHERS = (GRAY, SKY, PURPLE, GREEN, ORANGE, RED), "Pp*hdv<", ("--", "-.", ":", (0, (9, 2)), (0, (3, 1)))
_WHISKER = {"capsize": 2.5, "elinewidth": 1.1, "clip_on": False}
_RING = {"linestyle": "none", "marker": "o", "markersize": 3.2, "markerfacecolor": "white", "markeredgewidth": 0.8,
         "clip_on": False}  # fmt: skip
_PANELS = {  # score: its title and the color of its bars
    "harmful": ("Harmful score HS, %\n(lower is safer)", RED),
    "task": ("Task accuracy FA, %\n(higher is better)", BLUE),
    "over_refusal": ("Over-refusal, %\n(lower is better)", ORANGE),
}


def draw_frame(frame: Frame) -> dict[str, Figure]:
    """Every figure that a frame has the rows for, by the name of its file.

    For each setting "p-..." where there are several p, "a-..." where there are several a, and "methods-...",
    "pareto-..." (below p = 1) and "margins-..." at each p with more than three methods, and all but the second at the
    only p; for each setting but for its n, and p, "n-..." of several n; but for its user, and p, "attackers-..." of
    several users.
    """
    drawn, sizes, users = {}, defaultdict(dict), defaultdict(dict)
    for setting, rows in frame.items():
        if len(shares(rows)) > 1:
            drawn[name_of("p", setting)] = share_figure(rows, str(setting))
        if len(strengths(rows)) > 1:
            drawn[name_of("a", setting)] = strength_figure(rows, str(setting))
        for p in shares(rows):
            sizes[setting._replace(n=0), p][setting.n] = rows
            users[setting._replace(user="plain"), p][setting.user] = rows
            compared = len({row.method for row in rows if row.p == p}) > 3
            if compared and p < 1:
                drawn[name_of("pareto", setting, p)] = pareto_figure(rows, p, f"{setting}, p = {p:g}")
            if len(shares(rows)) == 1 or compared:
                drawn[name_of("methods", setting, p)] = methods_figure(rows, p, f"{setting}, p = {p:g}")
                if any(row.numbers("margin_harmful") for row in rows if row.p == p):
                    drawn[name_of("margins", setting, p)] = margins_figure(rows, p, f"{setting}, p = {p:g}")
    for (shared, p), by_n in sizes.items():
        if len(by_n) > 1:
            title = f"{str(shared).removesuffix(', n = 0')}, p = {p:g}"
            drawn[name_of("n", shared, p)] = size_figure(by_n, p, title)
    for (shared, p), by_user in users.items():
        if len(by_user) > 1:
            drawn[name_of("attackers", shared, p)] = attackers_figure(by_user, p, f"{shared}, p = {p:g}")
    return drawn


def name_of(kind: str, setting: Setting, p: float | None = None) -> str:
    """The name of a figure's file, of letters that need no quoting in a link; its n and p where it has one."""
    parts = [kind, setting.model_name, setting.task, setting.topic]
    parts += [setting.user] if setting.user != "plain" else []
    parts += ([f"n{setting.n}"] if kind != "n" else []) + ([f"p{p:g}"] if p is not None else [])
    return "-".join("".join(char if char.isalnum() else "_" for char in part) for part in parts)


@styled
def share_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """HS and FA against the share of harmful rows p, a line a method; no FA at p = 1, where the user has no task."""
    lines = _by_method((row.p, row) for row in one_strength(rows))
    return _lines_figure(lines, ("harmful", "task"), "share of harmful rows p, % (steps not to scale)", 100, title)


@styled
def size_figure(by_n: Mapping[int, Sequence[Row]], p: float, title: str = "") -> Figure:
    """HS and FA against the number of user rows n at one p, a line a method."""
    at_p = [(n, row) for n, rows in by_n.items() for row in rows if row.p == p]
    kept = {(row.method, row.a) for row in one_strength(row for _, row in at_p)}
    lines = _by_method((n, row) for n, row in at_p if (row.method, row.a) in kept)
    return _lines_figure(lines, ("harmful", "task"), "user rows n (steps not to scale)", 1, title)


@styled
def strength_figure(rows: Sequence[Row], title: str = "") -> Figure:
    """HS, FA and over-refusal of ours against the strength a of the QR merge, a line a p."""
    lines = {}
    for index, p in enumerate(shares(rows)):
        if points := {row.a: row for row in rows if (row.p, row.method) == (p, "ours")}:
            lines[f"p = {p:g}"] = _BY_P[index % len(_BY_P)], points
    return _lines_figure(lines, tuple(_PANELS), "strength a of the QR merge (steps not to scale)", 1, title)


@styled
def methods_figure(rows: Sequence[Row], p: float, title: str = "") -> Figure:
    """HS, FA and over-refusal of every method at one p, as bars."""
    rows = [row for row in rows if row.p == p]
    figure = new_figure(11.5, 0.38 * len(rows) + 2.2)
    axes = figure.subplots(1, len(_PANELS), sharey=True)
    for axis, (score, (words, color)) in zip(axes, _PANELS.items(), strict=True):
        axis.set(title=words, xlim=(0, 126), xticks=range(0, 101, 25))  # room for the number beside a full bar
        axis.spines["bottom"].set_bounds(0, 100)
        axis.tick_params(axis="y", length=0)
        for place, row in enumerate(rows):
            _bar(axis, place, row, score, color)
        _limit(axis, rows, p, score)
    axes[0].set(yticks=range(len(rows)), yticklabels=[row.label for row in rows], ylim=(len(rows) - 0.5, -0.5))
    for text, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        text.set_fontweight("bold" if row.method == "ours" else "normal")
    return _finished(figure, title, [])


@styled
def margins_figure(rows: Sequence[Row], p: float, title: str = "") -> Figure:
    """The mean refusal margin of harmful prompts against that of benign ones, a point a method, at one p."""
    figure = new_figure(10.4, 6.0)
    axis, points = figure.subplots(), []
    for row in (row for row in rows if row.p == p):
        benign, harmful = (row.numbers(f"margin_{part}") for part in ("benign", "harmful"))
        points.append((row, [(benign[seed], harmful[seed]) for seed in benign.keys() & harmful.keys()]))
    keys = _points(axis, points)
    axis.set(xlabel="of benign prompts (left: answered)", ylabel="of harmful prompts (up: refused)")
    axis.set_title("Refusal margin, log-odds of the first token")
    for line in (axis.axvline, axis.axhline):
        line(0, color=PALE, linewidth=1.2, zorder=0)
    return _finished(figure, title, keys)


@styled
def pareto_figure(rows: Sequence[Row], p: float, title: str = "") -> Figure:
    """HS against FA, a point a method, at one p; the line joins those that no other beats in both.

    The aligned base, which has no user's task, is a line at its HS.
    """
    figure = new_figure(10.4, 6.0)
    axis, points, means = figure.subplots(), [], []
    for row in (row for row in rows if row.p == p and not _has_no_user(row)):
        harmful, task = (row.counted(score) for score in ("harmful", "task"))
        both = [tuple(100 * one[seed]["score"] for one in (task, harmful)) for seed in harmful.keys() & task.keys()]
        points.append((row, both))
        if both:
            means.append(tuple(sum(values) / len(values) for values in zip(*both, strict=True)))
    best = sorted(one for one in means if not any(_beats(other, one) for other in means))
    axis.plot(*zip(*best, strict=True) if best else ([], []), color=PALE, linewidth=6, zorder=0)
    keys = _points(axis, points)
    if base := _shown(find(rows, p, "aligned"), "harmful"):
        style = _STYLES["aligned"] | {"marker": "", "linewidth": 1.4, "label": f"{METHODS['aligned'].label}'s HS"}
        keys.append(axis.axhline(100 * base.mean, **style, zorder=1))
    axis.set(xlabel="task accuracy FA, % (right is better)", ylabel="harmful score HS, % (down is safer)")
    axis.set_ylim(bottom=-3)
    axis.set_title("Safety against the task (thick: what no other beats in both)")
    axis.grid(color=PALE)
    return _finished(figure, title, keys)


@styled
def attackers_figure(by_user: Mapping[str, Sequence[Row]], p: float, title: str = "") -> Figure:
    """HS of each method against each kind of user, as a map; the worse of the plain questions and the user's own.

    In brackets where a user's model has less than `SKILL` of the task that the plain one under SFT has (below p = 1),
    for an attacker wants that, too. The last line is the worst of the others.
    """
    rows = {
        user: {row.label: row for row in one_strength(r for r in found if r.p == p)} for user, found in by_user.items()
    }
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    values = [[_worst(found.get(label)) for label in labels] for found in rows.values()]
    undefended = next((row for row in rows.get("plain", {}).values() if row.method == "sft"), None)
    kept = [[_keeps_skill(found.get(label), undefended) for label in labels] for found in rows.values()]
    worst = np.where(np.logical_or(np.isnan(values), np.logical_not(kept)), -1, values).max(axis=0)
    names, values = [*rows, "worst of those that keep the task"], [*values, np.where(worst < 0, np.nan, worst)]
    kept.append([True] * len(labels))
    figure = new_figure(3.2 + 0.95 * len(labels), 2.6 + 0.34 * len(names))
    axis = figure.subplots()
    axis.imshow(values, cmap="OrRd", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            told = "" if math.isnan(value) else f"{value:.0f}" if kept[y][x] else f"({value:.0f})"
            axis.text(x, y, told, ha="center", va="center", color="white" if value > 60 else DARK, fontsize=9)
    axis.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_title("Harmful score HS, %, mean over seeds (white: not run; in brackets: the task is lost)")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.suptitle(title, wrap=True)
    return figure


def _worst(row: Row | None) -> float:
    """The mean over seeds of the larger of HS and HS in the user's own way, in percent; NaN where it was not run."""
    worst = row and at_worst(row).estimate("harmful")
    return 100 * worst.mean if worst else math.nan


def _keeps_skill(row: Row | None, undefended: Row | None) -> bool:
    """Whether a user's model has at least `SKILL` of the plain undefended one's task; so where there is no user."""
    mine, theirs = (each and _shown(each, "task") for each in (row, undefended))  # at p = 1 nobody has a task
    return not mine or not theirs or _has_no_user(row) or mine.mean >= SKILL * theirs.mean


def _has_no_user(row: Row) -> bool:
    return row.method in METHODS and METHODS[row.method].of_provider


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one (FA, HS) is better in one of both, and not worse in the other."""
    return one != other and one[0] >= other[0] and one[1] <= other[1]


def _points(axis: Axes, points: Iterable[tuple[Row, list[tuple[float, float]]]]) -> list[Line2D]:
    """Draws rows as their mean with a ring a seed; returns the key of those that have any."""
    keys = []
    for index, (row, both) in enumerate(points):
        if not both:
            continue
        style = _style_of(row.method, index) | {"linestyle": "none", "markersize": 7}
        axis.plot(*zip(*both, strict=True), **_RING | {"markeredgecolor": style["color"]})
        axis.plot(*(sum(values) / len(values) for values in zip(*both, strict=True)), **style, zorder=3)
        keys.append(Line2D([], [], **style, label=row.label))
    return keys


def _limit(axis: Axes, rows: Sequence[Row], p: float, score: str) -> None:
    """A dashed line where the gate of a score begins to fail, if what it is measured from was run."""
    rule = _LIMITS[score]
    other, sign = (rule.second, 1) if rule.first == "ours" else (rule.first, -1)
    base = _shown(find(rows, p, other), score)
    if base and p <= rule.most_p:
        axis.axvline(100 * (base.mean + sign * rule.limit), color=DARK, linestyle=(0, (4, 3)), linewidth=1.1, zorder=1)
        axis.set_xlabel(f"dashed: limit for ours\n({METHODS[other].label} {100 * sign * rule.limit:+.0f} points)")


def _bar(axis: Axes, place: int, row: Row, score: str, color: str) -> None:
    if row.method == "ours":
        axis.axhspan(place - 0.5, place + 0.5, color=PALE, zorder=0)
    found = _shown(row, score)
    if found is None:
        axis.text(2, place, "n/a", va="center", color=GRAY, style="italic", fontsize=9)
        return
    value, low, high = 100 * found.mean, 100 * found.low, 100 * found.high
    each = [100 * one for one in found.by_seed.values()]
    axis.barh(place, value, 0.62, color=color, alpha=1.0 if row.method == "ours" else 0.5, zorder=2)
    axis.errorbar(value, place, xerr=[[value - low], [high - value]], color=DARK, zorder=3, **_WHISKER)
    axis.plot(each, [place] * len(each), markeredgecolor=DARK, zorder=4, **_RING)
    axis.text(max(high, *each) + 3, place, f"{value:.1f}", va="center", fontsize=9, zorder=4)


def _lines_figure(lines: Lines, scores: Sequence[str], across: str, scale: int, title: str) -> Figure:
    """A panel a score; every line a little beside the others, so that whiskers do not hide each other."""
    ticks = sorted({x for _, points in lines.values() for x in points})
    figure = new_figure(max(4.0, 1.0 + 0.6 * len(ticks)) * len(scores) + 0.6, 4.6)
    axes = figure.subplots(1, len(scores), sharey=True, squeeze=False)[0]
    for axis, score in zip(axes, scores, strict=True):
        for index, (label, (style, points)) in enumerate(lines.items()):
            aside = 0.6 * ((index + 0.5) / len(lines) - 0.5)
            _line(axis, [(tick + aside, points.get(x)) for tick, x in enumerate(ticks)], score, style, label)
        axis.set(title=_PANELS[score][0], xlabel=across, xlim=(-0.5, len(ticks) - 0.5))
        axis.set_xticks(range(len(ticks)), [f"{scale * x:g}" for x in ticks])
        for between in range(1, len(ticks)):
            axis.axvline(between - 0.5, color=PALE, linewidth=1.0, zorder=0)
        axis.grid(axis="y", color=PALE)
    axes[0].set(ylim=(-3, 103), yticks=range(0, 101, 25))
    keys = [Line2D([], [], **style, markersize=6, label=label) for label, (style, _) in lines.items()]
    return _finished(figure, title, keys)


def _line(axis: Axes, points: Sequence[tuple[float, Row | None]], score: str, style: dict, label: str) -> None:
    means = []
    for x, row in points:
        found = _shown(row, score)
        means.append(100 * found.mean if found else math.nan)  # the line has a gap there
        if found:
            whisker = [[100 * (found.mean - found.low)], [100 * (found.high - found.mean)]]
            axis.errorbar(x, means[-1], yerr=whisker, color=style["color"], **_WHISKER)
            each = [100 * one for one in found.by_seed.values()]
            axis.plot([x] * len(each), each, markeredgecolor=style["color"], zorder=2, **_RING)
    axis.plot([x for x, _ in points], means, **style, markersize=6, label=label, zorder=3, clip_on=False)


def _shown(row: Row | None, score: str) -> Estimate | None:
    """What is drawn of a row's score: no FA at p = 1, where the user has no task."""
    return None if row is None or (score == "task" and row.p == 1) else row.estimate(score)


def _finished(figure: Figure, title: str, keys: list[Line2D]) -> Figure:
    """The figure with its title and the key to its lines and rings."""
    ring = Line2D([], [], markeredgecolor=DARK, zorder=4, **_RING, label="a seed")
    figure.legend(handles=[*keys, ring], loc="outside lower center", ncols=4)
    figure.suptitle(title, wrap=True)
    return figure


def _by_method(points: Iterable[tuple[float, Row]]) -> Lines:
    """The lines of (x, row), in the order of `_STYLES`."""
    lines = defaultdict(dict)
    for x, row in points:
        lines[row.method, row.label][x] = row
    order = [*_STYLES, *(method for method, _ in lines)]
    named = sorted(lines.items(), key=lambda line: order.index(line[0][0]))
    return {label: (_style_of(method, index), found) for index, ((method, label), found) in enumerate(named)}


def _style_of(method: str, index: int) -> dict[str, Any]:
    """A method's own style, or that of an index where it has none: of 42 in a row no two are alike."""
    return _STYLES.get(method) or _style(*(each[index % len(each)] for each in _OTHERS))
