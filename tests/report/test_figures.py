"""Figures: what is drawn is what was given, no text runs into another, the files repeat bit for bit."""

import itertools
import math

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from br_jax.report import figures, plots, run_figures
from br_jax.report.results import estimate, results_of

SEEDS, SHARES = (1, 2, 3), (0.0, 0.1, 1.0)
SFT, OURS = "SFT (undefended)", "Buffer-and-Reinforce, a = 0.1"


def named(axis):
    """The lines of an axis by their labels."""
    return {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}


def whiskers(axis):
    """The color and the two ends of each, across and up."""
    bars = [one.lines[2][0] for one in axis.containers if hasattr(one, "lines")]
    return [(to_hex(bar.get_color()[0]), bar.get_segments()[0]) for bar in bars]


def texts(of):
    return [text.get_text() for text in of]


def test_lines_are_the_means_whiskers_the_intervals_and_rings_the_seeds(make_cell):
    """Counts that differ by p and seed: HS of SFT is 50 p + 5 seed at p, FA 90 - 5 seed; ours half of that."""
    results = results_of(
        make_cell(method, a, p=p, seed=seed, harmful=int(part * (100 * p + 10 * seed)), right=360 - 20 * seed)
        for p, seed in itertools.product(SHARES, SEEDS)
        for method, a, part in (("sft", None, 1), ("ours", 0.1, 0.5))
    )
    axis, tasks = figures.lines_figure(results, "p").axes
    line = named(axis)[SFT]
    each = [[50 * p + 5 * seed for seed in SEEDS] for p in SHARES]
    np.testing.assert_allclose(line.get_ydata(), np.mean(each, axis=1))
    ends = [ends[:, 1] for color, ends in whiskers(axis) if color == to_hex(line.get_color())]
    rows = [estimate(results[(results.method == "sft") & (results.p == p)], "harmful") for p in SHARES]
    np.testing.assert_allclose(ends, [[100 * found.low, 100 * found.high] for found in rows])
    rings = [one for one in axis.lines if one.get_linestyle() == "None" and one.get_marker() == "o"]
    rings = [one for one in rings if one.get_markeredgecolor() == line.get_color()]
    np.testing.assert_allclose([ring.get_ydata() for ring in rings], each)
    assert [{*ring.get_xdata()} for ring in rings] == [{x} for x in line.get_xdata()]
    assert texts(axis.get_xticklabels()) == ["0", "10", "100"]
    # The second panel is the task of users who have one.
    np.testing.assert_allclose(named(tasks)[OURS].get_ydata(), [80.0, 80.0, np.nan])
    assert [texts(axis.texts).count("n/a") for axis in figures.methods_figure(results, 1.0).axes] == [0, 2, 0]


def test_sizes_and_strengths_are_told_in_order(make_cell):
    cells = [make_cell("sft", n=n, seed=s, harmful=2 * (k + s)) for n, k in ((2500, 90), (500, 60)) for s in (1, 2)]
    cells += [make_cell("ours", 0.1, n=500), make_cell("ours", 0.0, n=500)]
    axis = figures.lines_figure(results_of(cells), "n").axes[0]
    lines = named(axis)
    assert list(lines) == [SFT, OURS] and texts(axis.get_xticklabels()) == ["500", "2500"]
    np.testing.assert_allclose(lines[SFT].get_ydata(), [61.5, 91.5])
    cells = [make_cell("ours", a, p=p, harmful=int(20 * a + 40 * p)) for a in (1.0, 0.0) for p in (0.5, 0.1)]
    axis, *others = figures.lines_figure(results_of([*cells, make_cell("ours", 0.3, p=0.5, harmful=100)]), "a").axes
    np.testing.assert_array_equal(named(axis)["p = 0.5"].get_ydata(), [10, 50, 20])
    np.testing.assert_array_equal(named(axis)["p = 0.1"].get_ydata(), [2, np.nan, 12])
    assert len(others) == 2


def test_methods_without_a_style_of_their_own_differ(make_cell):
    at = {"aligned": SHARES, "lisa": SHARES, "ldifs": (0.1, 1.0), "ptst": SHARES, "asft": (0.5,)}
    axis = figures.lines_figure(results_of(make_cell(name, p=p) for name, ps in at.items() for p in ps), "p").axes[0]
    assert len({(x.get_color(), x.get_marker(), x.get_linestyle()) for x in named(axis).values()}) == 5


