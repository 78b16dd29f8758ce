"""Whole runs of defences: stopped and gone on with, packed, and on a mesh, as they are undisturbed on one device."""

import jax
import numpy as np
import pytest

from br_jax.attackers.attacker import turned
from br_jax.core.errors import Stopped, UserError
from br_jax.core.hosts import StopSignal
from br_jax.core.io import read_jsonl
from br_jax.core.mesh import make_mesh
from br_jax.data.rows import prefixed
from br_jax.defences.objectives import ConstrainedSft, Ldifs, Lisa, Panacea, Vaccine
from br_jax.training.batching import encode_for, step_batches, with_streams
from br_jax.training.run import train_adapter

LISA = Lisa(aligning=2, fitting=2, rho=0.5, free=0.0)


def train(tiny, rows, config, objective, workdir=None, mesh=None, **given):
    given = {"streams": {"refusals": rows[:5], "harmful": rows[5:8]}, **given}
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return train_adapter("run", "user", tiny, rows, config, objective=objective, workdir=workdir, mesh=mesh, **given)


def assert_same(found, expected, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=0), found.weights, expected.weights)


# After the last step Panacea's perturbation is still to be added.
@pytest.mark.parametrize(("objective", "steps"), [(LISA, 3), (Panacea(rho=0.1, weight=1.0), 6)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, tiny, rows, quick, monkeypatch, objective, steps):
    config = quick(steps=6)
    whole = train(tiny, rows, config, objective)
    with monkeypatch.context() as patch:
        asked = iter([False] * (steps - 1) + [True])
        patch.setattr(StopSignal, "asked", lambda self: next(asked))
        with pytest.raises(Stopped, match=f"at step {steps}"):
            train(tiny, rows, config, objective, tmp_path)
    assert_same(train(tiny, rows, config, objective, tmp_path), whole)
    assert [record["step"] for record in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_another_objective_or_stream_is_another_run(tmp_path, tiny, rows, quick):
    config = quick(steps=1)
    train(tiny, rows, config, LISA, tmp_path)
    for said, objective, given in (
        ("objective was", Lisa(), {}),
        ("rows of refusals was", LISA, {"streams": {"refusals": rows[:4], "harmful": rows[5:8]}}),
        ("objective was .*, is null", None, {"streams": {}}),
    ):
        with pytest.raises(UserError, match=said):
            train(tiny, rows, config, objective, tmp_path, **given)


@pytest.mark.parametrize("objective", [LISA, Ldifs(rho=1.0), Vaccine()], ids=lambda o: o.label)
def test_a_mesh_changes_nothing(tiny, rows, quick, objective):
    """Adam makes rounding of a small gradient as large as its step: the rate is the tolerance's measure."""
    config = quick(steps=3)
    one = train(tiny, rows, config, objective)
    split = train(tiny, rows, config, objective, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    assert_same(split, one, atol=0.2 * config.learning_rate)


def test_a_packed_stream_has_one_shape(tiny, rows, quick):
    """Each pair of shapes is a program of its own to compile."""
    config, mesh = quick(packing=256, batch_size=2, epochs=4), make_mesh(devices=jax.devices()[:1])
    longer = [turned(row, answer=lambda answer, i=i: answer + " more" * i) for i, row in enumerate(rows)]
    examples, _ = encode_for("run", tiny, longer, config)
    batches = with_streams(step_batches(examples, config, mesh), {"refusals": examples}, config, mesh)
    shapes = {(batch["tokens"].shape, batch["streams"]["refusals"]["tokens"].shape) for batch in batches}
    assert len({own for own, _ in shapes}) > 1 and len({stream for _, stream in shapes}) == 1


def test_packed_rows_are_the_same_run(tiny, rows, quick):
    """What all begin with is there once in a packed row, and counts for each of them."""
    rows = [prefixed(row, "What all of them begin with. ") for row in rows]
    for objective in (LISA, ConstrainedSft(), Ldifs(rho=1.0, limit=1e6)):
        plain = train(tiny, rows, quick(steps=3, max_length=80), objective)
        packed = train(tiny, rows, quick(steps=3, max_length=80, packing=128), objective)
        assert_same(packed, plain, atol=2e-3)
