"""A run that is stopped and started again is the run that was not stopped."""

import asyncio
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import stopped_run

from br_jax.core.io import read_jsonl
from br_jax.core.mesh import leaf_name, make_mesh
from br_jax.training.checkpoints import Checkpoints
from br_jax.training.folder import MetricWriter
from br_jax.training.run import train_adapter

SCRIPT = pathlib.Path(__file__).with_name("stopped_run.py")
STEPS = 12  # the script's


def start(workdir, *death):
    """Runs the script in a process of its own, with as many devices as here; returns its exit status."""
    command = [sys.executable, str(SCRIPT), str(workdir), *map(str, death)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.slow
def test_killed_twice_and_in_a_save_the_adapter_is_bit_equal(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    stopped_run.main(straight)
    first, last = sorted(random.Random(0).sample(range(1, STEPS), 2))
    for death in (first, "save", last):
        assert start(stopped, death) == -signal.SIGKILL
        if death == "save":
            assert list((stopped / "sft" / "checkpoints").glob("*tmp*")), "the save had not begun, or was over"
        assert not (stopped / "sft" / "stage.json").exists() and not (stopped / "sft" / "adapter").exists()
    assert start(stopped) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (stopped / "sft/adapter" / name).read_bytes() == (straight / "sft/adapter" / name).read_bytes()
    records = [read_jsonl(folder / "sft" / "metrics.jsonl") for folder in (straight, stopped)]
    for name in ("step", "loss", "grad_norm", "learning_rate", "tokens"):
        assert [r[name] for r in records[0]] == [r[name] for r in records[1]]
    stages = [json.loads((folder / "sft" / "stage.json").read_text()) for folder in (straight, stopped)]
    for name in ("output", "tokens", "answer_tokens", "steps", "rows"):
        assert stages[0][name] == stages[1][name]
    assert not (stopped / "sft" / "checkpoints").exists()


@pytest.fixture
def stopped(monkeypatch):
    """stopped(run, ...): the run is stopped at step 4 as by Ctrl-C; there is a checkpoint of step 2."""

    def stop(self, record):
        write(self, record)
        if record["step"] == 4:
            raise KeyboardInterrupt

    def call(run, folder, *args):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(MetricWriter, "write", stop)
            run(folder, *args)
        assert (folder / "user/checkpoints/2").is_dir()

    write = MetricWriter.write
    return call


@pytest.mark.parametrize(("packing", "sizes"), [(64, (1, 1, 1)), (0, (2, 2, 2))])
def test_a_run_goes_on_packed_or_on_another_mesh(tmp_path, tiny, rows, quick, make_adapter, stopped, packing, sizes):
    config = quick(steps=5, cycles=3, learning_rate=3e-3, checkpoint_every=2, packing=packing)  # step 2 begins a cycle
    one, there = (make_mesh(*each, devices=jax.devices()[: math.prod(each)]) for each in ((1, 1, 1), sizes))
    frozen = {"buffer": make_adapter("buffer")}

    def run(folder, mesh):
        adapter = train_adapter("user", "user", tiny, rows, config, frozen=frozen, workdir=folder, mesh=mesh)
        return adapter.weights, [record["loss"] for record in read_jsonl(folder / "user" / "metrics.jsonl")]

    straight = run(tmp_path / "straight", one)
    stopped(run, tmp_path / "stopped", one)
    # A checkpoint holds no base, and the adapter once and twice a moment: five targets, a and b.
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata((tmp_path / "stopped/user/checkpoints/2/state").absolute()).item_metadata.tree
    shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(saved)}
    assert {name.split("/")[0] for name in shapes} == {"trainable", "opt_state", "step", "key"}
    assert not [name for name in shapes if "kernel" in name or "embed" in name or "/lora/" in name]
    assert sum("lora_trainable" in name for name in shapes) == 30
    ranks = {shape[-1 if name.endswith("/a") else -2] for name, shape in shapes.items() if name[-2:] in ("/a", "/b")}
    assert ranks == {3}, "Buffer's is in it"
    resumed = run(tmp_path / "stopped", there)
    rounding = 0 if there == one else 1e-5  # the same sums in another order
    np.testing.assert_allclose(resumed[1], straight[1], rtol=rounding)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=10 * rounding, rtol=0), resumed[0], straight[0])


def test_a_last_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    writer = MetricWriter(tmp_path, path.name, from_step=1)
    writer.write({"step": 2, "loss": 2.5})
    writer.close()
    assert read_jsonl(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.5}]


def test_closing_waits_for_what_clears_leftovers(tmp_path, monkeypatch):
    """The folder may be gone next."""
    cleared = []

    async def slow(*_, **__):
        await asyncio.sleep(0.3)
        cleared.append(tmp_path)

    monkeypatch.setattr("orbax.checkpoint._src.path.temporary_paths.cleanup_temporary_paths", slow)
    Checkpoints(tmp_path / "checkpoints").close()
    assert cleared