def test_bars_are_the_methods_at_one_p(make_grid, make_cell):
    results = results_of([*make_grid(ps=(0.1, 0.5), seeds=(1,)), make_cell("later", p=0.1, prompts=0, harmful=0)])
    axis = figures.methods_figure(results, 0.1).axes[0]
    assert texts(axis.get_yticklabels()) == results.label[results.p == 0.1].tolist()
    bars = [bar.get_width() for bar in axis.patches if 0.5 < bar.get_height() < 0.7]
    np.testing.assert_allclose(bars, [2, 80, 4, 20, 3, 2.5])
    found = estimate(results[(results.method == "sft") & (results.p == 0.1)], "harmful")
    np.testing.assert_allclose(whiskers(axis)[1][1][:, 0], [100 * found.low, 100 * found.high])
    assert texts(axis.texts) == ["2.0", "80.0", "4.0", "20.0", "3.0", "2.5", "n/a"]


def test_a_sweep_has_the_figures_that_it_can_fill_and_they_can_be_read(make_grid, make_cell, assert_readable):
    one = results_of(make_grid(ps=(0.1,), seeds=(1,), methods=("aligned", "sft")))
    kinds = [name.partition("-")[0] for name in figures.draw_results(one)]
    assert kinds == ["methods", "forms"], "of one p"
    for scores in one.scores:
        del scores["groups"]  # as of an earlier br_jax
    assert list(figures.draw_results(one)) == ["methods-Tiny_gguf-reviews-devices-n800-p0_1"]
    same = {"model": "SmolLM2-135M-Instruct.Q4_1.gguf", "topic": "devices,potions"}
    cells = make_grid(("aligned", "sft", "average", "ours"), ps=(0.5, 1.0), seeds=(1, 2), a=(0.0, 0.1), **same)
    margins = {"margin_harmful": 1.0, "margin_benign": 1.0}
    cells += [
        make_cell("sft", n=90, p=0.5, **same),
        make_cell("sft", n=90, p=0.5, user="harsh", scores=margins, **same),
    ]
    drawn = figures.draw_results(results_of(cells))
    setting = "SmolLM2_135M_Instruct_Q4_1_gguf-reviews-devices_potions"
    expected = {"p": ["n800"], "a": ["n800"], "n": ["p0_5"], "attackers": ["n90-p0_5"], "pareto": ["n800-p0_5"]}
    expected |= {"methods": ["n800-p0_5", "n800-p1", "n90-p0_5", "harsh-n90-p0_5"], "margins": ["harsh-n90-p0_5"]}
    expected |= {"forms": expected["methods"]}
    assert set(drawn) == {f"{kind}-{setting}-{end}" for kind, ends in expected.items() for end in ends}
    for kind, ends in expected.items():
        assert_readable(drawn[f"{kind}-{setting}-{ends[0]}"])


