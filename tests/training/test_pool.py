"""Many users side by side are each the run that they would be alone."""

import dataclasses
import functools
import itertools
import re
import threading

import jax
import numpy as np
import pytest
from pooled import ONE, bits_of, distance, mesh_of

from br_jax import method
from br_jax.adapters import lora
from br_jax.core.errors import UserError
from br_jax.core.mesh import leaf_name
from br_jax.data.batches import encode_rows
from br_jax.data.packing import packed_steps
from br_jax.data.rows import Row
from br_jax.models.decoder import drop_by_row
from br_jax.training.jobs import Job, JobState
from br_jax.training.pool import Pool
from br_jax.training.schedule import fill
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
    made = {}

    def run(job, config):
        settings = dataclasses.replace(job.config(config), packing=0) if job.settings else config
        key = job.name, settings
        if key not in made:
            made[key] = method.train_user(tiny, job.rows, settings, buffer=buffer, mesh=ONE())
        return made[key]

    return run


@pytest.fixture(autouse=True)
def breaks(monkeypatch):
    """What the job "broken" learns from its fourth step on is no number."""
    take = JobState.take

    def broken(course, length, count):
        taken = take(course, length, count)
        if course.name == "broken" and course.step > 3:
            taken.rows[0]["weights"][:] = np.nan
        return taken

    monkeypatch.setattr(JobState, "take", broken)


def test_each_of_eight_is_the_run_by_itself(tiny, rows, config, buffer, alone):
    jobs = eight(rows)
    out = {o.name: o for o in method.train_users(tiny, jobs, config, buffer=buffer, slots=8, mesh=ONE())}
    assert out.keys() == {job.name for job in jobs}
    broken = out.pop("broken")
    assert broken.adapter is None
    assert re.search(r"^job broken step \d+: loss is nan: lower learning_rate", broken.error)
    for job in jobs:
        if job.name == "broken":
            continue
        found, expected = out[job.name].adapter, alone(job, config)
        assert distance(found, expected) < 1e-5, job.name
        assert (found.roles, found.base, float(found.scale)) == (expected.roles, expected.base, float(expected.scale))


def test_neighbours_change_no_bit(tiny, rows, config, buffer):
    config = dataclasses.replace(config, packing=0)  # one length for all turns
    train = functools.partial(method.train_users, tiny, config=config, buffer=buffer, slots=4, mesh=ONE())
    plain, gentle, *_, broken, three, short = eight(rows)
    alone = bits_of(train([plain]))
    beside = bits_of(train([gentle, broken, plain, three, short]))
    assert beside["plain"] == alone["plain"]
    assert bits_of(train([short, plain, gentle]))["gentle"] == beside["gentle"]


def turn_of(tiny, config, rows, slots, active):
    """(stage, state, frozen, batch, turn) of a pool in which some slots have rows."""
    pool = Pool(tiny, config, frozen={}, slots=slots, mesh=ONE())
    taken, state = [None] * slots, pool.state
    for slot in active:
        course = JobState.of(Job(f"job{slot}", rows[slot:]), config, tiny, pool.lengths[-1], True)
        shapes = lora.target_shapes(tiny.params)
        first = lora.init(jax.random.key(slot), shapes, config.rank, config.alpha, "user", tiny.fingerprint)
        weights = {path: {"a": pair["a"], "b": pair["b"] + 0.01} for path, pair in first.weights.items()}
        one = users.begin(first.replace(weights=weights), slot)
        state = users.put(state, np.int32(slot), one)
        taken[slot] = course.take(pool.lengths[-1], pool.rows)
    hyper = jax.tree.map(lambda x: np.full(slots, x), Hyper.of(config)._replace(learning_rate=np.float32(1e-2)))
    due, stage = np.isin(np.arange(slots), active), Stage.of(tiny.decoder, config, ONE())
    batch, turn = fill(taken, pool.lengths[-1], pool.rows), users.Turn(hyper, np.zeros(slots, bool), due)
    return stage, state, frozen_collections(tiny.params, {}, "stack"), batch, turn


