"""Many users side by side are each the run that they would be alone; who sits where follows from the jobs alone."""

import dataclasses
import functools
import itertools
import re
import threading
import time

import jax
import numpy as np
import pytest
from pooled import ONE, bits_of, distance, mesh_of

from br_jax import method
from br_jax.adapters import lora
from br_jax.core.errors import UserError
from br_jax.core.mesh import leaf_name
from br_jax.data.batches import encode_rows, packed_steps
from br_jax.data.rows import Row
from br_jax.models.decoder import drop, kept_by_row
from br_jax.training import step
from br_jax.training.jobs import Job, JobState, fill
from br_jax.training.pool import Pool
from br_jax.training.step import Hyper, Stage, frozen_collections


def eight(rows):
    """Different tasks, rates, lengths, ranks and epochs; one of 3 rows, one whose loss is no number."""
    harm = [Row((("user", f"how {i}?"), ("assistant", f"like this: {i}, {i}"))) for i in range(9)]
    return [
        Job("plain", rows),
        Job("gentle", rows[5:], {"learning_rate": 1e-3, "rank": 2, "alpha": 4.0}),
        Job("epochs", rows[:11], {"steps": 0, "epochs": 3, "batch_size": 5, "loss_mean": "rows", "seed": 7}),
        Job("cycles", rows[3:], {"clip_norm": 0.1, "cycles": 3, "weight_decay": 0.1, "warmup_ratio": 0.3}),
        Job("mixed", [*rows[:9], *harm], {"batch_size": 4}),
        Job("broken", rows),
        Job("three", rows[:3], {"steps": 12}),
        Job("short", rows[2:], {"max_length": 24, "rank": 1, "alpha": 2.0, "seed": 3}),
    ]


@pytest.fixture(scope="module")
def alone(tiny, buffer):
    """alone(job, config) -> its run by itself, made once; packed only if it has the config's own settings."""

    @functools.cache
    def run(name, rows, settings):
        return method.train_user(tiny, rows, settings, buffer=buffer, mesh=ONE())

    def of(job, config):
        settings = dataclasses.replace(job.config(config), packing=0) if job.settings else config
        return run(job.name, tuple(job.rows), settings)

    return of


@pytest.fixture(autouse=True)
def breaks(monkeypatch):
    """What the job "broken" learns from its fourth step on is no number."""
    take = JobState.take

    def broken(state, length, count):
        taken = take(state, length, count)
        if state.name == "broken" and state.step > 3:
            taken.rows[0]["weights"][:] = np.nan
        return taken

    monkeypatch.setattr(JobState, "take", broken)


@pytest.fixture
def train(tiny, config, buffer):
    """train(jobs, slots, mesh, workdir, **changes of the config) -> outcomes; padded where `packing` is not given."""

    def of(jobs, slots=4, mesh=None, workdir=None, **changes):
        run = {"buffer": buffer, "slots": slots, "mesh": mesh or ONE(), "workdir": workdir}
        return method.train_users(tiny, jobs, dataclasses.replace(config, **{"packing": 0, **changes}), **run)

    return of


def test_each_of_eight_is_the_run_by_itself(train, rows, config, alone):
    jobs = eight(rows)
    out = {o.name: o for o in train(jobs, slots=8, packing=config.packing)}
    assert out.keys() == {job.name for job in jobs}
    broken = out.pop("broken")
    assert broken.adapter is None
    assert re.search(r"^job broken step \d+: loss is nan: lower learning_rate", broken.error)
    for job in jobs:
        if job.name in out:
            ours, expected = out[job.name].adapter, alone(job, config)
            assert distance(ours, expected) < 1e-5, job.name
            assert (ours.roles, ours.base, float(ours.scale)) == (expected.roles, expected.base, float(expected.scale))


def test_neighbours_change_no_bit(train, rows):
    """Nor does dropout, which depends on the user alone."""
    plain, gentle, *_, broken, three, short = eight(rows)
    train = functools.partial(train, steps=12, dropout=0.3)
    alone = bits_of(train([plain]))
    beside = bits_of(train([gentle, broken, plain, three, short, Job("seed", rows, {"seed": 9})]))
    assert beside["plain"] == alone["plain"] != beside["seed"]
    assert bits_of(train([short, plain, gentle]))["gentle"] == beside["gentle"]
    assert alone["plain"] != bits_of(train([plain], dropout=0.0))["plain"]


class Large(list):
    """Rows that say themselves how large they are."""

    size = 2_000_000


