"""Programs, their sizes and what they move, against XLA's own figures; the TPU's compiler where libtpu is installed."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from br_jax.configs import demo, llama3_8b
from br_jax.core.errors import UserError
from br_jax.core.mesh import abstract, make_mesh
from br_jax.planning import fit as fitting
from br_jax.planning.fit import parse_topology
from br_jax.planning.hlo import Work, count_work
from br_jax.planning.programs import PROGRAMS, TRAINING, make_program
from br_jax.planning.roofline import CHIPS, model_flops, predict
from br_jax.training.step import Stage

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
# A program for a TPU that is not there goes into the cache of compiled programs and cannot be read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry:UserWarning")
SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "fit_check.py"
GIB = 2**30
P = jax.sharding.PartitionSpec


@pytest.fixture
def config(tiny):
    """A tiny model, FSDP over what there is, rows of 128 tokens."""
    config = demo.get_config("smoke")
    with config.unlocked():
        config.model.spec = dataclasses.asdict(tiny.spec)
    config.mesh.update(data=1, fsdp=-1)
    for stage in (config.buffer, config.reinforce, config.user):
        stage.train.update(max_length=128, batch_size=8, loss_chunk=128, rank=8)
    config.eval.batch_size = 8
    return config


def test_argument_bytes_are_what_xla_says_and_a_pools_adapters_do_not_cross_chips(config):
    """What is summed over chips in a turn is less than one user's adapter; in a user's own step it is more."""
    mesh, moved, programs = make_mesh(**config.mesh), {}, {stage: None for stage in PROGRAMS if stage != "sft"}
    for stage in programs:
        program = programs[stage] = make_program(config, stage, mesh)
        compiled, counted = program.lower(mesh).compile(), fitting.argument_bytes(program, mesh)
        expected = compiled.memory_analysis().argument_size_in_bytes
        assert sum(counted.values()) == pytest.approx(expected, abs=64), stage
        own = {"optimizer"} if stage in TRAINING else {"cache"} if stage == "decode" else set()
        assert set(counted) == {"base", "adapters", "batch"} | own, stage
        assert program.attention == "xla"  # of rows this short, and of a step behind a cache
        kinds = count_work(compiled.as_text()).collectives
        moved[stage] = sum(kinds.get(kind, {"bytes": 0})["bytes"] for kind in ("all-reduce", "reduce-scatter"))
    state = programs["pool"].arguments["state"]["trainable"]
    adapter = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 8
    assert moved["pool"] < adapter / 10 < adapter <= moved["user"], (moved, adapter)


def test_a_pass_gathers_each_weight_once_and_a_mask_is_no_part_of_a_product(config):
    """Else FSDP fetches them once more for each product, and a TPU draws dropout's bits inside each that reads them."""
    mesh = make_mesh(**config.mesh)
    config.user.train.update(remat="full", dropout=0.1)
    program = make_program(config, "user", mesh)
    lowered, base = program.lower(mesh), 8 * fitting.argument_bytes(program, mesh)["base"]
    assert count_work(lowered.compile().as_text()).collectives["all-gather"]["bytes"] < 2 * base
    masks = re.findall(r"optimization_barrier .*xi1>", lowered.as_text())
    assert len(masks) == 2 * len(config.user.train.targets)  # drawn again by remat


def test_sizes_of_published_models():
    """Against the params themselves, and against what is published."""
    sizes = {}
    for size in ("1b", "8b", "70b"):
        program = make_program(llama3_8b.get_config(size), "prefill", make_mesh())
        params = jax.tree.leaves(program.arguments["variables"]["params"])
        assert program.decoder.spec.num_params == sum(leaf.size for leaf in params)
        sizes[size] = round(program.decoder.spec.num_params / 1e9, 2)
        assert hash(program.decoder), "jit takes it as a static argument"
    assert sizes == {"1b": 1.24, "8b": 8.03, "70b": 70.55}


