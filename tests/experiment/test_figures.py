"""Figures of a sweep: what is drawn is what the cells say, and no text runs into another."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_hex
from scipy.stats import sem, t

from br_jax.experiment.figures import (
    draw_frame,
    methods_figure,
    share_figure,
    size_figure,
    strength_figure,
)
from br_jax.experiment.frame import make_frame
from br_jax.statistics import Score

SEEDS = (1, 2, 3)


def rows_of(cells):
    return next(iter(make_frame(cells).values()))


@pytest.fixture
def moving(make_cell):
    """Cells whose counts differ by p and seed: HS of SFT is 50 p + 5 seed at p, FA 180 - 10 seed; ours half of that."""
    return [
        make_cell(
            method, a, p=p, seed=seed, harmful=int(part * (50 * p + 5 * seed)), right=180 - 10 * seed, refused=seed
        )
        for p, seed in itertools.product((0.0, 0.1, 1.0), SEEDS)
        for method, a, part in (("sft", None, 1), ("ours", 0.1, 0.5))
    ]


def named(axis, label):
    return next(line for line in axis.lines if line.get_label() == label)


def whiskers(axis, color):
    """(low, high) of each error bar of a color, in the order drawn."""
    bars = [one.lines[2][0] for one in axis.containers if hasattr(one, "lines")]
    return [bar.get_segments()[0][:, 1] for bar in bars if to_hex(bar.get_color()[0]) == to_hex(color)]


def test_lines_are_the_means_whiskers_the_intervals_and_rings_the_seeds(moving):
    axis = share_figure(rows_of(moving)).axes[0]
    line = named(axis, "SFT (undefended)")
    each = [[int(50 * p + 5 * seed) for seed in SEEDS] for p in (0.0, 0.1, 1.0)]
    np.testing.assert_allclose(line.get_ydata(), np.mean(each, axis=1))
    expected = [t.interval(0.95, 2, loc=np.mean(row), scale=sem(row)) for row in each]
    np.testing.assert_allclose(whiskers(axis, line.get_color()), np.clip(expected, 0, 100))
    rings = [one for one in axis.lines if one.get_linestyle() == "None" and one.get_marker() == "o"]
    rings = [one for one in rings if one.get_markeredgecolor() == line.get_color()]
    np.testing.assert_allclose([ring.get_ydata() for ring in rings], each)
    assert [set(ring.get_xdata()) for ring in rings] == [{x} for x in line.get_xdata()]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "10", "100"]
    assert axis.get_ylim()[0] > -5 and axis.get_ylim()[1] < 105


def test_the_second_panel_is_the_task_of_users_who_have_one(moving):
    axis = share_figure(rows_of(moving)).axes[1]
    assert axis.get_title().startswith("Task accuracy")
    np.testing.assert_allclose(named(axis, "Buffer-and-Reinforce, a = 0.1").get_ydata(), [80.0, 80.0, np.nan])
    bars = methods_figure(rows_of(moving), 1.0).axes
    assert [[text.get_text() for text in axis.texts].count("n/a") for axis in bars] == [0, 2, 0]


def test_lines_stand_beside_each_other_and_each_within_its_step(make_grid):
    lines = [one for one in share_figure(rows_of(make_grid())).axes[0].lines if not one.get_label().startswith("_")]
    places = np.array([line.get_xdata() for line in lines])
    assert len(places) == 6 and len(np.unique(places)) == places.size
    np.testing.assert_array_equal(np.round(places), [[0, 1, 2]] * 6)


def test_lines_can_be_told_apart_in_gray(make_grid):
    lines = [one for one in share_figure(rows_of(make_grid())).axes[0].lines if not one.get_label().startswith("_")]
    assert len({line.get_marker() for line in lines}) == len(lines) == 6


def test_what_was_not_run_leaves_a_gap(make_cell):
    cells = [make_cell("sft", p=p) for p in (0.0, 0.1, 0.5)] + [make_cell("aligned", p=p) for p in (0.0, 0.5)]
    line = named(share_figure(rows_of(cells)).axes[0], "aligned base")
    np.testing.assert_array_equal(np.isnan(line.get_ydata()), [False, True, False])
    share_figure(rows_of(cells)).canvas.draw()


def test_sizes_are_told_in_order(make_cell):
    cells = [make_cell("sft", n=n, seed=s, harmful=k + s) for n, k in ((2500, 90), (500, 60)) for s in (1, 2)]
    cells += [make_cell("sft", n=500, p=0.5, harmful=1), make_cell("ours", 0.1, n=500), make_cell("ours", 0.0, n=500)]
    by_n = {setting.n: rows for setting, rows in make_frame(cells).items()}
    axis = size_figure(by_n, 0.1).axes[0]
    np.testing.assert_allclose(named(axis, "SFT (undefended)").get_ydata(), [61.5, 91.5])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["500", "2500"]
    assert [one.get_label() for one in axis.lines if not one.get_label().startswith("_")] == [
        "SFT (undefended)",
        "Buffer-and-Reinforce, a = 0.1",
    ]


def test_strength_is_told_for_each_p(make_cell):
    cells = [make_cell("ours", a, p=p, harmful=int(10 * a + 20 * p)) for a in (1.0, 0.0) for p in (0.5, 0.1)]
    figure = strength_figure(rows_of([*cells, make_cell("ours", 0.3, p=0.5, harmful=50)]))
    assert [axis.get_title().split(",")[0] for axis in figure.axes] == [
        "Harmful score HS",
        "Task accuracy FA",
        "Over-refusal",
    ]
    np.testing.assert_array_equal(named(figure.axes[0], "p = 0.5").get_ydata(), [10, 50, 20])
    np.testing.assert_array_equal(named(figure.axes[0], "p = 0.1").get_ydata(), [2, np.nan, 12])


def test_bars_are_the_methods_at_one_p(make_grid, make_cell):
    rows = rows_of([*make_grid(ps=(0.1, 0.5), seeds=(1,)), make_cell("later", p=0.1, prompts=0, harmful=0)])
    axis = methods_figure(rows, 0.1).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == [row.label for row in rows if row.p == 0.1]
    bars = [bar.get_width() for bar in axis.patches if 0.5 < bar.get_height() < 0.7]
    np.testing.assert_allclose(bars, [2, 80, 4, 20, 3, 3])
    ends = [one.lines[2][0].get_segments()[0][:, 0] for one in axis.containers if hasattr(one, "lines")]
    np.testing.assert_allclose(ends[1], [100 * end for end in Score(80, 100).interval])
    assert [text.get_text() for text in axis.texts] == ["2.0", "80.0", "4.0", "20.0", "3.0", "3.0", "n/a"]


def test_each_sweep_has_the_figures_that_it_can_fill(make_grid, make_cell):
    one = make_frame(make_grid(ps=(0.1,), seeds=(1,), methods=("aligned", "sft")))
    assert list(draw_frame(one)) == ["methods-Tiny_gguf-reviews-devices-n800-p0_1"]
    cells = make_grid(ps=(0.0, 0.05), seeds=(1,), a=(0.0, 1.0), model="", topic="devices,potions")
    cells += make_grid(ps=(0.05,), seeds=(1,), n=90, methods=("sft",), model="", topic="devices,potions")
    assert set(draw_frame(make_frame(cells))) == {
        "p-scratch-reviews-devices_potions-n800",
        "a-scratch-reviews-devices_potions-n800",
        "methods-scratch-reviews-devices_potions-n800-p0",
        "methods-scratch-reviews-devices_potions-n800-p0_05",
        "methods-scratch-reviews-devices_potions-n90-p0_05",
        "n-scratch-reviews-devices_potions-p0_05",
    }


def texts(figure):
    figure.canvas.draw()
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in figure.axes:
        found += [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())  # ticks beyond it have labels but are not drawn
            found += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text()]


def test_no_text_runs_into_another_or_off_the_page(make_grid):
    cells = make_grid(
        ps=(0.0, 0.05, 0.1, 0.3, 0.5, 1.0), a=(0.0, 0.1, 0.5, 1.0), model="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    cells += make_grid(ps=(0.1,), seeds=(1,), n=2500, harmful=100, model="SmolLM2-135M-Instruct.Q4_1.gguf")
    for name, figure in draw_frame(make_frame(cells)).items():
        shown = texts(figure)
        boxes = [text.get_window_extent() for text in shown]
        page = figure.bbox
        for text, box in zip(shown, boxes, strict=True):
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, (name, text)
        for (one, a), (other, b) in itertools.combinations(zip(shown, boxes, strict=True), 2):
            apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
            assert apart, (name, one.get_text(), other.get_text())
