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


@pytest.fixture(scope="module")
def config(config):
    return dataclasses.replace(config, steps=9, checkpoint_every=2, packing=0, log_every=1)


@pytest.fixture(scope="module")
def make_pool(tiny, config, buffer):
    """make_pool(workdir) -> a pool of two slots."""
    return lambda workdir: Pool(tiny, config, frozen={"buffer": buffer}, slots=2, workdir=workdir, mesh=ONE())


@pytest.fixture(scope="module")
def train(tiny, config, buffer):
    return functools.partial(method.train_users, tiny, config=config, buffer=buffer, slots=2, mesh=ONE())


def cut_off(pool, jobs, step):
    """Has a pool train until it has done so many steps, and ends it there."""
    outs = pool.train(jobs)
    while pool.step < step:
        next(outs)
    outs.close()


def test_finished_jobs_are_read_back_by_either(tiny, rows, config, buffer, train, tmp_path):
    jobs = [Job("a", rows, {"rank": 2, "alpha": 1.0}), Job("b", rows)]
    made = bits_of(train(jobs, workdir=tmp_path))
    assert bits_of(train(jobs, workdir=tmp_path)) == made
    alone = method.train_user(tiny, rows, jobs[0].config(config), buffer=buffer, workdir=tmp_path / "a", mesh=ONE())
    assert lora.fingerprint(alone) == made["a"]
    records = read_jsonl(tmp_path / "a/user/metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 10)) and all(r["loss"] > 0 for r in records)
    stage = json.loads((tmp_path / "a/user/stage.json").read_text())
    assert (stage["steps"], stage["rows"], stage["output"]) == (9, 16, made["a"])
    assert not (tmp_path / ".pool").exists()
    other = {o.name: o for o in train([Job("a", rows[1:])], workdir=tmp_path)}["a"]
    assert other.adapter is None and "holds a run with another" in other.error


@pytest.fixture(scope="module")
def straight(rows, train):
    """(jobs, their adapters by name) of a pool that nothing stopped."""
    jobs = [Job(f"job{i}", rows[i:], {"learning_rate": 2e-3 * (i + 1), "steps": 7 + 3 * i}) for i in range(4)]
    return jobs, {o.name: o.adapter for o in train(jobs)}


@pytest.mark.parametrize(("slots", "sizes"), [(2, (1, 1, 1)), (1, (1, 1, 1)), (4, (2, 2, 1))])
def test_a_pool_that_was_cut_off_goes_on(straight, make_pool, train, tmp_path, slots, sizes):
    """With the same slots to the bit; with others, or on another mesh, to rounding."""
    jobs, expected = straight
    cut_off(make_pool(tmp_path), jobs, 8)  # a checkpoint; job0 has left after its step 7
    steps = [read_jsonl(tmp_path / f"job{i}/user/metrics.jsonl")[-1]["step"] for i in range(2)]
    assert steps == [7, 8]
    resumed = {o.name: o.adapter for o in train(jobs, slots=slots, mesh=mesh_of(*sizes), workdir=tmp_path)}
    for name, adapter in expected.items():
        if (slots, sizes) == (2, (1, 1, 1)):
            assert lora.fingerprint(resumed[name]) == lora.fingerprint(adapter), name
        else:
            assert distance(resumed[name], adapter) < 1e-5, name
    for i in range(4):
        records = read_jsonl(tmp_path / f"job{i}/user/metrics.jsonl")
        assert [r["step"] for r in records] == list(range(1, 8 + 3 * i))


def test_settings_that_were_changed_begin_anew(rows, config, make_pool, train, tmp_path, caplog):
    """A checkpoint of other shapes is of no use, and in nobody's way."""
    cut_off(make_pool(tmp_path), [Job("a", rows), Job("b", rows[1:])], 5)
    for change in ({"rank": config.rank + 2, "alpha": 1.0}, {"max_length": config.max_length * 2}):
        (made,) = train([Job("c", rows, {"steps": 3})], config=dataclasses.replace(config, **change), workdir=tmp_path)
        assert made.adapter
        shutil.rmtree(tmp_path / "c")
    assert "begins anew" in caplog.text


def test_jobs_that_nobody_hands_in_again_are_forgotten(rows, make_pool, tmp_path):
    """They would stay on the device, and in every later checkpoint."""
    cut_off(make_pool(tmp_path), [Job("a", rows), Job("b", rows[1:])], 5)
    again = make_pool(tmp_path)
    outs = again.train(iter([Job("a", rows), *[None] * 9]))
    while again.step < 6:
        next(outs)
    again.checkpoints.wait()
    assert [job["name"] for job in again.checkpoints.data()["jobs"]] == ["a"]
    outs.close()


def test_stopped_before_another_step(rows, make_pool, train, tmp_path, monkeypatch):
    """Where nothing is new, nothing is saved again; nor is anything lost."""
    straight = bits_of(train([Job("a", rows)]))
    for job, step in ((None, 0), (Job("a", rows), 4), (None, 4)):  # before the first step, after some, before another
        pool = make_pool(tmp_path)
        monkeypatch.setattr(StopSignal, "asked", lambda signal, pool=pool, step=step: pool.step >= step)
        with pytest.raises(Stopped):
            list(pool.train([job, None]))
    monkeypatch.undo()
    assert pool.step == 4
    assert bits_of(train([Job("a", rows)], workdir=tmp_path)) == straight
