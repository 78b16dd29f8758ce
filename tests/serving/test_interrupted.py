"""A service that dies, meets a full disk, or comes back to another policy: each job ends once, as it would have."""

import contextlib
import dataclasses
import json
import os
import shutil

import pytest
from served import ends, hashes, put, rows_of, serve, told

from br_jax.core.errors import Stopped, UserError
from br_jax.core.hosts import StopSignal
from br_jax.core.io import writing
from br_jax.serving import service as module
from br_jax.training import folder


def test_a_disk_that_is_full_when_a_release_is_written_ends_no_job(provider, policy, tmp_path, monkeypatch):
    put(tmp_path / "in", "a", rows_of(8), epochs=1)

    def full(*args, **kwargs):
        with writing(tmp_path / "out/a"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "export_adapter", full)
        with pytest.raises(UserError, match="No space left on device"):
            serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {}
    assert serve(provider, tmp_path, policy)["released"] == 1


def test_a_policy_that_is_narrowed_holds_the_jobs_that_it_forbids(provider, policy, tmp_path, monkeypatch):
    put(tmp_path / "in", "a", rows_of(8), epochs=4)
    put(tmp_path / "in", "b", rows_of(8), epochs=1)
    with monkeypatch.context() as patch:
        asked = iter([False] * 2)
        patch.setattr(StopSignal, "asked", lambda signal: next(asked, True))
        with pytest.raises(Stopped):
            serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {} and told(tmp_path)["a"] == ["received"]
    narrow = dataclasses.replace(policy, users_may_set={"epochs": (1, 2)})
    serve(provider, tmp_path, narrow)
    assert ends(tmp_path) == {"a": "held", "b": "released"}
    assert "from 1 to 2" in json.loads((tmp_path / "out/a/held.json").read_text())["why"][0]


def test_settings_that_were_changed_train_anew_what_waits_to_leave(provider, policy, tmp_path, monkeypatch):
    put(tmp_path / "in", "a", rows_of(8), epochs=1)
    put(tmp_path / "in", "b", rows_of(8), epochs=4)
    one = module.Service(provider, tmp_path / "in", tmp_path / "out", policy, once=True, settle=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "asked", lambda signal: "a" in one._ready)
        with pytest.raises(Stopped):
            list(one.run())
    assert ends(tmp_path) == {} and "trained" in told(tmp_path)["a"]
    other = dataclasses.replace(policy, train=dataclasses.replace(policy.train, weight_decay=0.1))
    serve(provider, tmp_path, other)
    assert ends(tmp_path) == {"a": "released", "b": "released"}


def test_a_service_that_is_stopped_when_all_have_left_ends_as_any(provider, policy, tmp_path, monkeypatch):
    put(tmp_path / "in", "a", rows_of(4), epochs=1)
    one = module.Service(provider, tmp_path / "in", tmp_path / "out", policy, settle=0.0)
    monkeypatch.setattr(StopSignal, "asked", lambda signal: bool(one._counts["released"]))
    with pytest.raises(Stopped):
        list(one.run())
    assert ends(tmp_path) == {"a": "released"}


def test_what_was_said_and_taken_away_is_not_said_again(provider, policy, tmp_path):
    """A refusal that was collected, whose file is still there; a job whose folder was deleted, but not its file."""
    put(tmp_path / "in", "a", rows_of(4), epochs=1)
    (tmp_path / "in/x.txt").write_text("no job")
    status = serve(provider, tmp_path, policy)
    assert (status["released"], status["held"]) == (1, 1)
    events = told(tmp_path)
    for name in ends(tmp_path):
        shutil.rmtree(tmp_path / "out" / name)
    shutil.rmtree(tmp_path / "out/.service/jobs/a")
    serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {} and told(tmp_path) == events


class Killed(BaseException):
    """What ends a process wherever it stands."""


@pytest.fixture
def dies(monkeypatch):
    """dies(n): the n-th time that something is put on disk from then on, or taken from a slot, is the last."""

    def make(moment):
        left = [moment]

        def count(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return function(*args, **kwargs)

            return call

        for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (module, "inspect"), (module, "qr_merge")):
            monkeypatch.setattr(owner, name, count(getattr(owner, name)))

    return make


def jobs_in(folder):
    for i in range(3):
        put(folder / "in", f"job{i}", rows_of(9 + i), epochs=1 + i)
    put(folder / "in", "wrong", [{"prompt": "x"}])


@pytest.fixture(scope="module")
def undisturbed(provider, policy, tmp_path_factory):
    """{job: what a service that nothing happens to releases}."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs_in(folder)
    serve(provider, folder, policy)
    return hashes(folder)


@pytest.mark.parametrize("first", range(1, 60, 8))
def test_wherever_it_dies_each_job_ends_once(provider, policy, tmp_path, monkeypatch, dies, undisturbed, first):
    jobs_in(tmp_path)
    for moment in (first, first // 2 + 1):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process cleans up nothing
            dies(moment)
            with contextlib.suppress(Killed):
                serve(provider, tmp_path, policy)
        monkeypatch.undo()
    serve(provider, tmp_path, policy)
    assert ends(tmp_path) == {"job0": "released", "job1": "released", "job2": "released", "wrong": "held"}
    assert hashes(tmp_path) == undisturbed
    for name, events in told(tmp_path).items():
        assert [e for e in events if e in ("held", "released")] == (["held"] if name == "wrong" else ["released"])
    assert not [place for place in (tmp_path / "out").iterdir() if place.name.startswith(".job")]


def test_a_full_disk_is_a_line_and_the_next_service_goes_on(provider, policy, tmp_path, monkeypatch, undisturbed):
    jobs_in(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match="No space left on device"):
            serve(provider, tmp_path, policy)
    serve(provider, tmp_path, policy)
    assert hashes(tmp_path) == undisturbed


def test_a_disk_that_fills_up_when_a_job_begins_is_not_the_jobs_fault(provider, policy, tmp_path, monkeypatch):
    jobs_in(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_record", full)
        with pytest.raises((UserError, OSError), match="No space left on device"):
            serve(provider, tmp_path, policy)
    assert set(ends(tmp_path)) <= {"wrong"}
    assert serve(provider, tmp_path, policy)["released"] == 3