def test_a_pool_follows_from_its_jobs_however_long_reading_takes(tiny, rows, config, buffer, monkeypatch):
    """Slots at each step, lengths, the order of leaving, and every bit of the adapters."""
    wordy = [Row((("user", f"{i}?"), ("assistant", "it is " * (i % 5) + "so"))) for i in range(9)]
    jobs = [
        Job("a", rows, {"steps": 4}),
        Job("large", Large(rows[1:]), {"steps": 5}),
        Job("bad", [], {}),
        Job("b", wordy, {"steps": 30}),
        Job("c", rows[2:9], {"steps": 3}),
        Job("d", rows[3:], {"steps": 6}),
    ]
    read, one_step = JobState.of, Pool._step

    def run(delays):
        steps, lengths = [], []

        def slow(job, *how):
            time.sleep(delays.get(job.name, 0))
            return read(job, *how)

        def watched(pool):
            steps.append([job and job.name for job in pool.slots])
            lengths.append(pool.lengths)
            return one_step(pool)

        monkeypatch.setattr(JobState, "of", slow)
        monkeypatch.setattr(Pool, "_step", watched)
        out = list(method.train_users(tiny, jobs, config, buffer=buffer, slots=2, mesh=ONE()))
        return steps, lengths, [o.name for o in out], bits_of(out)

    at_once = run({})
    steps, lengths, _, bits = at_once
    assert steps[0] == ["a", "b"] and len(lengths[0]) > 1 and len(bits) == 5
    since = [next(i for i, names in enumerate(steps) if name in names) for name in ("c", "d", "large")]
    assert since == sorted(since) and since[2] >= 20, "it lets others pass for 2e6 / 1e5 steps"
    assert run({"a": 0.7, "c": 0.7, "large": 1.2}) == at_once


def test_large_jobs_hold_nobody_up(train, rows):
    """Others go before them while they are read; and a job of many rows has one slot's share of a step, no more."""
    small_are_out = threading.Event()

    class Slow:
        size = 2_000_000

        def __iter__(self):
            small_are_out.wait()
            return iter(rows)

    small = [Job(f"small{i}", rows[i:], {"steps": 5}) for i in range(3)]
    many = [Row((("user", f"{i}?"), ("assistant", f"{i * 7}"))) for i in range(800)]
    names = []
    for outcome in train([Job("slow", Slow(), {"steps": 1}), Job("many", many, {"steps": 40}), *small]):
        names.append(outcome.name)
        if len(names) == 3:
            small_are_out.set()
    assert names == ["small0", "small1", "small2", "slow", "many"]


def step_of(tiny, config, rows, slots, active):
    """(stage, state, frozen, batch, turn) of a pool in which some slots have rows."""
    pool = Pool(tiny, config, frozen={}, slots=slots, mesh=ONE())
    taken, state = [None] * slots, pool.state
    for slot in active:
        job = JobState.of(Job(f"job{slot}", rows[slot:]), config, tiny, pool.lengths[-1], True)
        shapes = lora.target_shapes(tiny.params)
        first = lora.init(jax.random.key(slot), shapes, config.rank, config.alpha, "user", tiny.fingerprint)
        weights = {path: {"a": pair["a"], "b": pair["b"] + 0.01} for path, pair in first.weights.items()}
        state = step.put(state, np.int32(slot), step.first_state(first.replace(weights=weights), slot))
        taken[slot] = job.take(pool.lengths[-1], pool.rows)
    hyper = jax.tree.map(lambda x: np.full(slots, x), Hyper.of(config)._replace(learning_rate=np.float32(1e-2)))
    due, stage = np.isin(np.arange(slots), active), Stage.of(tiny.decoder, config, ONE())
    batch, turn = fill(taken, pool.lengths[-1], pool.rows), step.Turn(hyper, np.zeros(slots, bool), due)
    return stage, state, frozen_collections(tiny.params, {}, "stack"), batch, turn


def leaves_of(state, slot):
    """The arrays of one slot."""
    axes = step.user_axes(state)
    return jax.tree.leaves(jax.tree.map(lambda leaf, axis: np.take(np.array(leaf), slot, axis), state, axes))


def equal(one, other):
    return all(map(np.array_equal, one, other))


