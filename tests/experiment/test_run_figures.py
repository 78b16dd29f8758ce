"""Figures: what is drawn is what was given, nothing overlaps its neighbors, the files repeat bit for bit."""

import itertools
import math
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from br_jax import plots
from br_jax.experiment import run_figures as figures


def probe(step, rows, loss, norm):
    return {"step": step, "rows": rows, "loss": loss, "grad_norm": norm}


VERDICTS = {f"model {i}": {"answer": i, "refusal": 9 - i} for i in range(9)} | {"silent": {}}
WITH = [probe(s, rows, 0.1, 0.2 / (s + 1)) for s in (0, 10, 20) for rows in ("harmful", "benign")]
WITHOUT = [probe(s, rows, 2.0 / (s + 1), 3.0) for s in (0, 10, 20) for rows in ("harmful", "benign")]
CURVES = {
    "sft": [{"step": s, "loss": 2.0 / s} for s in range(1, 30)],
    "buffer": [{"step": s, "loss": 3.0 / s} for s in range(1, 20)],
}
MERGE = {
    "a": 0.1,
    "scale": 0.5,
    "tau": 0.01,
    "matrices": {
        "layers/attn/q": {
            "kept_rank": [8, 7],
            "removed_share": [0.1, 0.2],
            "stable_rank_user": [1.5, 2.0],
            "stable_rank_reinforce": [1.1, 1.2],
            "singular_values_user": [[2.0, 1.0], [4.0, 1.0]],
            "principal_angles": [[57.0, 28.6], [60.0, 68.8]],
        }
    },
}
SPECTRA = {
    "q": [[4.0, 2.0, 1e-9], [2.0, 1.0, 0.0], [3.0, 0.5, 0.0]],
    **{name: [[0.4, 0.2, 0.1]] * 3 for name in ("v", "gate", "up", "down")},
}
DRAWN = {
    "training": lambda: figures.training_figure(CURVES),
    "saturation": lambda: figures.saturation_figure(WITH, WITHOUT),
    "verdicts": lambda: figures.verdict_figure(VERDICTS),
    "merge": lambda: figures.merge_figure(MERGE),
    "spectra": lambda: plots.spectra_figure(SPECTRA, "user, rank 3, on tiny"),
}
EMPTY = {
    "training": lambda: figures.training_figure({"user": []}),
    "saturation": lambda: figures.saturation_figure([], []),
    "verdicts": lambda: figures.verdict_figure({"aligned": {}}),
    "merge": lambda: figures.merge_figure({}),
    "spectra": lambda: plots.spectra_figure({"q": [[0.0, 0.0]]}),
    "merge, bare": lambda: figures.merge_figure({"matrices": {"layers/attn/q": {}}}),
}


def texts(figure):
    figure.canvas.draw()
    found = list(figure.texts)
    for axis in figure.axes:
        found += [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())  # ticks beyond it have labels but are not drawn
            found += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in found if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_runs_into_another_or_off_the_page(name):
    figure = DRAWN[name]()
    shown = texts(figure)
    boxes = [text.get_window_extent() for text in shown]
    page = figure.bbox
    for text, box in zip(shown, boxes, strict=True):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
    for (one, a), (other, b) in itertools.combinations(zip(shown, boxes, strict=True), 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, (one.get_text(), other.get_text())


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_still_draws(name):
    figure = EMPTY[name]()
    assert isinstance(figure, Figure)
    figure.canvas.draw()


def test_files_repeat_to_the_byte_under_other_settings(tmp_path):
    name = "saturation"
    first = [path.read_bytes() for path in plots.save(DRAWN[name](), tmp_path / "one")]
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.facecolor": "red"}):
        second = [path.read_bytes() for path in plots.save(DRAWN[name](), tmp_path / "two")]
        assert matplotlib.rcParams["font.size"] == 20  # the caller's settings come back
    assert first == second
    assert first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")


def test_verdicts_are_shares_of_each_model():
    bars = figures.verdict_figure(VERDICTS).axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars[:10]], [100 * i / 9 for i in range(9)] + [0])


def test_saturation_lines_are_the_probes():
    axes = figures.saturation_figure(WITH, WITHOUT).axes
    buffer, sft = axes[2].lines
    assert axes[2].get_yscale() == "log"
    np.testing.assert_allclose(buffer.get_xydata(), [[0, 0.2], [10, 0.2 / 11], [20, 0.2 / 21]])
    np.testing.assert_allclose(sft.get_ydata(), [3.0, 3.0, 3.0])


def test_spectra_are_each_layer_s_and_their_median_without_rounding_noise():
    *layers, median = plots.spectra_figure(SPECTRA).axes[0].lines
    assert [line.get_ydata().tolist() for line in layers] == [[4.0, 2.0], [2.0, 1.0], [3.0, 0.5]]
    np.testing.assert_array_equal(median.get_xydata(), [[1, 3.0], [2, 1.0]])
    assert len({line.get_color() for line in layers}) == 3 and median.get_linewidth() > layers[0].get_linewidth()


def test_numbers_that_are_not_finite_leave_a_gap():
    broken = [probe(0, "harmful", math.nan, math.inf), probe(10, "harmful", 0.0, None)]
    axes = figures.saturation_figure(broken, WITHOUT).axes
    assert len(axes[0].lines[0].get_xdata()) == 1 and len(axes[2].lines[0].get_xdata()) == 0
    assert axes[0].get_yscale() == "linear"  # a loss of 0 has no logarithm
    figures.training_figure({"user": [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}]}).canvas.draw()


def test_angles_are_the_smallest_in_degrees():
    angles = figures.merge_figure(MERGE).axes[2].images[0].get_array()
    np.testing.assert_allclose(angles, [[28.6, 60.0]])


def test_running_mean_is_a_plain_loop():
    values = np.random.default_rng(0).normal(size=40)
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(40)]
    np.testing.assert_allclose(figures._running_mean(values, 7), expected, rtol=1e-9, atol=1e-12)


def test_pyplot_is_left_alone():
    code = "import br_jax.experiment.run_figures, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
