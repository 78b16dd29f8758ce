"""A run and its folder: what is trained and what is not, reuse, refusals, full disks, and one compile a shape."""

import errno
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.core.errors import UserError
from br_jax.core.io import read_jsonl
from br_jax.core.mesh import make_mesh
from br_jax.data.rows import Row, as_rows
from br_jax.training import batching, checkpoints, run
from br_jax.training.run import rows_fingerprint, train_adapter, train_params


def train(model, rows, config, workdir=None, **options):
    return train_adapter("sft", "user", model, rows, config, workdir=workdir, **options)


def fails_with(error, *args, **options):
    """`train` ends in this `UserError`, which is one line."""
    with pytest.raises(UserError, match=error) as caught:
        train(*args, **options)
    assert "\n" not in str(caught.value)


def stage_of(workdir):
    return json.loads((workdir / "sft" / "stage.json").read_text())


def test_the_base_is_the_same_objects_and_bytes_after_training(tiny, rows, quick, make_adapter):
    frozen = {"buffer": make_adapter("buffer")}
    leaves, before = jax.tree.leaves(tiny.params), jax.tree.map(np.array, (tiny.params, frozen))
    adapter = train(tiny, rows, quick(), frozen=frozen)
    assert all(a is b for a, b in zip(jax.tree.leaves(tiny.params), leaves, strict=True))
    jax.tree.map(np.testing.assert_array_equal, (tiny.params, frozen), before)
    assert adapter.roles == ("user",) and float(adapter.scale) == 2.0
    assert min(float(jnp.abs(pair["b"]).max()) for pair in adapter.weights.values()) > 1e-3, "a matrix did not move"
    folded = train(tiny, rows, quick(frozen="fold"), frozen=frozen)
    # f32 rounding of W + delta; Adam's first steps have the size of the rate whatever the gradient's size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), adapter.weights, folded.weights)