def leaves_of(state, slot):
    """The arrays of one slot."""
    axes = users.user_axes(state)
    return jax.tree.leaves(jax.tree.map(lambda leaf, axis: np.take(np.array(leaf), slot, axis), state, axes))


def equal(one, other):
    return all(map(np.array_equal, one, other))


def test_no_loss_depends_on_anothers_adapter(tiny, rows, config):
    """The gradient of one user's loss by another's adapter is exactly 0; and so is what is reported of it."""
    for user in range(3):
        stage, state, frozen, batch, turn = turn_of(tiny, config, rows, 3, [0, 1, 2])
        owner = np.repeat(np.arange(3), len(batch["weights"]) // 3)
        batch["weights"] = batch["weights"] * (owner == user)[:, None]
        after, metrics = users.pool_step(stage, state, frozen, batch, turn._replace(due=np.zeros(3, bool)))
        moved = [any(leaf.any() for leaf in leaves_of(after["gradient"], slot)) for slot in range(3)]
        assert moved == [slot == user for slot in range(3)]
        assert [loss > 0 for loss in metrics["loss"]] == moved


def test_slots_without_rows_stay_to_the_bit_and_unfinished_steps_only_gather(tiny, rows, config):
    stage, state, frozen, batch, turn = turn_of(tiny, config, rows, 3, [0, 2])
    before = jax.tree.map(np.array, state)
    after, metrics = users.pool_step(stage, state, frozen, batch, turn)
    assert [equal(leaves_of(before, slot), leaves_of(after, slot)) for slot in range(3)] == [False, True, False]
    assert float(metrics["loss"][1]) == float(metrics["grad_norm"][1]) == 0 < float(metrics["loss"][0])
    stage, state, frozen, batch, turn = turn_of(tiny, config, rows, 3, [0, 2])
    after, _ = users.pool_step(stage, state, frozen, batch, turn._replace(due=np.array([False, False, True])))
    for name in ("trainable", "opt_state", "step"):
        assert equal(leaves_of({name: before[name]}, 0), leaves_of({name: after[name]}, 0)), name
    assert any(leaf.any() for leaf in leaves_of(after["gradient"], 0))


def test_refilling_a_slot_compiles_nothing(tiny, rows, config, buffer, compiles):
    config = dataclasses.replace(config, steps=3, packing=0)
    jobs = [Job(f"job{i}", rows[i:], {"learning_rate": 1e-3 * (i + 1), "steps": 2 + i % 3}) for i in range(9)]
    outcomes = method.train_users(tiny, jobs, config, buffer=buffer, slots=4, mesh=ONE())
    first = list(itertools.islice(outcomes, 2))
    met = len(compiles)
    rest = list(outcomes)
    assert len(first) + len(rest) == 9 and all(o.adapter for o in first + rest)
    assert compiles[met:] == []


def test_dropout_depends_on_the_user_alone(tiny, rows, config, buffer):
    config = dataclasses.replace(config, packing=0, dropout=0.3, steps=6)
    train = functools.partial(method.train_users, tiny, config=config, buffer=buffer, mesh=ONE())
    alone = bits_of(train([Job("a", rows)], slots=4))
    beside = bits_of(train([Job("b", rows[4:]), Job("a", rows), Job("c", rows, {"seed": 9})], slots=4))
    assert alone["a"] == beside["a"] != beside["c"]
    assert alone["a"] != bits_of(train([Job("a", rows)], slots=4, config=dataclasses.replace(config, dropout=0.0)))["a"]


def test_dropped_values_are_scaled_up_and_differ_by_place():
    seeds = np.uint32([3, 3, 4])
    out = np.asarray(drop_by_row(np.ones((3, 5, 2000), np.float32), seeds, 0.25))
    assert set(np.unique(out)) == {0, np.float32(1 / 0.75)} and abs(out.mean() - 1) < 0.02
    np.testing.assert_array_equal(out[0], out[1])
    assert (out[0] != out[2]).any() and (out[0, 0] != out[0, 1]).any()
    longer = np.asarray(drop_by_row(np.ones((3, 9, 2000), np.float32), seeds, 0.25))
    np.testing.assert_array_equal(longer[:, :5], out)


@pytest.mark.parametrize(
    ("sizes", "slots"),
    [((2, 2, 2), 4), ((4, 1, 1), 8), ((1, 4, 2), 4), ((2, 1, 1), 2)],
    ids=["222", "411", "142", "211"],
)
def test_on_a_mesh_users_lie_apart(tiny, rows, config, buffer, alone, sizes, slots):
    config = dataclasses.replace(config, steps=8)
    jobs = eight(rows)[:4]
    out = {o.name: o for o in method.train_users(tiny, jobs, config, buffer=buffer, slots=slots, mesh=mesh_of(*sizes))}
    for job in jobs:
        assert distance(out[job.name].adapter, alone(job, config)) < 5e-5, job.name
    state = Pool(tiny, config, slots=slots, mesh=mesh_of(*sizes)).state
    axes = jax.tree.leaves(users.user_axes(state))
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(state), axes, strict=True):
        parts = {str(shard.index[axis]) for shard in leaf.addressable_shards}
        assert len(parts) == (sizes[0] * sizes[1] if leaf_name(path) != "key" else 1), leaf_name(path)