def test_no_loss_depends_on_anothers_adapter(tiny, rows, config):
    """The gradient of one user's loss by another's adapter is exactly 0; and so is what is reported of it."""
    for user in range(3):
        stage, state, frozen, batch, turn = step_of(tiny, config, rows, 3, [0, 1, 2])
        owner = np.repeat(np.arange(3), len(batch["weights"]) // 3)
        batch["weights"] = batch["weights"] * (owner == user)[:, None]
        after, metrics = step.pool_step(stage, state, frozen, batch, turn._replace(due=np.zeros(3, bool)))
        moved = [any(leaf.any() for leaf in leaves_of(after["gradient"], slot)) for slot in range(3)]
        assert moved == [slot == user for slot in range(3)]
        assert [loss > 0 for loss in metrics["loss"]] == moved


def test_slots_without_rows_stay_to_the_bit_and_unfinished_steps_only_gather(tiny, rows, config):
    for due in (True, False):
        stage, state, frozen, batch, turn = step_of(tiny, config, rows, 3, [0, 2])
        before = jax.tree.map(np.array, state)
        after, metrics = step.pool_step(stage, state, frozen, batch, turn._replace(due=np.array([due, False, True])))
        assert [equal(leaves_of(before, slot), leaves_of(after, slot)) for slot in range(3)] == [False, True, False]
        assert float(metrics["loss"][1]) == float(metrics["grad_norm"][1]) == 0 < float(metrics["loss"][0])
    for name in ("trainable", "opt_state", "step"):
        assert equal(leaves_of({name: before[name]}, 0), leaves_of({name: after[name]}, 0)), name
    assert any(leaf.any() for leaf in leaves_of(after["gradient"], 0))


def test_refilling_a_slot_compiles_nothing(train, rows, compiles):
    jobs = [Job(f"job{i}", rows[i:], {"learning_rate": 1e-3 * (i + 1), "steps": 2 + i % 3}) for i in range(9)]
    outcomes = train(jobs, steps=3)
    first = list(itertools.islice(outcomes, 2))
    met = len(compiles)
    rest = list(outcomes)
    assert len(first) + len(rest) == 9 and all(o.adapter for o in first + rest)
    assert compiles[met:] == []


def test_dropped_values_are_scaled_up_and_differ_by_place():
    def dropped(tokens):
        x = np.ones((3, tokens, 2000), np.float32)
        return np.asarray(drop(x, kept_by_row(np.uint32([3, 3, 4]), x.shape, 0.25), 0.25))

    out = dropped(5)
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)} and abs(out.mean() - 1) < 0.02
    np.testing.assert_array_equal(out[0], out[1])
    assert (out[0] != out[2]).any() and (out[0, 0] != out[0, 1]).any()
    np.testing.assert_array_equal(dropped(9)[:, :5], out)


@pytest.mark.parametrize(("sizes", "slots"), [((2, 2, 2), 4), ((4, 1, 1), 8)], ids=["222", "411"])
def test_on_a_mesh_users_lie_apart(tiny, train, rows, config, alone, sizes, slots):
    config, jobs = dataclasses.replace(config, steps=8), eight(rows)[:4]
    out = {o.name: o for o in train(jobs, slots, mesh_of(*sizes), steps=8, packing=config.packing)}
    for job in jobs:
        assert distance(out[job.name].adapter, alone(job, config)) < 5e-5, job.name
    state = Pool(tiny, config, slots=slots, mesh=mesh_of(*sizes)).state
    axes = jax.tree.leaves(step.user_axes(state))
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(state), axes, strict=True):
        parts = {str(shard.index[axis]) for shard in leaf.addressable_shards}
        assert len(parts) == (sizes[0] * sizes[1] if leaf_name(path) != "key" else 1), leaf_name(path)


class Unreadable(list):
    """Rows that are read to an error."""

    def __init__(self, error, rows):
        super().__init__(rows)
        self.error = error

    def __iter__(self):
        raise self.error