def test_a_finished_run_is_read_back(tmp_path, tiny, rows, quick, monkeypatch, capsys):
    first, stage = train(tiny, rows, quick(), tmp_path), stage_of(tmp_path)
    assert re.search(r"^sft: 16 rows, 4 steps, \d+\.\d s, loss \d\.\d{3}$", capsys.readouterr().err, re.M)
    assert stage["steps"] == 4 and stage["rows"] == 16 and stage["dropped"] == 0 and stage["compiles"] <= 1
    assert stage["inputs"]["base"] == tiny.fingerprint
    assert stage["answer_tokens"] == sum(len(row.turns[-1][1]) + 1 for row in rows) * 2  # EOS; four batches: two epochs
    assert stage["tokens"] == sum(sum(len(text) + 1 for _, text in row.turns) for row in rows) * 2
    losses = [record["loss"] for record in read_jsonl(tmp_path / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    monkeypatch.setattr(run, "_prepare", lambda *args: pytest.fail("trained again"))
    again = train(tiny, rows, quick(log_every=3, checkpoint_every=7), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert again.roles == first.roles


@pytest.mark.parametrize("same", [False, True])
def test_stages_of_one_seed_begin_with_the_same_a_where_asked(tiny, rows, quick, same):
    config = quick(same_start=same, learning_rate=1e-30, steps=1)
    ends = [train_adapter(name, "user", tiny, rows, config).weights for name in ("sft", "user")]
    assert all(bool((ends[0][path]["a"] == ends[1][path]["a"]).all()) == same for path in ends[0])


def test_another_config_or_other_inputs_are_refused(tmp_path, make_tiny, tiny, rows, quick, make_adapter):
    frozen = {"buffer": make_adapter("buffer")}
    train(tiny, rows, quick(), tmp_path, frozen=frozen)
    here, config = {"workdir": tmp_path, "frozen": frozen}, quick()
    said = f"{tmp_path}/sft: .* another config: learning_rate was 0.01, is 0.02: choose another workdir"
    fails_with(said, tiny, rows, quick(learning_rate=0.02), **here)
    fails_with(r"another inputs: rows was \w{12}\.\.\., is \w{12}", tiny, rows[1:], config, **here)
    theirs = make_tiny(rope_theta=9.0)
    beside = {"buffer": frozen["buffer"].replace(base=theirs.fingerprint)}
    fails_with("inputs: base was", theirs, rows, config, tmp_path, frozen=beside)
    fails_with("was made for the base", theirs, rows, config, **here)
    fails_with("inputs: buffer was .*, is null", tiny, rows, config, tmp_path)
    fails_with("inputs: buffer was", tiny, rows, config, tmp_path, frozen={"buffer": make_adapter("buffer", 1)})
    (tmp_path / "sft" / "run.json").write_text("{")
    fails_with("run.json: not valid JSON.*delete", tiny, rows, config, **here)
    other = make_adapter("buffer", model=make_tiny(ffw_dim=24)).replace(base="")
    fails_with("made for another model", tiny, rows, config, frozen={"buffer": other})


OPEN = pathlib.Path.open


def open_on_a_full_disk(path, *how, **options):
    return OPEN(pathlib.Path("/dev/full") if path.name == "metrics.jsonl" else path, *how, **options)


def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["br_jax.adapters.peft.write_bytes", "br_jax.core.io.os.replace"])
def test_a_disk_that_fills_up_at_the_end_leaves_nothing_half_written(tmp_path, tiny, rows, quick, monkeypatch, target):
    other = train(tiny, rows, quick(), tmp_path / "other")
    (tmp_path / "sft").mkdir()
    # run.json is written by the same function as stage.json: let it pass.
    (tmp_path / "sft" / "run.json").write_bytes((tmp_path / "other" / "sft" / "run.json").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(OSError, match="No space left on device"):
            train(tiny, rows, quick(), tmp_path)
    names = {path.name for path in (tmp_path / "sft").rglob("*")}
    assert "stage.json" not in names and not [name for name in names if "partial" in name or name.endswith(".tmp")]
    jax.tree.map(np.testing.assert_array_equal, train(tiny, rows, quick(), tmp_path), other)


def test_a_disk_that_takes_nothing_or_fills_up_on_the_way_is_one_line(tmp_path, tiny, rows, quick, monkeypatch):
    def failed(self):
        raise ValueError('RESOURCE_EXHAUSTED: Failed writing: "x": No space left on device\nmore')

    config = quick(checkpoint_every=2)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((UserError, OSError), match="file/sft"):
        train(tiny, rows, config, tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", open_on_a_full_disk)
        with pytest.raises(OSError, match=r"No space left on device: '.*/a/sft/metrics.jsonl'"):
            train(tiny, rows, config, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.ocp.CheckpointManager, "wait_until_finished", failed)
        fails_with("checkpoint not saved .RESOURCE_EXHAUSTED", tiny, rows, config, tmp_path / "b")
    usage = checkpoints.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    fails_with(r"checkpoint not saved \(0\.1 MB free, 1\.\d MB needed\)", tiny, rows, config, tmp_path / "c")
    assert not list((tmp_path / "c" / "sft" / "checkpoints").iterdir())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, make_tiny, rows, quick):
    model = make_tiny()
    model.params["final_norm"]["scale"] = model.params["final_norm"]["scale"].at[3].set(math.nan)
    fails_with("sft step 1: loss is nan: lower learning_rate", model, rows, quick(), tmp_path)
    assert not (tmp_path / "sft" / "stage.json").exists() and not (tmp_path / "sft" / "adapter").exists()


def test_what_the_model_cannot_have_is_refused_before_there_is_a_folder(tmp_path, tiny, rows, quick):
    for changes, message in (
        ({"rank": 17}, "^rank is 17: the model's v is 48 x 16: it must be at most 16"),
        ({"max_length": 129}, "^max_length is 129: the model's context is 128 tokens"),
        ({"buckets": (16, 129)}, r"^buckets is \(16, 129\): the model's context is 128 tokens"),
        ({"targets": ("q", "w")}, "unknown targets: adapter target 'w'; near"),
        ({"steps": 0, "epochs": 10**6, "batch_size": 1}, "^epochs is 1000000: on 16 rows that is more than"),
    ):
        fails_with(message, tiny, rows, quick(**changes), tmp_path)
    fails_with("^rows: there are none to train on", tiny, [], quick(), tmp_path)
    with pytest.raises(UserError, match=r"^max_length is 129"):
        train_params("pretrain", tiny, rows, quick(rank=17, max_length=129), pytest.fail, workdir=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_probes_look_at_both_ends_and_do_not_train(tmp_path, tiny, rows, quick):
    probes = {"harmful": rows[:3], "benign": rows[3:8]}
    config = quick(probe_every=3)
    probed = train(tiny, rows, config, tmp_path, probes=probes)
    records = read_jsonl(tmp_path / "sft" / "probes.jsonl")
    assert [(r["step"], r["rows"]) for r in records] == [(s, kind) for s in (0, 3, 4) for kind in probes]
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records)
    seen = []
    watch = lambda step, adapter: seen.append((step, jax.device_get(adapter.weights)))  # noqa: E731
    watched = train(tiny, rows, config, watch=watch)
    assert [step for step, _ in seen] == [0, 3, 4]
    assert all(not pair["b"].any() for pair in seen[0][1].values()), "the first has not begun"
    jax.tree.map(np.testing.assert_array_equal, seen[-1][1], watched.weights)
    jax.tree.map(np.testing.assert_array_equal, probed, watched)
    jax.tree.map(np.testing.assert_array_equal, probed, train(tiny, rows, config))


def test_two_buckets_compile_twice_and_a_second_epoch_never(tmp_path, tiny, rows, quick, compiles):
    config = quick(steps=0, epochs=3, batch_size=4, max_length=32, buckets=(16,), loss_chunk=5)  # as nobody else
    short = [Row((("user", f"{i}"), ("assistant", "yes"))) for i in range(32)]
    train(tiny, short + rows, config, tmp_path, mesh=make_mesh(devices=jax.devices()[:1]))
    assert stage_of(tmp_path)["steps"] == 36
    assert compiles.count("jit(train_step)") == stage_of(tmp_path)["compiles"] == 2


def test_a_packed_run_is_the_unpacked_run(tmp_path, tiny, rows, quick):
    """Batches that do not divide the rows, in two micro-batches."""
    adapters, found, counts = [], [], []
    for packing, parts, mesh in ((0, 1, make_mesh(devices=jax.devices()[:1])), (64, 2, make_mesh(2, 2, 2))):
        config = quick(batch_size=8, learning_rate=1e-3, max_length=26, packing=packing, accumulation=parts)
        folder = tmp_path / str(packing)
        adapters.append(train(tiny, rows[:13], config, folder, mesh=mesh, probes={"benign": rows[13:]}).weights)
        metrics, probes = (read_jsonl(folder / "sft" / f"{name}.jsonl") for name in ("metrics", "probes"))
        found.append([[r[k] for r in metrics] for k in ("step", "loss", "grad_norm", "learning_rate", "tokens")])
        found[-1] += [[r[k] for r in probes] for k in ("loss", "grad_norm")]
        counts.append([stage_of(folder)[name] for name in ("steps", "rows", "tokens", "answer_tokens")])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *adapters)  # the same sums in another order
    for one, expected in zip(*found, strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-5)
    assert counts[0] == counts[1]


def test_a_new_cycle_compiles_nothing_on_a_mesh(tmp_path, tiny, rows, quick, compiles):
    """Moments of 0 lie where the others lay; whole on each device they would be another program's."""
    train(tiny, rows[:8], quick(steps=4, cycles=2, batch_size=8), tmp_path, mesh=make_mesh(1, 4, 2))
    assert compiles.count("jit(train_step)") == stage_of(tmp_path)["compiles"] == 1


def test_every_param_of_a_small_model_can_be_trained(tmp_path, tiny, rows, quick):
    saved, start = [], jax.tree.map(np.array, tiny.params)
    for _ in range(2):
        train_params("pretrain", tiny, rows, quick(), saved.append, workdir=tmp_path)
    (params,) = saved  # once: it is finished then
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), params, tiny.params)))
    jax.tree.map(np.testing.assert_array_equal, tiny.params, start)


def test_what_does_not_fit_is_told(tiny, rows, quick, monkeypatch):
    told = []
    monkeypatch.setattr(batching.logging, "warning", lambda message, *values: told.append(message % values))
    long = [{"prompt": "a" * n, "response": "b" * 30} for n in (60, 20, 70)]
    train(tiny, [*rows, *as_rows(long)], quick(probe_every=3), probes={"harmful": long[1:], "benign": rows[:3]})
    assert told == [
        "sft: of 19 rows 2 are left out and 1 lose their end at 40 tokens (the first, rows[0], has 92 tokens): "
        "raise max_length",
        "sft: of 2 rows of the probe harmful 1 are left out and 1 lose their end at 40 tokens "
        "(the first, probes['harmful'][0], has 52 tokens): raise max_length",
    ]


def test_rows_that_read_alike_and_train_otherwise_are_others():
    turns = (("user", "Why?"), ("assistant", "So."))
    rows = [Row(turns, *parts) for parts in ((), ("An input.",), ("", "task", "a.jsonl:1"))] + [Row(turns, begun="No.")]
    plain, with_input, told, begun = (rows_fingerprint([row]) for row in rows)
    assert plain == told and len({plain, with_input, begun}) == 3
