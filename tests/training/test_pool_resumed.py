"""A pool that was cut off, or finds what another has left, goes on from there."""

import dataclasses
import functools
import json
import shutil

import pytest
from pooled import ONE, bits_of, distance, mesh_of

from br_jax import method
from br_jax.adapters import lora
from br_jax.core.errors import Stopped
from br_jax.core.hosts import StopSignal
from br_jax.core.io import read_jsonl
from br_jax.training.jobs import Job
from br_jax.training.pool import Pool


def test_finished_jobs_are_read_back_by_either(tiny, rows, config, buffer, tmp_path):
    config = dataclasses.replace(config, steps=3, packing=0)
    train = functools.partial(method.train_users, tiny, config=config, buffer=buffer, slots=2, workdir=tmp_path)
    jobs = [Job("a", rows, {"rank": 2, "alpha": 1.0}), Job("b", rows)]
    made = bits_of(train(jobs, mesh=ONE()))
    assert bits_of(train(jobs, mesh=ONE())) == made
    alone = method.train_user(tiny, rows, jobs[0].config(config), buffer=buffer, workdir=tmp_path / "a", mesh=ONE())
    assert lora.fingerprint(alone) == made["a"]
    records = read_jsonl(tmp_path / "a/user/metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3] and all(r["loss"] > 0 for r in records)
    stage = json.loads((tmp_path / "a/user/stage.json").read_text())
    assert (stage["steps"], stage["rows"], stage["output"]) == (3, 16, made["a"])
    assert not (tmp_path / ".pool").exists()
    other = {o.name: o for o in train([Job("a", rows[1:])], mesh=ONE())}["a"]
    assert other.adapter is None and "holds a run with another" in other.error


@pytest.fixture(scope="module")
def straight(tiny, rows, config, buffer):
    """(jobs, config, their adapters by name) of a pool of two slots that nothing stopped."""
    config = dataclasses.replace(config, steps=9, checkpoint_every=4, packing=0, log_every=1)
    jobs = [Job(f"job{i}", rows[i:], {"learning_rate": 2e-3 * (i + 1), "steps": 7 + 3 * i}) for i in range(4)]
    out = method.train_users(tiny, jobs, config, buffer=buffer, slots=2, mesh=ONE())
    return jobs, config, {o.name: o.adapter for o in out}


@pytest.mark.parametrize(("slots", "sizes"), [(2, (1, 1, 1)), (1, (1, 1, 1)), (4, (1, 1, 1)), (4, (2, 2, 1))])
def test_a_pool_that_was_cut_off_goes_on(tiny, rows, straight, buffer, tmp_path, slots, sizes):
    """With the same slots to the bit; with others, or on another mesh, to rounding."""
    jobs, config, expected = straight
    train = functools.partial(method.train_users, tiny, jobs, config, buffer=buffer)
    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=2, workdir=tmp_path, mesh=ONE())
    turns = pool.train(jobs)
    while pool.users.get("job1", (0,))[0] < 8:  # a checkpoint of turn 8; job0 has left after its step 7
        next(turns)
    turns.close()
    steps = [read_jsonl(tmp_path / f"job{i}/user/metrics.jsonl")[-1]["step"] for i in range(2)]
    resumed = {o.name: o.adapter for o in train(slots=slots, mesh=mesh_of(*sizes), workdir=tmp_path)}
    for name, adapter in expected.items():
        if (slots, sizes) == (2, (1, 1, 1)):
            assert lora.fingerprint(resumed[name]) == lora.fingerprint(adapter), name
        else:
            assert distance(resumed[name], adapter) < 1e-5, name
    for i in range(4):
        records = read_jsonl(tmp_path / f"job{i}/user/metrics.jsonl")
        assert [r["step"] for r in records] == list(range(1, 8 + 3 * i))
    assert steps[0] == 7 and steps[1] >= 8


def test_settings_that_were_changed_begin_anew(tiny, rows, config, buffer, tmp_path, caplog):
    """A checkpoint of other shapes is of no use, and in nobody's way."""
    config = dataclasses.replace(config, steps=9, checkpoint_every=2, packing=0)
    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=2, workdir=tmp_path, mesh=ONE())
    turns = pool.train([Job("a", rows), Job("b", rows[1:])])
    for _ in range(5):
        next(turns)
    turns.close()
    for change in ({"rank": config.rank + 2, "alpha": 1.0}, {"max_length": config.max_length * 2}):
        other = dataclasses.replace(config, **change)
        train = functools.partial(method.train_users, tiny, [Job("c", rows)], other, buffer=buffer, mesh=ONE())
        (found,), (straight,) = train(workdir=tmp_path), train()
        assert lora.fingerprint(found.adapter) == lora.fingerprint(straight.adapter)
        shutil.rmtree(tmp_path / "c")
    assert "begins anew" in caplog.text


def test_jobs_that_nobody_hands_in_again_are_forgotten(tiny, rows, config, buffer, tmp_path):
    """They would stay on the device, and in every later checkpoint."""
    config = dataclasses.replace(config, steps=9, checkpoint_every=2, packing=0)

    def pool():
        return Pool(tiny, config, frozen={"buffer": buffer}, slots=2, workdir=tmp_path, mesh=ONE())

    turns = pool().turns([Job("a", rows), Job("b", rows[1:])])
    for _ in range(5):
        next(turns)
    turns.close()
    again = pool()
    turns = again.turns(iter([Job("a", rows), None, None, None, None, None, None]))
    next(turns)
    assert again._resting.keys() <= {"a"}
    for _ in range(4):
        next(turns)
    again.checkpoints.wait()
    assert [job["name"] for job in again.checkpoints.data()["jobs"]] == ["a"]
    turns.close()


def test_stopped_before_another_turn(tiny, rows, config, buffer, tmp_path, monkeypatch):
    """Where nothing is new, nothing is saved again; nor is anything lost."""
    config = dataclasses.replace(config, steps=9, checkpoint_every=4, packing=0)
    train = functools.partial(method.train_users, tiny, config=config, buffer=buffer, slots=2, mesh=ONE())
    (straight,) = train([Job("a", rows)])
    for job, looks in ((None, 1), (Job("a", rows), 5), (None, 1)):  # before the first turn, after some, before another
        pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=2, workdir=tmp_path, mesh=ONE())
        asked = iter([False] * (looks - 1))
        monkeypatch.setattr(StopSignal, "asked", lambda signal, asked=asked: next(asked, True))
        with pytest.raises(Stopped):
            list(pool.train([job, None]))
    monkeypatch.undo()
    assert pool.step > 0
    (resumed,) = train([Job("a", rows)], workdir=tmp_path)
    assert lora.fingerprint(resumed.adapter) == lora.fingerprint(straight.adapter)