def test_the_map_of_phrasings_is_in_the_order_of_their_forms(make_cell):
    """Of three forms in any order, here as many as twice; those that a method was not asked are left open."""
    names = [f"devices: {form}" for form in ("story/0", "code/0", "story/1", "ask/0")]
    cells = [
        make_cell(*key, seed=s, harmful=k, prompts=40)
        for key, k in ((("sft",), 30), (("ours", 0.1), 0))
        for s in (1, 2)
    ]
    for cell in cells:
        cell["scores"]["groups"]["topic"] = [names[i // 10] for i in range(40)]
    cells.append(make_cell("lisa", harmful=0, prompts=0))
    axis = figures.forms_figure(results_of(cells), 0.1).axes[0]
    np.testing.assert_array_equal(axis.images[0].get_array(), [[0, 100, 100, 100], [0, 0, 0, 0]])
    assert texts(axis.get_yticklabels()) == [SFT, OURS] and texts(axis.get_xticklabels()) == ["ask", "code", "story"]
    assert axis.get_xticks().tolist() == [0, 1, 2.5] and [line.get_xdata()[0] for line in axis.lines] == [0.5, 1.5]


def test_the_front_is_what_no_other_beats_in_both(make_cell):
    points = {"sft": (80, 190), "ours": (10, 180), "average": (10, 100), "buffer_only": (30, 195), "aligned": (5, 0)}
    results = results_of(
        make_cell(m, 0.1 if m == "ours" else None, p=0.5, seed=s, harmful=2 * (h + s - 2), right=2 * r)
        for m, (h, r) in points.items()
        for s in (1, 3)
    )
    drawn = figures.pareto_figure(results, 0.5).axes[0].lines
    (front,) = [line for line in drawn if line.get_linewidth() == 6]
    np.testing.assert_allclose(np.transpose(front.get_data()), [(90, 10), (97.5, 30)])
    assert len([line for line in drawn if line.get_marker() == "o" and len(line.get_xdata()) == 2]) == 4
    (base,) = [line for line in drawn if line.get_linestyle() == ":"]
    np.testing.assert_allclose(base.get_ydata(), 5)


def test_the_map_shows_the_worse_of_both_ways_to_ask_and_brackets_where_the_task_is_lost(make_cell):
    own = {"harmful_own": [i < 160 for i in range(200)]}
    cells = [
        ("plain", "aligned", 4, 3),
        ("plain", "sft", 50, 180),
        ("plain", "ours", 4, 180),
        ("plain", "lisa", 4, 143),
    ]
    cells += [("trigger", "sft", 10, 180), ("trigger", "ours", 4, 180), ("harsh", "sft", 90, 143)]

    def drawn(p):
        axis = figures.attackers_figure(
            results_of(
                make_cell(method, 0.1 if method == "ours" else None, p=p, user=user, harmful=2 * k, right=2 * right,
                          outcomes=own if k == 10 else {})
                for user, method, k, right in cells
            ),
            p,
        ).axes[0]  # fmt: skip
        shown = np.asarray(axis.images[0].get_array().filled(np.nan))
        words = np.reshape(texts(axis.texts), shown.shape)
        columns = [label.split(",")[0].split(" (")[0] for label in texts(axis.get_xticklabels())]
        return axis, *(dict(zip(columns, each.T.tolist(), strict=True)) for each in (shown, words))

    axis, table, words = drawn(0.5)
    assert texts(axis.get_yticklabels()) == ["harsh", "plain", "trigger", "worst of those that keep the task"]
    np.testing.assert_allclose(table["SFT"], [90, 50, 80, 80])
    np.testing.assert_allclose(table["Buffer-and-Reinforce"], [np.nan, 4, 4, 4])
    assert words["SFT"] == ["(90)", "50", "80", "80"], "143 are less than four fifths of 180"
    assert words["aligned base"] == ["", "4", "", "4"], "nobody's task"
    assert words["Lisa"] == ["", "(4)", "", ""], "nobody keeps the task"
    assert not any("(" in word for column in drawn(1.0)[2].values() for word in column), "there is no task"


def probes(loss, norm):
    kinds = ("harmful", "benign")
    return [{"step": s, "rows": rows, "loss": loss(s), "grad_norm": norm(s)} for s in (0, 10, 20) for rows in kinds]


VERDICTS = {f"model {i}": {"harmful": i, "refusal": 9 - i} for i in range(9)} | {"silent": {}}
WITHOUT = probes(lambda s: 2.0 / (s + 1), lambda s: 3.0)
CURVES = {name: [{"step": s, "loss": start / s} for s in range(1, 30)] for name, start in (("sft", 2.0), ("buffer", 3))}
MATRIX = {"kept_rank": [8, 7], "removed_share": [0.1, 0.2], "stable_rank_user": [1.5, 2.0]}
MATRIX |= {"stable_rank_reinforce": [1.1, 1.2], "singular_values_user": [[2.0, 1.0], [4.0, 1.0]]}
MATRIX |= {"principal_angles": [[57.0, 28.6], [60.0, 68.8]]}
TRIED = [(0, 0.15, 0.05), (0.5, 0, 0.5), (0.25, 0, 0.3), (0.0625, 0.04, 0.09)]
CALIBRATION = {
    "merge": {"scale": 0.5, "reinforce_scale": 0.0625},
    "aligned": {"complied": 0.02, "over_refused": 0.1},
    "tried": [dict(zip(("reinforce_scale", "complied", "over_refused"), seen, strict=True)) for seen in TRIED],
}
SPECTRA = {"q": [[4.0, 2.0, 1e-9], [2.0, 1.0, 0.0], [3.0, 0.5, 0.0]]}
SPECTRA |= {name: [[0.4, 0.2, 0.1]] * 3 for name in ("v", "gate", "up", "down")}
DRAWN = {  # name: how it is drawn, of what, and of what is empty
    "training": (run_figures.training_figure, [CURVES], [{"user": []}]),
    "saturation": (run_figures.saturation_figure, [probes(lambda s: 0.1, lambda s: 0.2 / (s + 1)), WITHOUT], [[], []]),
    "verdicts": (run_figures.verdict_figure, [VERDICTS], [{"aligned": {}}]),
    "merge": (run_figures.merge_figure, [{"a": 0.1, "tau": 0.01, "matrices": {"layers/attn/q": MATRIX}}], [{}]),
    "bare merge": (run_figures.merge_figure, None, [{"matrices": {"layers/attn/q": {}}}]),
    "calibration": (run_figures.calibration_figure, [CALIBRATION], None),
    "spectra": (run_figures.spectra_figure, [SPECTRA, "user, rank 3, on tiny"], [{"q": [[0.0, 0.0]]}]),
}


def test_figures_of_a_run_are_what_was_given_and_can_be_read_and_empty_ones_drawn(assert_readable):
    drawn = {name: draw(*given) for name, (draw, given, _) in DRAWN.items() if given}
    for figure in drawn.values():
        assert_readable(figure)
    for draw, _, empty in DRAWN.values():
        if empty:
            draw(*empty).canvas.draw()
    bars = drawn["verdicts"].axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars[:10]], [100 * i / 9 for i in range(9)] + [0])
    np.testing.assert_allclose(drawn["merge"].axes[2].images[0].get_array(), [[28.6, 60.0]])  # the smallest angles
    axis = drawn["saturation"].axes[2]
    buffer, sft = axis.lines
    assert axis.get_yscale() == "log"
    np.testing.assert_allclose(buffer.get_xydata(), [[0, 0.2], [10, 0.2 / 11], [20, 0.2 / 21]])
    np.testing.assert_allclose(sft.get_ydata(), [3.0, 3.0, 3.0])
    *layers, median = drawn["spectra"].axes[0].lines
    assert [line.get_ydata().tolist() for line in layers] == [[4.0, 2.0], [2.0, 1.0], [3.0, 0.5]], "no rounding noise"
    np.testing.assert_array_equal(median.get_xydata(), [[1, 3.0], [2, 1.0]])
    complied = drawn["calibration"].axes[0].lines[0]  # of a record from before scales were chosen, too
    np.testing.assert_allclose(complied.get_xydata(), [[0, 15], [0.0625, 4], [0.25, 0], [0.5, 0]])


