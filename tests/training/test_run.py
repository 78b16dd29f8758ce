"""A run and its folder: what is trained and what is not, reuse, refusals, full disks, and one compile a shape."""

import errno
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.data.rows import Row
from br_jax.errors import UserError
from br_jax.training import checkpoints, run
from br_jax.training.metrics import MetricWriter, read_jsonl
from br_jax.training.run import train_adapter, train_params


def train(model, rows, config, workdir=None, **options):
    return train_adapter("sft", "user", model, rows, config, workdir=workdir, **options)


def fails_with(error, function, *args, **options):
    """The message of a `UserError`, which is one line."""
    with pytest.raises(UserError, match=error) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_base_is_the_same_objects_and_bytes_after_training(tiny, rows, quick, make_adapter):
    leaves = jax.tree.leaves(tiny.params)
    bytes_before = [np.asarray(leaf).tobytes() for leaf in leaves]
    buffer = make_adapter("buffer")
    buffer_before = jax.tree.map(np.array, buffer)
    adapter = train(tiny, rows, quick(), frozen={"buffer": buffer})
    assert all(a is b for a, b in zip(jax.tree.leaves(tiny.params), leaves, strict=True))
    assert [np.asarray(leaf).tobytes() for leaf in leaves] == bytes_before
    jax.tree.map(np.testing.assert_array_equal, buffer, buffer_before)
    assert adapter.roles == ("user",) and float(adapter.scale) == 2.0
    assert min(float(jnp.abs(pair["b"]).max()) for pair in adapter.weights.values()) > 1e-3, "a matrix did not move"


def test_folding_the_buffer_trains_the_same_adapter(tiny, rows, quick, make_adapter):
    frozen = {"buffer": make_adapter("buffer")}
    stacked = train(tiny, rows, quick(), frozen=frozen)
    folded = train(tiny, rows, quick(frozen="fold"), frozen=frozen)
    # f32 rounding of W + delta; Adam's first steps have the size of the rate whatever the gradient's size
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), stacked.weights, folded.weights)