def test_slots_that_the_mesh_does_not_divide(tiny, config):
    with pytest.raises(UserError, match="slots is 3: it must be a multiple of 4, the mesh's data and fsdp axes"):
        Pool(tiny, config, slots=3, mesh=mesh_of(2, 2, 1))


def test_bad_jobs_are_a_line_each_and_touch_no_other(tiny, rows, config, buffer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "wrong.jsonl").write_text('{"prompt": 3}\n')
    wrong = {
        "empty": (tmp_path / "empty.jsonl", {}, "no rows"),
        "none": ([], {}, "there are none to train on"),
        "wrong": (tmp_path / "wrong.jsonl", {}, "'prompt' is int"),
        "absent": (tmp_path / "absent.jsonl", {}, "no such file"),
        "unknown": (rows, {"dropout": 0.5}, "'dropout' is the same for all of a pool"),
        "rank": (rows, {"rank": 5}, "rank is 5: the pool's 4 is the most"),
        "length": (rows, {"max_length": 41}, "max_length is 41: the pool's 40 is the most"),
        "rate": (rows, {"learning_rate": -1.0}, "learning_rate"),
        "long": ([Row((("user", "x" * 100), ("assistant", "y")))], {}, "no row is left to train on"),
    }
    jobs = [Job(name, given, settings) for name, (given, settings, _) in wrong.items()]
    jobs.insert(3, Job("good", rows, {"steps": 2}))
    config = dataclasses.replace(config, packing=0)
    out = {o.name: o for o in method.train_users(tiny, jobs, config, buffer=buffer, slots=1, mesh=ONE())}
    assert out.pop("good").adapter
    for name, (*_, said) in wrong.items():
        assert out[name].adapter is None and said in out[name].error and "\n" not in out[name].error, out[name]
        assert name in out[name].error or name in ("empty", "wrong", "absent", "long")


def test_names(tiny):
    for name in ("", "a/b", "..", ".x", "a b", "x" * 101, 3, "a\n"):
        with pytest.raises(UserError, match="name it by at most 100 letters"):
            Job(name, [])


def test_it_needs_buffer(tiny, rows, config):
    with pytest.raises(UserError, match="no Buffer, so these rows could undo the alignment"):
        method.train_users(tiny, {"a": rows}, config)


def test_jobs_are_asked_for_when_there_is_room(tiny, rows, config, buffer):
    asked = []

    def jobs():
        for i in range(6):
            asked.append(i)
            yield Job(f"job{i}", rows, {"steps": 1}) if i != 1 else None  # None: not now

    config = dataclasses.replace(config, packing=0)
    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=1, mesh=ONE())
    turns, names = pool.train(jobs()), []
    names += [o.name for o in next(turns)]
    assert len(asked) <= 3
    for gone in turns:
        names += [o.name for o in gone]
    assert names == ["job0", "job2", "job3", "job4", "job5"] and pool.idle