def test_model_flops_agree_with_xla(config):
    """Of one layer, for XLA counts a loop's body once; adapters, norms and the softmax are the difference."""
    with config.unlocked():
        config.model.spec.update(num_layers=1, embed_dim=256, ffw_dim=1024, head_dim=64)
    for stage in (config.user, config.reinforce):
        stage.train.update(rank=1)
    mesh = make_mesh(devices=jax.devices()[:1])
    program = make_program(config, "decode", mesh)
    counted = program.lower(mesh).compile().cost_analysis()["flops"]
    assert model_flops(program) == pytest.approx(counted, rel=0.1)


def test_the_slowest_resource_bounds(config):
    program, chip = make_program(config, "user", make_mesh(**config.mesh)), CHIPS["v5e"]
    for name, work in {
        "compute": Work(chip.flops, 1, {}),
        "memory": Work(1, 2 * chip.hbm_rate, {}),
        "links": Work(1, 1, {"all-gather": {"calls": 1, "bytes": 3 * chip.ici_rate}}),
    }.items():
        found = predict(program, work, chip, 8)
        assert found.bound == name and found.seconds == getattr(found, name)
        assert found.mfu == pytest.approx(model_flops(program) / 8 / chip.flops / found.seconds)


def test_products_and_bytes_agree_with_xla_and_loops_count(config):
    """Of one layer against XLA's own count, which counts a loop's body once; three layers do three times as much."""
    work = {}
    for layers in (1, 3):
        with config.unlocked():
            config.model.spec.update(num_layers=layers, embed_dim=256, ffw_dim=1024, head_dim=64)
        program = make_program(config, "prefill", make_mesh(devices=jax.devices()[:1]))
        compiled = program.lower(make_mesh(devices=jax.devices()[:1])).compile()
        work[layers] = count_work(compiled.as_text())
        if layers == 1:
            counted = compiled.cost_analysis()
            assert work[1].flops == pytest.approx(counted["flops"], rel=0.1)  # norms and the softmax are the difference
            assert work[1].memory == pytest.approx(counted["bytes accessed"], rel=0.25)
    spec = program.decoder.spec
    head = 2 * program.batch * spec.embed_dim * spec.vocab_size  # of each prompt's last token
    assert work[3].flops - head == pytest.approx(3 * (work[1].flops - head), rel=1e-3)


def test_a_convolution_counts_what_its_window_meets():
    """As a TPU's compiler writes products: plain, and with a batch axis as a window that is padded all round."""
    line = "ROOT %c = f32[{}] convolution(%a, %b), {}dim_labels={}"
    text = "ENTRY %main (a: f32[{0}], b: f32[{1}]) -> f32[{2}] {{\n"
    text += "  %a = f32[{0}] parameter(0)\n  %b = f32[{1}] parameter(1)\n  {3}\n}}"
    plain = line.format("4,6", "", "bf_io->bf")
    assert count_work(text.format("4,5", "5,6", "4,6", plain)).flops == 2 * 4 * 5 * 6
    batched = line.format("4,8,6", "window={size=8 pad=7_7 rhs_reversal=1}, ", "bf0_0oi->b0f")
    assert count_work(text.format("4,5,1", "8,6,5", "4,8,6", batched)).flops == 2 * 4 * 8 * 5 * 6