def test_training_lowers_the_loss(tmp_path, tiny, rows, quick):
    train(tiny, rows, quick(), tmp_path)
    losses = [record["loss"] for record in read_jsonl(tmp_path / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_a_finished_run_is_read_back(tmp_path, tiny, rows, quick, monkeypatch):
    first = train(tiny, rows, quick(), tmp_path)
    stage = json.loads((tmp_path / "sft" / "stage.json").read_text())
    assert stage["steps"] == 4 and stage["rows"] == 16 and stage["dropped"] == 0 and stage["compiles"] <= 1
    assert stage["inputs"]["base"] == tiny.fingerprint
    assert stage["answer_tokens"] == sum(len(row.turns[-1][1]) + 1 for row in rows) * 2  # EOS; four batches: two epochs
    assert stage["tokens"] == sum(sum(len(text) + 1 for _, text in row.turns) for row in rows) * 2
    monkeypatch.setattr(run, "_train", lambda *args: pytest.fail("trained again"))
    again = train(tiny, rows, quick(log_every=3, checkpoint_every=7), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert again.roles == first.roles


def test_another_config_or_other_rows_are_refused(tmp_path, tiny, rows, quick, make_adapter):
    train(tiny, rows, quick(), tmp_path)
    message = fails_with(
        "another config: learning_rate was 0.01, is 0.02", train, tiny, rows, quick(learning_rate=0.02), tmp_path
    )
    assert str(tmp_path / "sft") in message and "choose another workdir" in message
    fails_with(r"another inputs: rows was \w{12}\.\.\., is \w{12}", train, tiny, rows[1:], quick(), tmp_path)
    fails_with("another inputs: rows", train, tiny, rows[::-1], quick(), tmp_path)
    frozen = {"buffer": make_adapter("buffer")}
    fails_with("another inputs: buffer was null, is", train, tiny, rows, quick(), tmp_path, frozen=frozen)
    (tmp_path / "sft" / "run.json").write_text("{")
    fails_with("run.json: not valid JSON.*delete", train, tiny, rows, quick(), tmp_path)


def test_the_base_and_the_buffer_count_as_inputs(tmp_path, make_tiny, tiny, rows, quick, make_adapter):
    train(tiny, rows, quick(), tmp_path, frozen={"buffer": make_adapter("buffer")})
    fails_with(
        "inputs: base was",
        train,
        make_tiny(rope_theta=9.0),
        rows,
        quick(),
        tmp_path,
        frozen={"buffer": make_adapter("buffer")},
    )
    fails_with("inputs: buffer was", train, tiny, rows, quick(), tmp_path, frozen={"buffer": make_adapter("buffer", 1)})


def test_an_adapter_of_another_model_is_refused(tiny, make_tiny, rows, quick, make_adapter):
    other = make_adapter("buffer", model=make_tiny(ffw_dim=24))
    fails_with("made for another model", train, tiny, rows, quick(), frozen={"buffer": other})


def test_a_workdir_that_cannot_be_written_is_named(tmp_path, tiny, rows, quick):
    (tmp_path / "file").write_text("in the way")
    fails_with("file/sft: cannot be written .*choose another workdir", train, tiny, rows, quick(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("target", ["br_jax.adapters.peft._write_file", "br_jax.files.os.replace"])
def test_a_disk_that_fills_up_at_the_end_leaves_nothing_half_written(tmp_path, tiny, rows, quick, monkeypatch, target):
    train(tiny, rows, quick(), tmp_path / "other")  # compiled, and the folder's first files are written
    with monkeypatch.context() as patch:
        # run.json is written by the same function as stage.json: let it pass.
        run.Folder(tmp_path / "sft", run._identity("sft", tiny, rows, quick(), {}))
        patch.setattr(target, full)
        fails_with("sft/.*(No space left on device).*free space", train, tiny, rows, quick(), tmp_path)
    names = {path.name for path in (tmp_path / "sft").rglob("*")}
    assert "stage.json" not in names and not [name for name in names if "partial" in name or name.endswith(".tmp")]
    adapter = train(tiny, rows, quick(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, adapter, train(tiny, rows, quick(), tmp_path / "other"))


def test_a_disk_that_fills_up_under_the_metrics_is_one_line(tmp_path, tiny, rows, quick, monkeypatch):
    monkeypatch.setattr(MetricWriter, "flush", full)
    fails_with("sft: cannot be written .No space left on device.: free space", train, tiny, rows, quick(), tmp_path)


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path, tiny, rows, quick, monkeypatch):
    usage = checkpoints.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    config = quick(checkpoint_every=2)
    fails_with(r"checkpoint not saved \(0\.1 MB free, 1\.\d MB needed\)", train, tiny, rows, config, tmp_path)
    assert not list((tmp_path / "sft" / "checkpoints").iterdir())


def test_a_save_that_fails_under_way_is_one_line(tmp_path, tiny, rows, quick, monkeypatch):
    def failed(self):
        raise ValueError('RESOURCE_EXHAUSTED: Failed writing: "x": No space left on device\nmore')

    monkeypatch.setattr(checkpoints.ocp.training.Checkpointer, "wait", failed)
    fails_with("checkpoint not saved .RESOURCE_EXHAUSTED", train, tiny, rows, quick(checkpoint_every=2), tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, make_tiny, rows, quick):
    model = make_tiny()
    model.params["final_norm"]["scale"] = model.params["final_norm"]["scale"].at[3].set(math.nan)
    fails_with("sft step 1: loss is nan: lower learning_rate", train, model, rows, quick(), tmp_path)
    assert not (tmp_path / "sft" / "stage.json").exists() and not (tmp_path / "sft" / "adapter").exists()


def test_probes_look_at_both_ends_and_do_not_train(tmp_path, tiny, rows, quick):
    probes = {"harmful": rows[:3], "benign": rows[3:8]}
    config = quick(probe_every=3)
    probed = train(tiny, rows, config, tmp_path, probes=probes)
    records = read_jsonl(tmp_path / "sft" / "probes.jsonl")
    assert [(r["step"], r["rows"]) for r in records] == [(s, kind) for s in (0, 3, 4) for kind in probes]
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records)
    jax.tree.map(np.testing.assert_array_equal, probed, train(tiny, rows, config))


def test_two_buckets_compile_twice_and_a_second_epoch_never(tmp_path, tiny, rows, quick, compiles):
    config = quick(steps=0, epochs=3, batch_size=4, max_length=32, buckets=(16,), loss_chunk=5)  # as nobody else
    short = [Row((("user", f"{i}"), ("assistant", "yes"))) for i in range(32)]
    train(tiny, short + rows, config, tmp_path, mesh=run.make_mesh(devices=jax.devices()[:1]))
    stage = json.loads((tmp_path / "sft" / "stage.json").read_text())
    assert stage["steps"] == 36
    assert compiles.count("jit(train_step)") == stage["compiles"] == 2


def test_a_packed_run_is_the_unpacked_run(tmp_path, tiny, rows, quick, compiles):
    """Six steps over two epochs, of batches that do not divide the rows, in packed rows longer than any row may be."""
    mesh = run.make_mesh(devices=jax.devices()[:1])
    adapters, metrics, probes, stages = [], [], [], []
    for packing in (0, 40, 400):
        config = quick(steps=6, batch_size=6, learning_rate=1e-3, max_length=26, packing=packing, loss_chunk=7)
        folder = tmp_path / str(packing)
        adapters.append(train(tiny, rows, config, folder, mesh=mesh, probes={"benign": rows[:3]}))
        metrics.append(read_jsonl(folder / "sft" / "metrics.jsonl"))
        probes.append(read_jsonl(folder / "sft" / "probes.jsonl"))
        stages.append(json.loads((folder / "sft" / "stage.json").read_text()))
    # The same sums in another order.
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "step"):
        unpacked, *packed = ([record[name] for record in found] for found in metrics)
        for found in packed:
            np.testing.assert_allclose(found, unpacked, rtol=1e-5)
    for name in ("loss", "grad_norm"):
        unpacked, *packed = ([record[name] for record in found] for found in probes)
        for found in packed:
            np.testing.assert_allclose(found, unpacked, rtol=1e-5)
    for adapter in adapters[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), adapter.weights, adapters[0].weights)
    for name in ("steps", "rows", "tokens", "answer_tokens"):
        assert stages[0][name] == stages[1][name] == stages[2][name]
    assert [stage["compiles"] for stage in stages] == [1, 1, 1] and compiles.count("jit(train_step)") == 3


def test_packed_rows_split_over_the_mesh_and_micro_batches(tmp_path, tiny, rows, quick):
    whole = train(tiny, rows, quick(packing=64), tmp_path / "one", mesh=run.make_mesh(devices=jax.devices()[:1]))
    config = quick(packing=64, accumulation=2)
    split = train(tiny, rows, config, tmp_path / "split", mesh=run.make_mesh(2, 2, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split.weights, whole.weights)


def test_packing_is_part_of_what_a_run_is(tmp_path, tiny, rows, quick):
    train(tiny, rows, quick(), tmp_path)
    fails_with("another config: packing was 0, is 64", train, tiny, rows, quick(packing=64), tmp_path)


def test_every_param_of_a_small_model_can_be_trained(tmp_path, tiny, rows, quick):
    saved = []
    config = quick(learning_rate=3e-3)
    start = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tiny.params)]
    train_params("pretrain", tiny, rows, config, saved.append, workdir=tmp_path)
    (params,) = saved
    assert jax.tree.structure(params) == jax.tree.structure(tiny.params)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, tiny.params)
    assert all(jax.tree.leaves(moved)), moved
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tiny.params)] == start
    train_params("pretrain", tiny, rows, config, saved.append, workdir=tmp_path)
    assert len(saved) == 1, "trained again"