@pytest.mark.parametrize("error", [RuntimeError("a parser's"), MemoryError()])
def test_whatever_goes_wrong_in_reading_rows_is_the_jobs(tiny, rows, config, buffer, error):
    class Rows(list):
        def __iter__(self):
            raise error

    jobs, config = [Job("bad", Rows(rows)), Job("good", rows, {"steps": 1})], dataclasses.replace(config, packing=0)
    out = {o.name: o for o in method.train_users(tiny, jobs, config, buffer=buffer, slots=1, mesh=ONE())}
    assert out["good"].adapter is not None and type(error).__name__ in out["bad"].error


def test_a_long_job_holds_nobody_up(tiny, rows, config, buffer):
    """A job of 3,000 rows takes one slot's share of every turn, and no more."""
    many = [Row((("user", f"{i}?"), ("assistant", f"{i * 7}"))) for i in range(3000)]
    small = [Job(f"small{i}", rows, {"steps": 5}) for i in range(3)]
    config = dataclasses.replace(config, packing=0)
    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=4, mesh=ONE())
    gone = []
    for out in pool.train([Job("large", many, {"steps": 0, "epochs": 1}), *small]):
        gone += [o.name for o in out]
        if len(gone) == 3:
            break
    assert sorted(gone) == ["small0", "small1", "small2"] and pool.step <= 8


def test_rows_that_take_long_to_read_hold_nobody_up(tiny, rows, config, buffer):
    small_are_out = threading.Event()

    class Slow:
        def __iter__(self):
            small_are_out.wait(60)
            return iter(rows)

    jobs = [Job("slow0", Slow()), Job("slow1", Slow()), *(Job(f"small{i}", rows[i:]) for i in range(4))]
    out = []
    for outcome in method.train_users(tiny, jobs, config, buffer=buffer, slots=4, mesh=ONE()):
        out.append(outcome.name)
        if len(out) == 4:
            waited = small_are_out.is_set()
            small_are_out.set()
    assert not waited and {"slow0", "slow1"} == set(out[4:])


def test_steps_are_those_of_a_run(tiny, rows):
    """The rows of a step, however they are laid out, add to the same tokens, with the same weights."""
    examples, _ = encode_rows(rows, tiny.tokenizer, tiny.template, 40)
    order = {"batch_size": 5, "seed": 3, "epochs": 2}
    packed, apart = (packed_steps(examples, length=length, **order) for length in (96, 0))
    assert len(packed) == len(apart) == 8
    for i in range(8):
        few, all_ = packed[i], apart[i]
        assert len(all_) == (5 if i % 4 < 3 else 1) and len(few) <= len(all_)
        for name in ("targets", "weights"):
            learnt = [sorted(np.concatenate([r[name][r["weights"] > 0] for r in laid])) for laid in (few, all_)]
            assert learnt[0] == learnt[1], name
        assert all(len({len(v) for v in row.values()}) == 1 and row["segment_ids"].all() for row in [*few, *all_])


def test_a_long_job_that_is_left_over_has_fewer_slots_beside_it(tiny, rows, config, buffer, compiles):
    """Slots are halved while half will do, and are all there again for whoever comes; adapters stay what they are."""
    config = dataclasses.replace(config, packing=0)
    sizes, came = [], []

    def jobs():
        yield Job("long", rows, {"steps": 140})
        yield from (Job(f"short{i}", rows[i:], {"steps": 3}) for i in range(3))
        while len(sizes) < 20:
            yield None
        yield from (Job(f"late{i}", rows[i + 3 :], {"steps": 3}) for i in range(3))

    pool = Pool(tiny, config, frozen={"buffer": buffer}, slots=4, mesh=ONE())
    for gone in pool.train(jobs()):
        sizes.append(len(pool.slots))
        came += gone
    assert sizes[:3] == [4, 4, 4] and sizes[6] == 1 and 4 in sizes[20:24] and sizes[-1] == 1
    found = {o.name: o.adapter for o in came}
    assert len(found) == 7
    for name, first, steps in (("long", 0, 140), ("late1", 4, 3)):
        settings = Job(name, rows[first:], {"steps": steps}).config(config)
        alone = method.train_user(tiny, rows[first:], settings, buffer=buffer, mesh=ONE())
        assert distance(found[name], alone) < 1e-4, name
    assert sum(name == "jit(pool_step)" for name in compiles) <= 3
