"""The analyses of a run whose adapters are ours to choose; what they compute is tested in tests/analysis."""

import pathlib

import numpy as np
import pytest

from br_jax.core.errors import UserError
from br_jax.report.analyses import write_analyses


def test_without_rows_to_look_at(config, tmp_path):
    config.user.probes = 0
    with pytest.raises(UserError, match=r"user\.probes is 0"):
        write_analyses(config, tmp_path / "w", 3, 2, looks=2)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_the_page_has_every_model_and_what_was_followed(config, calls, tmp_path):
    config.user.train.update(steps=3, warmup_ratio=0.0, learning_rate=1e-2)
    text = pathlib.Path(write_analyses(config, tmp_path / "w", 3, 2, looks=2, command="the command")).read_text()
    with np.load(tmp_path / "w" / "analysis.npz") as kept:
        arrays = dict(kept)
    models = ["aligned", "aligned + Buffer", "SFT", "user, Buffer on", "user, Buffer out", "ours"]
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    assert all([kind, model] in lines for kind in ("harmful", "task") for model in models)
    assert "3 harmful rows, 3 task rows" in text and "the command" in text
    assert "safety_in_training" in text
    followed = [name for name in arrays if name.startswith("safety gradient in training")]
    assert len(followed) == 6  # of two kinds of row: SFT, the user with Buffer on and out
    for name in followed:
        assert arrays[name][:, 0].tolist() == [0, 2, 3]
        model = "aligned + Buffer" if name.endswith("on") else "aligned"
        kind = name.split(", ")[1]
        # Both begin at a LoRA that adds nothing, and move from there.
        np.testing.assert_allclose(arrays[name][0, 1:], arrays[f"safety gradient, {kind}, {model}"], rtol=1e-5)
        assert not np.allclose(arrays[name][0, 1:], arrays[name][-1, 1:], rtol=1e-3)