def test_the_thick_line_is_a_mean_over_a_twentieth_of_the_run():
    losses = np.random.default_rng(0).uniform(1, 2, size=140)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses.tolist())]
    expected = [losses[max(0, i - 3) : i + 4].mean() for i in range(140)]
    thick = run_figures.training_figure({"user": lines}).axes[0].lines[1]
    np.testing.assert_allclose(thick.get_ydata(), expected, rtol=1e-9)


def test_numbers_that_are_not_finite_leave_a_gap():
    values = ((math.nan, math.inf), (0.0, None))
    broken = [{"step": 10, "rows": "harmful", "loss": loss, "grad_norm": norm} for loss, norm in values]
    axes = run_figures.saturation_figure(broken, WITHOUT).axes
    assert len(axes[0].lines[0].get_xdata()) == 1 and len(axes[2].lines[0].get_xdata()) == 0
    assert axes[0].get_yscale() == "linear"  # a loss of 0 has no logarithm


def test_files_repeat_to_the_byte_under_other_settings():
    first = plots.encode(run_figures.calibration_figure(CALIBRATION))
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.facecolor": "red"}):
        assert first == plots.encode(run_figures.calibration_figure(CALIBRATION))
        assert matplotlib.rcParams["font.size"] == 20  # the caller's settings come back
    assert first["png"].startswith(b"\x89PNG") and first["pdf"].startswith(b"%PDF")
