"""Golden outputs: answers, counts, losses, files and a plan are what they were when they were recorded.

python tests/golden/test_golden.py [NAME ...] records all, or some of `MAKERS`, anew, after a change that is meant.

Each is made in a process of its own, on one device, through the public API, the scripts and files. The folders are
adapters of br_jax/tiny in PEFT's layout, of numpy's random integers over 64: every CPU's sums of so few bits are exact.
"""

import gzip
import hashlib
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest

HERE, ROOT = pathlib.Path(__file__).parent, pathlib.Path(__file__).parents[2]
ENV = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
QUICK_COMPILES = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
STAGES = "--stages=pretrain,distill,align,buffer,reinforce,sft,user,release,evaluate"  # all but the report
DEFENCES = ("--method=safe_grad,ldifs,lisa", "--config.model.source=br_jax/tiny", "--config.user.train.steps=5")
SETTINGS = [f"--config.defences.{it}" for it in ("lisa.aligning=2", "lisa.fitting=2", "ldifs.rho=1.0")]
PLAN = ("--config=configs/demo.py:scratch", "--topology=v5e:2x2", "--stage=user,pool,decode", "--slots=4")
MESH = ("--config.model.spec.vocab_size=264", *(f"--config.mesh.{axis}" for axis in ("fsdp=2", "tensor=2")))


# Files of runs, cells and plans; nothing below knows more of them.
def read(file):
    lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads("".join(lines))


def read_losses(workdir):
    runs = {file.parent.name: read(file) for file in workdir.rglob("metrics.jsonl")}
    names = ("loss", "grad_norm", "learning_rate")
    return {run: {name: [line[name] for line in lines] for name in names} for run, lines in runs.items()}


def read_cell(file):
    scores, lines = read(file)["scores"], read(file.with_suffix(".jsonl"))
    names = ("harmful", "harmful_plus", "task", "over_refusal", "task_refused", "degenerate")
    answers = [" | ".join(line[key] for key in ("set", "prompt", "answer", "verdict")) for line in lines]
    counts = {name: [scores[name]["k"], scores[name]["n"]] for name in names}
    return {"counts": counts, "perplexity": scores["perplexity"], "answers": answers}


def read_plan(file):
    """Without the time that it took; what XLA has a say in becomes a float, for which there is a tolerance."""
    fits = read(file)
    for fit in fits:
        del fit["compile_seconds"]
        fit |= {name: float(fit[name]) for name in ("temporaries", "total")}
        fit["collectives"] = {kind: {k: float(v) for k, v in told.items()} for kind, told in fit["collectives"].items()}
    return fits


def run(script, *flags):
    return subprocess.run([sys.executable, f"experiments/{script}.py", *flags], cwd=ROOT, check=False).returncode


def experiment(folder, script, size, *flags):
    status = run(script, f"--config=configs/demo.py:{size}", f"--workdir={folder}", *flags)
    cells = {file.stem: read_cell(file) for file in folder.rglob("cells/*.json")}
    return {"status": status, "cells": cells, "losses": read_losses(folder)}


def export(folder):
    import br_jax as br

    model = br.load_model("br_jax/tiny")
    user, reinforce = (br.load_adapter(HERE / role, model, role) for role in ("user", "reinforce"))
    br.save_adapter(folder / "saved", user, model)
    br.export_model(model, user, folder / "whole")
    merged = br.release(model, user, reinforce, br.MergeConfig(0.3, 0.65))
    added = [merged.scale * np.asarray(pair["a"]) @ np.asarray(pair["b"]) for pair in merged.weights.values()]
    hashes = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob("*/*")}
    return {"sha256": hashes, "released": [np.linalg.norm(delta, axis=(1, 2)).tolist() for delta in added]}


def training(folder):
    import br_jax as br

    rows = [{"prompt": f"Say {i}{' again' * (i % 3)}.", "response": "yes " * (i * 3 % 7) + str(i)} for i in range(20)]
    train = {"rank": 4, "alpha": 8.0, "learning_rate": 4e-3, "steps": 6, "batch_size": 4, "max_length": 80}
    other = {"loss_mean": "rows", "cycles": 2, "accumulation": 2, "packing": 160, "dropout": 0.0}
    model, config, own = br.load_model("br_jax/tiny"), br.TrainConfig(**train), {"rank": 2, "alpha": 3.0, "seed": 1}
    buffer = br.train_buffer(model, rows[:12], config, workdir=folder / "alone")
    br.train_user(model, rows, br.TrainConfig(**train | other), buffer=buffer, workdir=folder / "alone")
    jobs = [br.Job("short", rows[:5]), br.Job("long", rows[5:19], own), br.Job("late", rows[18:], {"steps": 3})]
    list(br.train_users(model, jobs, config, buffer=buffer, slots=2, workdir=folder))
    return {name: read_losses(folder / name) for name in ("alone", "short", "long", "late")}


def plan(folder):
    run("fit_check", *PLAN, *MESH, f"--json={folder / 'plan.json'}")
    return read_plan(folder / "plan.json")


# How each is made, and by what share its floats may differ: sums in another order (one core, AVX2, other XLA flags)
# move losses by up to 6e-7 in a few steps and by 4e-5 in the 225 of short, and no answer; a plan's are its compiler's.
MAKERS = {
    "export": (export, 1e-4),
    "training": (training, 1e-4),
    "plan": (plan, 0.01),
    "smoke": (lambda folder: experiment(folder, "pipeline", "smoke", STAGES), 1e-4),
    "defences": (lambda folder: experiment(folder, "sweep", "smoke", *DEFENCES, *SETTINGS), 1e-4),
    "short": (lambda folder: experiment(folder, "pipeline", "short", STAGES), 0.01),
}
SLOW = ("plan", "defences", "short")


def main(names, into):
    os.environ.update(ENV)
    sys.path.insert(0, str(ROOT))
    for name in names or MAKERS:
        os.environ["XLA_FLAGS"] = "" if name == "short" else QUICK_COMPILES  # the others compute little
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(MAKERS[name][0](pathlib.Path(folder)), indent=1, sort_keys=True)
        (into / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def differences(found, was, rtol, place=""):
    if isinstance(found, list) and isinstance(was, list):
        found, was = dict(enumerate(found)), dict(enumerate(was))
    if isinstance(found, dict) and isinstance(was, dict):
        for key in found | was:
            yield from differences(found.get(key, "missing"), was.get(key, "missing"), rtol, f"{place}/{key}")
    elif found != was and not (type(found) is type(was) is float and math.isclose(found, was, rel_tol=rtol)):
        yield f"{place}: {found!r}, was {was!r}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MAKERS])
def test_golden(name, tmp_path):
    configs = pathlib.Path(importlib.import_module("br_jax.configs").__path__[0])
    assert configs.samefile(ROOT / "configs"), f"{configs}: another checkout's; in this one, ln -s ../configs br_jax/"
    if name == "plan":
        pytest.importorskip("libtpu")
    subprocess.run([sys.executable, __file__, name], env=os.environ | {"GOLDEN_INTO": str(tmp_path)}, check=True)
    found, was = (json.loads(gzip.decompress((at / f"{name}.json.gz").read_bytes())) for at in (tmp_path, HERE))
    assert not (told := [*differences(found, was, MAKERS[name][1])]), "\n".join([f"{len(told)} differ", *told[:40]])


if __name__ == "__main__":
    main(sys.argv[1:], pathlib.Path(os.environ.get("GOLDEN_INTO", HERE)))