def test_bad_jobs_are_a_line_each_and_touch_no_other(train, rows, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": 3}\n')
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "file").write_text("in the way of its folder")
    wrong = {
        "empty": (tmp_path / "empty.jsonl", {}, "no rows"),
        "none": ([], {}, "there are none to train on"),
        "wrong": (tmp_path / "wrong.jsonl", {}, "'prompt' is int"),
        "absent": (tmp_path / "absent.jsonl", {}, "absent.jsonl"),
        "unknown": (rows, {"dropout": 0.5}, "'dropout' is the same for all of a pool"),
        "rank": (rows, {"rank": 5}, "rank is 5: the pool's 4 is the most"),
        "length": (rows, {"max_length": 41}, "max_length is 41: the pool's 40 is the most"),
        "rate": (rows, {"learning_rate": -1.0}, "learning_rate"),
        "long": ([Row((("user", "x" * 100), ("assistant", "y")))], {}, "no row is left to train on"),
        "file": (rows, {}, "w/file"),
    }
    for error in (RuntimeError("a parser's"), MemoryError()):  # whatever goes wrong in reading rows is the job's
        wrong[type(error).__name__] = (Unreadable(error, rows), {}, type(error).__name__)
    jobs = [Job(name, *given) for name, (*given, _) in wrong.items()]
    jobs.insert(3, Job("good", rows, {"steps": 2}))
    out = {o.name: o for o in train(jobs, slots=1, workdir=tmp_path / "w")}
    assert out.pop("good").adapter
    for name, (*_, message) in wrong.items():
        assert out[name].adapter is None and message in out[name].error and "\n" not in out[name].error, out[name]
        assert name in out[name].error or name in ("empty", "wrong", "absent", "long")


def test_names_slots_and_what_is_no_job(tiny, train, config):
    for name in ("", "a/b", "..", ".x", "a b", "x" * 101, 3, "a\n", "a\0"):
        with pytest.raises(UserError, match="name it by at most 100 letters"):
            Job(name, [])
    with pytest.raises(UserError, match="slots is 3: it must be a multiple of 4, the mesh's data and fsdp axes"):
        Pool(tiny, config, slots=3, mesh=mesh_of(2, 2, 1))
    for slots in (0, -1, "4", True):
        with pytest.raises(UserError, match=r"slots is .*: it must be a whole number from 1"):
            train({}, slots=slots)
    with pytest.raises(UserError, match=r"jobs: got a tuple: give br.Job"):
        list(train([("a", [])]))


def test_jobs_are_asked_for_when_there_is_room(tiny, rows, config, buffer):
    asked = []

    def jobs():
        for i in range(6):
            asked.append(i)
            yield Job(f"job{i}", rows, {"steps": 1}) if i != 1 else None  # None: not now

    config = dataclasses.replace(config, packing=0)
    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=1, mesh=ONE())
    outs, names = pool.train(jobs()), []
    names += [o.name for o in next(outs)]
    assert len(asked) <= 3
    for gone in outs:
        names += [o.name for o in gone]
    assert names == ["job0", "job2", "job3", "job4", "job5"] and pool.idle


def test_steps_are_those_of_a_run(tiny, rows):
    """The rows of a step, however they are laid out, add to the same tokens, with the same weights."""
    examples, _ = encode_rows(rows, tiny.tokenizer, tiny.template, 40)
    order = {"batch_size": 5, "seed": 3, "epochs": 2}
    packed, apart = (packed_steps(examples, length=length, **order) for length in (96, 0))
    assert len(packed) == len(apart) == 8
    for i in range(8):
        few, many = packed[i], apart[i]
        assert len(many) == (5 if i % 4 < 3 else 1) and len(few) <= len(many)
        for name in ("targets", "weights"):
            learnt = [sorted(np.concatenate([r[name][r["weights"] > 0] for r in laid])) for laid in (few, many)]
            assert learnt[0] == learnt[1], name
        assert all(len({len(v) for v in row.values()}) == 1 and row["segment_ids"].all() for row in [*few, *many])


def test_a_long_job_that_is_left_over_has_fewer_slots_beside_it(tiny, rows, config, buffer, alone, compiles):
    """Slots are halved while half will do, and are all there again for whoever comes; adapters stay what they are."""
    config = dataclasses.replace(config, packing=0)
    sizes, came = {}, []

    def jobs():
        yield Job("long", rows, {"steps": 100})
        yield from (Job(f"short{i}", rows[i:], {"steps": 3}) for i in range(3))
        while pool.step < 20:
            yield None
        yield from (Job(f"late{i}", rows[i + 3 :], {"steps": 3}) for i in range(3))

    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=4, mesh=ONE())
    for gone in pool.train(jobs()):
        sizes[pool.step] = len(pool.slots)
        came += gone
    assert [sizes[step] for step in (1, 2, 3, 4, 5, 20, 21, 24, 27, 100)] == [4, 4, 4, 2, 1, 1, 4, 4, 1, 1]
    assert sum(name == "jit(pool_step)" for name in compiles) <= 3
    ours = {o.name: o.adapter for o in came}
    assert len(ours) == 7
    for name, first, steps in (("long", 0, 100), ("late1", 4, 3)):
        expected = alone(Job(name, rows[first:], {"steps": steps}), config)
        assert distance(ours[name], expected) < 1e-4, name
