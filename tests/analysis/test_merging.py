"""How much of Reinforce lies in the user's spaces, against dense matrices in float64 numpy."""

import dataclasses

import numpy as np
import pytest
from oracles import delta

from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.analysis.merging import overlaps, reach


def test_shares_of_each_matrix(make_adapter):
    user, reinforce = make_adapter("user"), make_adapter("reinforce", seed=1, rank=2)
    found, u, r = overlaps(user, reinforce, tau=0.0), delta(user), delta(reinforce)
    for path, each in found.items():
        for layer in range(len(u[path])):
            left, sizes, right = np.linalg.svd(u[path][layer], full_matrices=False)
            kept = sizes > 1e-6 * sizes[0]
            p, q = left[:, kept], right[kept].T
            change = r[path][layer]
            length = np.linalg.norm(change)
            assert each.outputs[layer] == pytest.approx(np.linalg.norm(change @ q @ q.T) / length, rel=1e-4)
            assert each.inputs[layer] == pytest.approx(np.linalg.norm(p @ p.T @ change) / length, rel=1e-4)
            assert each.chance[layer] == pytest.approx(np.sqrt(kept.sum() / change.shape[1]))


def test_what_a_can_change(make_adapter):
    user, reinforce = make_adapter("user"), make_adapter("reinforce", seed=1)
    merge = MergeConfig(scale=1.0, reinforce_scale=0.3)
    plain, apart = (delta(qr_merge(user, reinforce, dataclasses.replace(merge, a=a))) for a in (0.0, 1.0))
    norm = lambda tree: np.sqrt(sum((x**2).sum() for x in tree.values()))  # noqa: E731
    moved = norm({path: plain[path] - apart[path] for path in plain})
    found = reach(user, reinforce, merge)
    assert found["of_merged"] == pytest.approx(moved / norm(plain), rel=1e-4)
    assert found["of_user"] == pytest.approx(moved / norm(delta(user)), rel=1e-4)
