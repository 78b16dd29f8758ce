"""One process of several: python hosts_run.py WORKDIR PROCESS/PROCESSES PORT DEVICES ACT...

It does the acts one after another. An act is KIND:FOLDER:MESH[:SIGNAL:P:STEP], its folder one of WORKDIR's, its mesh
data,fsdp,tensor. Kinds: "train" (a small user stage; with SIGNAL, "term" or "kill", process P gets that signal after
that step, and all of them then take their time), "evaluate" (a model on the mesh is scored, with an adapter and
without), "sweep" (the provider's stages of a tiny model from scratch, and its aligned base scored for two users) and
"rows" (each process checks its rows of a batch on odd meshes).
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from stopped_run import make_parts

import br_jax as br
from br_jax.adapters import lora
from br_jax.configs import demo
from br_jax.core import hosts as distributed
from br_jax.core.cli import run_main
from br_jax.core.mesh import local_rows, make_mesh, shard
from br_jax.core.store import Store
from br_jax.data.rows import Row
from br_jax.datasets.paper import Attack
from br_jax.experiment.grid import Grid, run_sweep
from br_jax.report.report import write_report
from br_jax.scoring.judges.texts import KeywordJudge
from br_jax.scoring.rules import LabelRule
from br_jax.scoring.suite import Suite, evaluate
from br_jax.training.loop import on_mesh

STEPS = 20


def forbid_writing(workdir: str) -> None:
    """Makes any file that this process writes an error, but for its part of a checkpoint."""

    def look(event, args):
        opened = event == "open" and isinstance(args[1], str) and not set("wax+").isdisjoint(args[1])
        if opened or event == "os.rename":
            path = os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else ""
            if path.startswith(workdir) and "/checkpoints/" not in path:
                raise AssertionError(f"{path} written by process {jax.process_index()}")

    sys.addaudithook(look)


def signal_after(number: signal.Signals, process: int, step: int) -> None:
    """Arms the question that the loop asks after every step."""
    asked, steps = distributed.StopSignal.asked, iter(range(1, STEPS + 1))

    def ask(self):
        at = next(steps)
        if at == step and jax.process_index() == process:
            os.kill(os.getpid(), number)
        if at >= step:
            time.sleep(0.3 if at < step + 8 else 30)  # JAX looks for the signal once a second; later on a busy machine
        return asked(self)

    distributed.StopSignal.asked = ask


def check_rows() -> None:
    """Batches of 16 rows on meshes whose devices lie in every order: each device has the rows of its place."""
    rng = np.random.default_rng(0)
    orders = [np.arange(8), np.arange(8).reshape(2, 4).T.ravel(), *(rng.permutation(8) for _ in range(3))]
    whole = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    shares = set()
    for order in orders:
        for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)):
            devices = [jax.devices()[i] for i in order]
            mesh = jax.sharding.Mesh(np.array(devices).reshape(sizes), ("data", "fsdp", "tensor"))
            rows = local_rows(mesh, 16)
            shares.add(len(rows))
            array = on_mesh({"tokens": whole[rows]}, mesh)["tokens"]
            for part in array.addressable_shards:
                np.testing.assert_array_equal(part.data, whole[part.index])
    assert shares >= {8, 16}, "no mesh made the processes share rows"


def score(workdir: str, mesh) -> None:
    """Leaves the scores of both models, their answers, verdicts and records."""
    model, _ = make_parts()
    model = dataclasses.replace(model, params=shard(model.params, mesh))
    rows = [Row((("user", f"{i}?"), ("assistant", f"it is {i}"))) for i in range(5)]
    suite = Suite(
        judges=(KeywordJudge(),),
        attacks=[Attack(f"say {i}" + "!" * i, "GCG", "b", None) for i in range(4)],
        benign=["a", "what is it?", "count to 3"],
        task_rows=rows,
        rule=LabelRule(("yes", "no")),
        health=rows,
        refusing=(73, 83),
        answer_tokens=8,
        batch_size=8,
    )
    files = {"store": "answers", "verdicts": "verdicts", "forced": "forced"}
    stores = {name: Store(f"{workdir}/{file}.jsonl") for name, file in files.items()}
    scores = [
        evaluate(model, suite, one, name=name, records=f"{workdir}/{name}.jsonl", **stores)
        for name, one in (("base", None), ("adapted", buffer_of(model)))
    ]
    if distributed.is_main():
        pathlib.Path(workdir, "scores.json").write_text(json.dumps(scores))


def sweep(workdir: str, mesh) -> None:
    """Leaves the folder of a sweep; each process checks what it is told of it."""
    config = demo.get_config("smoke")
    with config.model.spec.unlocked():
        config.model.spec.update(embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffw_dim=64)
    for stage in (config.pretrain, config.align, config.buffer, config.reinforce):
        stage.train.update(steps=1, rank=2, batch_size=8)
    config.mesh.update(dict(mesh.shape))
    axes = {"models": [""], "tasks": ["moods"], "topics": ["devices"], "n": [16], "seeds": [1], "a": [0.1]}
    for cell in run_sweep(config, workdir, Grid(**axes, p=[0.0, 0.5], methods=["aligned"])):
        assert bool(cell["scores"]) == distributed.is_main()
    if distributed.is_main():
        write_report(workdir)


def buffer_of(model) -> br.Adapter:
    """A Buffer that changes what the model says."""
    buffer = lora.init(jax.random.key(7), lora.target_shapes(model.params), 2, 4.0, "buffer", model.fingerprint)
    for pair in buffer.weights.values():
        pair["b"] += jnp.float32(0.05)
    return buffer


def train(workdir: str, mesh) -> None:
    """A user stage beside Buffer."""
    model, rows = make_parts()
    config = br.TrainConfig(rank=2, learning_rate=3e-3, steps=STEPS, max_length=24, checkpoint_every=4, log_every=1)
    run = {"workdir": workdir, "mesh": mesh, "probes": {"task": rows[:8]}}
    adapter = br.train_user(model, rows, config, buffer=buffer_of(model), **run)
    assert all(pair["b"].any() for pair in adapter.weights.values())


def act(workdir: str, kind: str, folder: str, sizes: str, *death: str) -> None:
    folder, mesh = f"{workdir}/{folder}", make_mesh(*map(int, sizes.split(",")))
    if death:
        signal_after({"term": signal.SIGTERM, "kill": signal.SIGKILL}[death[0]], *map(int, death[1:]))
    {"train": train, "evaluate": score, "sweep": sweep, "rows": lambda *_: check_rows()}[kind](folder, mesh)
    print(kind, end=" ")


def main(workdir: str, acts: list[str]) -> None:
    if not distributed.is_main():
        forbid_writing(workdir)
    for each in acts:
        act(workdir, *each.split(":"))


if __name__ == "__main__":
    workdir, which, port, devices, *acts = sys.argv[1:]
    process, processes = map(int, which.split("/"))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    run_main(
        lambda: main(workdir, acts),
        lambda: distributed.join(f"127.0.0.1:{port}", processes, process, heartbeat=100),
    )
