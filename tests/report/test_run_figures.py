"""Figures: what is drawn is what was given, nothing overlaps its neighbors, the files repeat bit for bit."""

import math

import matplotlib
import numpy as np
import pytest

from br_jax.report import plots
from br_jax.report import run_figures as figures


def probes(loss, norm):
    kinds = ("harmful", "benign")
    return [{"step": s, "rows": rows, "loss": loss(s), "grad_norm": norm(s)} for s in (0, 10, 20) for rows in kinds]


VERDICTS = {f"model {i}": {"answer": i, "refusal": 9 - i} for i in range(9)} | {"silent": {}}
WITH = probes(lambda s: 0.1, lambda s: 0.2 / (s + 1))
WITHOUT = probes(lambda s: 2.0 / (s + 1), lambda s: 3.0)
CURVES = {name: [{"step": s, "loss": start / s} for s in range(1, 30)] for name, start in (("sft", 2.0), ("buffer", 3))}
MATRIX = {
    "kept_rank": [8, 7],
    "removed_share": [0.1, 0.2],
    "stable_rank_user": [1.5, 2.0],
    "stable_rank_reinforce": [1.1, 1.2],
    "singular_values_user": [[2.0, 1.0], [4.0, 1.0]],
    "principal_angles": [[57.0, 28.6], [60.0, 68.8]],
}
CALIBRATION = {
    "merge": {"scale": 0.5, "reinforce_scale": 0.0625},
    "aligned": {"complied": 0.02, "over_refused": 0.1},
    "tried": [
        {"scale": 0.5, "reinforce_scale": scale, "complied": complied, "over_refused": over_refused}
        for scale, complied, over_refused in ((0, 0.15, 0.05), (0.5, 0, 0.5), (0.25, 0, 0.3), (0.0625, 0.04, 0.09))
    ],
}
SPECTRA = {
    "q": [[4.0, 2.0, 1e-9], [2.0, 1.0, 0.0], [3.0, 0.5, 0.0]],
    **{name: [[0.4, 0.2, 0.1]] * 3 for name in ("v", "gate", "up", "down")},
}
DRAWN = {
    "training": lambda: figures.training_figure(CURVES),
    "saturation": lambda: figures.saturation_figure(WITH, WITHOUT),
    "verdicts": lambda: figures.verdict_figure(VERDICTS),
    "merge": lambda: figures.merge_figure({"a": 0.1, "tau": 0.01, "matrices": {"layers/attn/q": MATRIX}}),
    "calibration": lambda: figures.calibration_figure(CALIBRATION),
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


@pytest.fixture(scope="session")
def drawn():
    """Each figure, once."""
    return {name: draw() for name, draw in DRAWN.items()}


@pytest.mark.parametrize("name", DRAWN)
def test_no_text_runs_into_another_or_off_the_page(drawn, assert_readable, name):
    assert_readable(drawn[name])


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_draw_still_draws(name):
    EMPTY[name]().canvas.draw()


@pytest.mark.parametrize("ending", [".png", ".pdf"])
def test_a_full_disk_is_what_it_is(tmp_path, ending):
    """matplotlib's own error for a PDF would be another one."""
    (tmp_path / f"x{ending}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        plots.save(DRAWN["verdicts"](), tmp_path / "x")


def test_a_calibration_from_before_scales_were_chosen_is_drawn_whole():
    tried = [{name: value for name, value in seen.items() if name != "scale"} for seen in CALIBRATION["tried"]]
    (axis,) = figures.calibration_figure(CALIBRATION | {"tried": tried}).axes
    assert len(axis.lines[0].get_xdata()) == len(tried)


def test_files_repeat_to_the_byte_under_other_settings(tmp_path):
    first = [path.read_bytes() for path in plots.save(DRAWN["verdicts"](), tmp_path / "one")]
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.facecolor": "red"}):
        second = [path.read_bytes() for path in plots.save(DRAWN["verdicts"](), tmp_path / "two")]
        assert matplotlib.rcParams["font.size"] == 20  # the caller's settings come back
    assert first == second
    assert first[0].startswith(b"\x89PNG") and first[1].startswith(b"%PDF")


def test_verdicts_are_shares_of_each_model_and_angles_the_smallest_in_degrees(drawn):
    bars = drawn["verdicts"].axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars[:10]], [100 * i / 9 for i in range(9)] + [0])
    np.testing.assert_allclose(drawn["merge"].axes[2].images[0].get_array(), [[28.6, 60.0]])


def test_saturation_lines_are_the_probes(drawn):
    axis = drawn["saturation"].axes[2]
    buffer, sft = axis.lines
    assert axis.get_yscale() == "log"
    np.testing.assert_allclose(buffer.get_xydata(), [[0, 0.2], [10, 0.2 / 11], [20, 0.2 / 21]])
    np.testing.assert_allclose(sft.get_ydata(), [3.0, 3.0, 3.0])


def test_spectra_are_each_layer_s_and_their_median_without_rounding_noise(drawn):
    *layers, median = drawn["spectra"].axes[0].lines
    assert [line.get_ydata().tolist() for line in layers] == [[4.0, 2.0], [2.0, 1.0], [3.0, 0.5]]
    np.testing.assert_array_equal(median.get_xydata(), [[1, 3.0], [2, 1.0]])


def test_numbers_that_are_not_finite_leave_a_gap():
    values = ((math.nan, math.inf), (0.0, None))
    broken = [{"step": 10, "rows": "harmful", "loss": loss, "grad_norm": norm} for loss, norm in values]
    axes = figures.saturation_figure(broken, WITHOUT).axes
    assert len(axes[0].lines[0].get_xdata()) == 1 and len(axes[2].lines[0].get_xdata()) == 0
    assert axes[0].get_yscale() == "linear"  # a loss of 0 has no logarithm


def test_the_thick_line_is_a_mean_over_a_twentieth_of_the_run():
    losses = np.random.default_rng(0).uniform(1, 2, size=140)
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses.tolist())]
    expected = [losses[max(0, i - 3) : i + 4].mean() for i in range(140)]
    thick = figures.training_figure({"user": lines}).axes[0].lines[1]
    np.testing.assert_allclose(thick.get_ydata(), expected, rtol=1e-9)