@pytest.mark.parametrize(
    ("stage", "rows", "limit", "found"),
    # The user's batch is split in three.
    [("buffer", 8, 1003, 1000), ("buffer", 8, 8, 8), ("user", 24, 80, 72), ("decode", 24, 80, 80)],
)
def test_largest_batch_is_found(config, monkeypatch, stage, rows, limit, found):
    """Against a pretended compiler: memory rises with the rows, not quite in proportion."""
    config.user.train.accumulation = 3
    tried = []

    def pretend(config, topology, stage, batch, slots=0, keep=None):
        tried.append(batch)
        fit = fitting.Fit(stage, topology, {"data": 1, "fsdp": 8, "tensor": 1}, batch, 1, "xla", "full", {}, 16 * GIB)
        fit.temporaries = int(GIB * (2 + 13.5 * (batch / limit) ** 1.1)) if batch <= limit else None
        fit.problem = "too large" * (batch > limit)
        return fit

    monkeypatch.setattr(fitting, "check_fit", pretend)
    assert fitting.largest_batch(config, "v5e:2x4", stage, pretend(config, "v5e:2x4", stage, rows)).batch == found
    assert len(tried) <= 13


def test_a_wrong_topology_and_stage_are_named(config):
    for name in ("v5e", "v5e:2", "v5e:2x0", "v9:2x2", "v5e:2x2x2x2", ""):
        with pytest.raises(UserError, match="write KIND:SHAPE"):
            parse_topology(name)
    with pytest.raises(UserError, match="stage 'usr': near: user"):
        make_program(config, "usr", make_mesh())


def test_users_an_hour(config):
    fit = fitting.Fit("pool", "", {}, 64, 0, "", "", {}, 1, slots=8, calls=100)
    assert fit.users_an_hour is None
    fit.prediction = fitting.Prediction(1.0, 1.0, 1.0, 2.0, 0.5)
    assert fit.users_an_hour == 8 * 3600 / 200
    config.user.update(n=90)
    config.user.train.update(steps=0, epochs=3, batch_size=8, accumulation=2)
    calls = {"user": 36, "pool": 72, "prefill": 0}
    assert {stage: fitting.calls_of_user(config, stage) for stage in calls} == calls


WINDOW = {"window": 100, "windowed": (True, False), "attention_soft_cap": 50.0}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "stage", "changes"),
    [
        *((topology, "user", {}) for topology in ("v5p:2x2x1", "v6e:1x1")),
        *(("v5e:2x2", stage, WINDOW) for stage in ("user", "prefill")),
    ],
)
def test_a_stage_compiles_for_the_tpu(config, topology, stage, changes, tmp_path):
    with config.unlocked():
        config.model.spec.update(changes)
    found = fitting.check_fit(config, topology, stage)
    assert not found.problem and found.attention == "splash" and found.total < found.hbm
    assert np.prod([*found.mesh.values()]) == np.prod(parse_topology(topology)[2])
    assert bool(found.collectives) == (np.prod([*found.mesh.values()]) > 1)
    assert 0 < found.prediction.mfu <= 1
    kept = [fitting.check_fit(config, topology, stage, keep=tmp_path) for _ in range(2)]
    assert [fit.kept for fit in kept] == [False, True] and kept[1].to_json() == kept[0].to_json() | {"kept": True}


@needs_libtpu
def test_what_is_planned_runs_and_trains_is_one_attention(tiny, quick, config):
    """A model on TPUs runs the TPU's kernel, in scoring (which sets no mesh) as in training and in the plan."""
    mesh = make_mesh(devices=fitting.compile_only_devices("v5e:2x2"))
    model = dataclasses.replace(tiny, params=abstract(tiny.params, mesh))
    decoders = model.decoder, Stage.of(model.decoder, quick(), mesh).decoder
    decoders += tuple(make_program(config, stage, mesh).decoder for stage in ("user", "prefill"))
    assert {decoder.attends(128, jnp.float32).implementation for decoder in decoders} == {"splash"}
    assert {decoder.attention.platform for decoder in decoders} == {"tpu"}
    arrays = abstract({name: jnp.zeros((8, 128), jnp.int32) for name in ("tokens", "positions", "segment_ids")}, mesh)
    run = jax.jit(lambda params, rows: model.decoder.apply({"params": params}, **rows)[0])
    assert "tpu_custom_call" in run.lower(model.params, arrays).as_text()
    assert tiny.decoder.attention.platform == "cpu"


