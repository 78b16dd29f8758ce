"""A service that dies, meets a full disk, or comes back to another policy: each job ends once, as it would have."""

import contextlib
import dataclasses
import os
import shutil

import pytest
from served import Desk, rows_of

from br_jax.core.errors import Stopped, UserError
from br_jax.core.hosts import StopSignal
from br_jax.serving import service as module
from br_jax.training import folder


@pytest.fixture
def stop(desk, monkeypatch):
    """stop(when, **patches of Service): a service that is asked to stop once `when(it)`."""

    def run(when, **patches):
        one = desk.service(once=False)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            for name, value in patches.items():
                patch.setattr(module.Service, name, value)
            patch.setattr(StopSignal, "asked", lambda signal: when(one))
            list(one.run())

    return run


def test_a_policy_that_is_narrowed_holds_the_jobs_that_it_forbids(desk, policy, stop):
    desk.put("a", 8, epochs=4)
    desk.put("b", 8, epochs=1)
    stop(lambda one: ("received", "a") in one._logged)
    assert desk.ends() == {} and desk.told()["a"] == ["received"]
    desk.serve(dataclasses.replace(policy, users_may_set={"epochs": (1, 2)}))
    assert desk.ends() == {"a": "held", "b": "released"} and "from 1 to 2" in desk.why("a")


def test_settings_that_were_changed_train_anew_what_waits_to_leave(desk, policy, stop):
    desk.put("a", 8, epochs=1)
    desk.put("b", 8, epochs=4)
    # whoever is trained first
    stop(lambda one: ("trained", "a") in one._logged, _release=lambda service: None)
    assert desk.ends() == {} and "trained" in desk.told()["a"]
    desk.serve(dataclasses.replace(policy, train=dataclasses.replace(policy.train, weight_decay=0.1)))
    assert desk.ends() == {"a": "released", "b": "released"}


def test_what_was_said_and_taken_away_is_not_said_again(desk, stop):
    """A refusal that was collected, whose file is still there; a job whose folder was deleted, but not its file.

    The service before was stopped when all had left.
    """
    desk.put("a", 4, epochs=1)
    (desk.inbox / "x.txt").write_text("no job")
    stop(lambda one: bool(one.status.get("released")))
    assert sorted(desk.ends().values()) == ["held", "released"]
    events = desk.told()
    for name in desk.ends():
        shutil.rmtree(desk.outbox / name)
    shutil.rmtree(desk.own / "jobs/a")
    desk.serve()
    assert desk.ends() == {} and desk.told() == events


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


def put_jobs(desk):
    for i in range(3):
        desk.put(f"job{i}", rows_of(9 + i), epochs=1 + i)
    desk.put("wrong", [{"prompt": "x"}])


@pytest.fixture(scope="module")
def undisturbed(provider, policy, tmp_path_factory):
    """{job: what a service that nothing happens to releases}."""
    desk = Desk(provider, policy, tmp_path_factory.mktemp("undisturbed"))
    put_jobs(desk)
    desk.serve()
    return desk.hashes()


@pytest.mark.parametrize("first", range(1, 60, 8))
def test_wherever_it_dies_each_job_ends_once(desk, monkeypatch, dies, undisturbed, first):
    put_jobs(desk)
    for moment in (first, first // 2 + 1):
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process cleans up nothing
            dies(moment)
            with contextlib.suppress(Killed):
                desk.serve()
        monkeypatch.undo()
    desk.serve()
    assert desk.ends() == {"job0": "released", "job1": "released", "job2": "released", "wrong": "held"}
    assert desk.hashes() == undisturbed
    for name, events in desk.told().items():
        assert [e for e in events if e in ("held", "released")] == (["held"] if name == "wrong" else ["released"])
    assert not [place for place in desk.outbox.iterdir() if place.name.startswith(".job")]


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"), [(os, "fsync"), (folder, "write_record"), (module, "export_adapter")], ids=lambda x: str(x)[:9]
)
def test_a_disk_that_fills_up_is_a_line_and_no_jobs_fault(desk, monkeypatch, undisturbed, owner, name):
    """At once, when a job begins, and when a release is written."""
    put_jobs(desk)
    with monkeypatch.context() as patch, pytest.raises((UserError, OSError), match="No space left on device"):
        patch.setattr(owner, name, full)
        desk.serve()
    assert set(desk.ends()) <= {"wrong"}
    assert desk.serve()["released"] == 3 and desk.hashes() == undisturbed
