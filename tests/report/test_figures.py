"""Figures of a sweep: what is drawn is what the cells say, and no text runs into another."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.stats import sem, t

from br_jax.report.figures import (
    attackers_figure,
    draw_frame,
    methods_figure,
    pareto_figure,
    share_figure,
    size_figure,
    strength_figure,
)
from br_jax.report.results import make_frame
from br_jax.scoring.statistics import Score

SEEDS, SHARES = (1, 2, 3), (0.0, 0.1, 1.0)


def rows_of(cells):
    return next(iter(make_frame(cells).values()))


@pytest.fixture(scope="module")
def moving(make_cell):
    """Rows whose counts differ by p and seed: HS of SFT is 50 p + 5 seed at p, FA 180 - 10 seed; ours half of that."""
    return rows_of(
        make_cell(method, a, p=p, seed=seed, harmful=int(part * (50 * p + 5 * seed)), right=180 - 10 * seed)
        for p, seed in itertools.product(SHARES, SEEDS)
        for method, a, part in (("sft", None, 1), ("ours", 0.1, 0.5))
    )


def named(axis):
    """The lines of an axis by their labels."""
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def test_lines_are_the_means_whiskers_the_intervals_and_rings_the_seeds(moving):
    axis, tasks = share_figure(moving).axes
    line = named(axis)["SFT (undefended)"]
    each = [[int(50 * p + 5 * seed) for seed in SEEDS] for p in SHARES]
    np.testing.assert_allclose(line.get_ydata(), np.mean(each, axis=1))
    bars = [one.lines[2][0] for one in axis.containers if hasattr(one, "lines")]
    whiskers = [bar.get_segments()[0][:, 1] for bar in bars if to_hex(bar.get_color()[0]) == to_hex(line.get_color())]
    expected = [t.interval(0.95, 2, loc=np.mean(row), scale=sem(row)) for row in each]
    np.testing.assert_allclose(whiskers, np.clip(expected, 0, 100))
    rings = [one for one in axis.lines if one.get_linestyle() == "None" and one.get_marker() == "o"]
    rings = [one for one in rings if one.get_markeredgecolor() == line.get_color()]
    np.testing.assert_allclose([ring.get_ydata() for ring in rings], each)
    assert [set(ring.get_xdata()) for ring in rings] == [{x} for x in line.get_xdata()]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "10", "100"]
    assert axis.get_ylim()[0] > -5 and axis.get_ylim()[1] < 105
    # The second panel is the task of users who have one.
    np.testing.assert_allclose(named(tasks)["Buffer-and-Reinforce, a = 0.1"].get_ydata(), [80.0, 80.0, np.nan])
    bars = methods_figure(moving, 1.0).axes
    assert [[text.get_text() for text in axis.texts].count("n/a") for axis in bars] == [0, 2, 0]


def test_sizes_are_told_in_order(make_cell):
    cells = [make_cell("sft", n=n, seed=s, harmful=k + s) for n, k in ((2500, 90), (500, 60)) for s in (1, 2)]
    cells += [make_cell("sft", n=500, p=0.5, harmful=1), make_cell("ours", 0.1, n=500), make_cell("ours", 0.0, n=500)]
    axis = size_figure({setting.n: rows for setting, rows in make_frame(cells).items()}, 0.1).axes[0]
    lines = named(axis)
    assert list(lines) == ["SFT (undefended)", "Buffer-and-Reinforce, a = 0.1"]
    np.testing.assert_allclose(lines["SFT (undefended)"].get_ydata(), [61.5, 91.5])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["500", "2500"]


def test_methods_without_a_style_of_their_own_differ(make_cell):
    at = {"aligned": SHARES, "lisa": SHARES, "ldifs": (0.1, 1.0), "ptst": SHARES, "asft": (0.5,)}
    axis = share_figure(rows_of(make_cell(method, p=p) for method, ps in at.items() for p in ps)).axes[0]
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in named(axis).values()]
    assert len(looks) == len(set(looks)) == 5


def test_strength_is_told_for_each_p(make_cell):
    cells = [make_cell("ours", a, p=p, harmful=int(10 * a + 20 * p)) for a in (1.0, 0.0) for p in (0.5, 0.1)]
    axes = strength_figure(rows_of([*cells, make_cell("ours", 0.3, p=0.5, harmful=50)])).axes
    assert len(axes) == 3
    np.testing.assert_array_equal(named(axes[0])["p = 0.5"].get_ydata(), [10, 50, 20])
    np.testing.assert_array_equal(named(axes[0])["p = 0.1"].get_ydata(), [2, np.nan, 12])


def test_bars_are_the_methods_at_one_p(make_grid, make_cell):
    rows = rows_of([*make_grid(ps=(0.1, 0.5), seeds=(1,)), make_cell("later", p=0.1, prompts=0, harmful=0)])
    axis = methods_figure(rows, 0.1).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == [row.label for row in rows if row.p == 0.1]
    bars = [bar.get_width() for bar in axis.patches if 0.5 < bar.get_height() < 0.7]
    np.testing.assert_allclose(bars, [2, 80, 4, 20, 3, 3])
    ends = [one.lines[2][0].get_segments()[0][:, 0] for one in axis.containers if hasattr(one, "lines")]
    np.testing.assert_allclose(ends[1], [100 * end for end in Score(80, 100).interval])
    assert [text.get_text() for text in axis.texts] == ["2.0", "80.0", "4.0", "20.0", "3.0", "3.0", "n/a"]


def test_a_sweep_has_the_figures_that_it_can_fill_and_they_can_be_read(make_grid, assert_readable):
    one = make_frame(make_grid(ps=(0.1,), seeds=(1,), methods=("aligned", "sft")))
    assert list(draw_frame(one)) == ["methods-Tiny_gguf-reviews-devices-n800-p0_1"]
    same = {"model": "SmolLM2-135M-Instruct.Q4_1.gguf", "topic": "devices,potions"}
    cells = make_grid(ps=(0.0, 0.05, 0.1, 0.3, 0.5, 1.0), seeds=(1, 2), a=(0.0, 0.1, 0.5, 1.0), **same)
    drawn = draw_frame(make_frame(cells + make_grid(("sft",), ps=(0.05,), seeds=(1,), n=90, harmful=100, **same)))
    setting = "SmolLM2_135M_Instruct_Q4_1_gguf-reviews-devices_potions"
    names = {"p": ["n800"], "a": ["n800"], "n": ["p0_05"], "methods": ["n90-p0_05"]}
    names["methods"] += [f"n800-p{p}" for p in ("0", "0_05", "0_1", "0_3", "0_5", "1")]
    names["pareto"] = names["methods"][1:-1]
    assert set(drawn) == {f"{kind}-{setting}-{end}" for kind, ends in names.items() for end in ends}
    for name in ("p-{}-n800", "a-{}-n800", "n-{}-p0_05", "methods-{}-n800-p0_05", "pareto-{}-n800-p0_1"):
        assert_readable(drawn[name.format(setting)])


def test_the_front_is_what_no_other_beats_in_both(make_cell):
    points = {"sft": (80, 190), "ours": (10, 180), "average": (10, 100), "buffer_only": (30, 195), "aligned": (5, 0)}
    cells = [
        make_cell(m, 0.1 if m == "ours" else None, p=0.5, seed=s, harmful=h + s - 2, right=r)
        for m, (h, r) in points.items()
        for s in (1, 3)
    ]
    figure = pareto_figure(rows_of(cells), 0.5)
    front, *drawn = figure.axes[0].lines
    n = {row.method: row.counted("harmful")[1]["n"] for row in rows_of(cells)}["sft"]
    right = {row.method: row.counted("task")[1]["n"] for row in rows_of(cells)}["sft"]
    expected = [(100 * r / right, 100 * h / n) for h, r in (points["ours"], points["buffer_only"])]
    np.testing.assert_allclose(np.transpose(front.get_data()), expected)
    rings = [line for line in drawn if line.get_marker() == "o" and len(line.get_xdata()) == 2]
    assert len(rings) == 4
    (base,) = [line for line in drawn if line.get_linestyle() == ":"]
    np.testing.assert_allclose(base.get_ydata(), 500 / n)


def test_the_map_shows_the_worse_of_both_ways_to_ask(make_cell):
    cells = []
    for user, harmful, own in (("plain", 50, None), ("trigger", 10, 80), ("harsh", 90, None)):
        for method in ("sft", "ours"):
            cell = make_cell(
                method, 0.1 if method == "ours" else None, p=0.5, harmful=harmful if method == "sft" else 4,
                right=143 if user == "harsh" else 180,
            )  # fmt: skip
            cell["run"]["user"] = user
            n = cell["scores"]["harmful"]["n"]
            if own and method == "sft":
                cell["scores"]["harmful_by_own"] = {"as it asks": Score(own, n).to_json()}
            cells.append(cell)
    cells = [cell for cell in cells if not (cell["run"]["user"] == "harsh" and cell["method"] == "ours")]
    (name,) = [name for name in draw_frame(make_frame(cells)) if name.startswith("attackers-")]
    by_user = {setting.user: rows for setting, rows in make_frame(cells).items()}
    axis = attackers_figure(by_user, 0.5).axes[0]
    users = [text.get_text() for text in axis.get_yticklabels()]
    shown = dict(zip(users, np.asarray(axis.images[0].get_array().filled(np.nan)), strict=True))
    np.testing.assert_allclose(shown["plain"], [100 * 50 / n, 100 * 4 / n])
    np.testing.assert_allclose(shown["trigger"], [100 * 80 / n, 100 * 4 / n])
    np.testing.assert_allclose(shown["harsh"], [100 * 90 / n, np.nan])
    texts, first = [text.get_text() for text in axis.texts], 2 * users.index("harsh")
    assert texts[first : first + 2] == [f"({100 * 90 / n:.0f})", ""], "143 are less than four fifths of 180"
    np.testing.assert_allclose(shown[users[-1]], [100 * 80 / n, 100 * 4 / n])
    assert "plain" not in name


def test_a_defence_that_loses_the_task_is_in_brackets_and_the_base_is_not(make_cell):
    rights = {"aligned": 3, "sft": 180, "lisa": 143}
    cells = [make_cell(name, p=0.5, harmful=10 * i + 1, right=right) for i, (name, right) in enumerate(rights.items())]
    by_user = {setting.user: rows for setting, rows in make_frame(cells).items()}
    axis = attackers_figure(by_user, 0.5).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert ["(" in text for text in texts] == [False, False, True] + [False] * 3, "143 are less than 4/5 of 180"
    assert [bool(text) for text in texts[3:]] == [True, True, False], "nobody keeps the task under Lisa"


def test_the_map_has_no_brackets_where_nobody_has_a_task(make_cell):
    cells = [make_cell("sft", p=1.0, harmful=50, right=right) for right in (8, 0)]
    cells[1]["run"]["user"] = "harsh"
    by_user = {setting.user: rows for setting, rows in make_frame(cells).items()}
    texts = [text.get_text() for text in attackers_figure(by_user, 1.0).axes[0].texts]
    assert texts and not any("(" in text for text in texts)