@pytest.mark.slow
@needs_libtpu
def test_the_script(tmp_path):
    """It holds no chip of its host, whatever the environment says: here a platform that fails when it is asked for."""

    def run(*flags):
        command = [sys.executable, SCRIPT, "--config=configs/demo.py", *flags]
        environment = os.environ | {"JAX_PLATFORMS": "cuda"}
        return subprocess.run(command, capture_output=True, text=True, cwd=SCRIPT.parents[1], env=environment)

    done = run("--topology=v5e:1x1", "--stage=user,decode", f"--json={tmp_path / 'fit.json'}")
    assert done.returncode == 0, done.stderr
    assert [fit["stage"] for fit in json.loads((tmp_path / "fit.json").read_text())] == ["user", "decode"]
    assert "predicted" in done.stdout
    too_large = run("--topology=v5e:1x1", "--stage=decode", "--config.eval.batch_size=1000000")
    assert too_large.returncode == 1 and "decode does not fit: " in too_large.stdout
    assert "largest part" in too_large.stdout and "try a smaller batch_size" in too_large.stdout


def test_every_kind_is_counted_as_often_as_its_loops_run():
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def everything(layers, x):
        def inner(x, _):
            return jnp.sin(jax.lax.ppermute(x, "fsdp", ring)), None

        def layer(x, w):
            x = jnp.tanh(x * jax.lax.all_gather(w, "fsdp", tiled=True))
            return jax.lax.scan(inner, x, length=3)[0], None

        x = jnp.cos(jax.lax.psum(jax.lax.scan(layer, x, layers)[0], ("data", "fsdp")))
        return jax.lax.all_to_all(jax.lax.psum_scatter(x, "fsdp", tiled=True), "fsdp", 0, 0, tiled=True)

    specs = {"in_specs": (P(None, "fsdp"), P()), "out_specs": P("fsdp")}
    mapped = jax.shard_map(everything, mesh=make_mesh(data=2, fsdp=4), check_vma=False, **specs)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((5, 64), (64,))]
    found = count_work(jax.jit(mapped).lower(*shapes).compile().as_text()).collectives
    array = 64 * 4  # bytes; a chip gets 3 of its 4 parts, on a ring a sum over 8 chips brings 2 * 7/8 of it
    assert found == {
        "all-gather": {"calls": 5, "bytes": 5 * array * 3 // 4},
        "all-reduce": {"calls": 1, "bytes": 2 * array * 7 // 8},
        "all-to-all": {"calls": 1, "bytes": array // 4 * 3 // 4},
        "collective-permute": {"calls": 5 * 3, "bytes": 5 * 3 * array},
        "reduce-scatter": {"calls": 1, "bytes": array * 3 // 4},
    }


def test_forms_of_the_tpu_compiler():
    """What libtpu writes, cut down.

    An all-gather that starts in the entry and overlaps a fusion of the layer loop, under one channel id; a layer loop
    of 32; in it a loop that passes a weight's shards round, two steps at a time.
    """
    assert count_work(pathlib.Path(__file__).with_name("tpu.hlo").read_text()).collectives == {
        "all-gather": {"calls": 1, "bytes": 4096 * 128256 * 2 * 7 // 8},
        "all-gather in pieces": {"calls": 32 * 2, "bytes": 32 * 2 * 512 * 32 * 2},
    }


def test_the_ways_to_write_replica_groups():
    ways = {"{{0,1,2,3},{4,5,6,7}}": 4, "{{0},{1}}": 1, "[4,2]<=[8]": 2, "mesh['a'=4,'b'=2] {'b','a'}": 8}
    for groups, size in ways.items():
        line = f"ROOT %a = f32[{8 * size}] all-gather(%p), replica_groups={groups}"
        found = count_work(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}").collectives
        assert found == ({"all-gather": {"calls": 1, "bytes": 8 * 4 * (size - 1)}} if size > 1 else {})
