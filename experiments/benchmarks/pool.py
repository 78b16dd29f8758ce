"""Many small jobs: a pool, one after another in a warm process, a process a job, and PEFT with a process a job."""

import dataclasses

import numpy as np

from benchmarks.inputs import HERE, Setup, require_torch
from benchmarks.pairing import Contender, call
from benchmarks.report import Case
from br_jax.adapters.lora import Adapter
from br_jax.adapters.peft import save_adapter
from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh
from br_jax.data.rows import Row
from br_jax.provider import load_model
from br_jax.training.config import TrainConfig
from br_jax.training.jobs import Job
from br_jax.training.pool import Pool
from br_jax.training.run import first_adapter, train_adapter

_JOBS, _SLOTS, _ROWS, _WARM = 16, 8, 50, 4  # jobs of a pool's unit, its slots, rows of a job, jobs of a warm unit


def cases(setup: Setup) -> list[Case]:
    """At 8 rows a user a step, and at 1."""
    require_torch("pool")
    rows = setup.read(_JOBS * _ROWS)
    jobs = [rows[i * _ROWS : (i + 1) * _ROWS] for i in range(_JOBS)]
    return [_case(setup, jobs, batch_size) for batch_size in (8, 1)]


def _case(setup: Setup, jobs: list[list[Row]], batch_size: int) -> Case:
    settings = {"max_length": 128, "packing": 128 * batch_size, "epochs": 1, "checkpoint_every": 0, "remat": "matmuls"}
    config = dataclasses.replace(setup.train, batch_size=batch_size, **settings)
    ours = {"model": setup.model, "config": config}
    folder = setup.folder / f"pool{batch_size}"
    contenders = [
        Contender("pool", HERE / "pool.py", "pooled", {**ours, "jobs": jobs, "slots": _SLOTS}),
        Contender("one by one, warm", HERE / "pool.py", "one_by_one", {**ours, "jobs": jobs[:_WARM]}),
        Contender("a process a job", HERE / "pool.py", "a_process", {**ours, "job": jobs[0]}),
        Contender("PEFT, a process a job", HERE / "pool.py", "peft", {**ours, "job": jobs[0], "folder": folder,
                                                                       "threads": setup.threads}),
    ]  # fmt: skip
    return Case(
        f"pool, {batch_size} rows a step",
        f"{_JOBS} jobs of {_ROWS} rows of at most {config.max_length} tokens, {batch_size} a step, r {config.rank}, "
        f"{setup.model['source']}, products in {setup.model['matmul_precision']}; {_SLOTS} slots; a process a job "
        "starts, loads, compiles (or reads compiled programs back) and trains",
        contenders,
        "job",
        _alike,
    )


def _alike(outcomes: dict[str, list[float]]) -> list[str]:
    """Says how far the first job's adapters are apart, by the norm of their B.

    Raises:
        UserError: by more than a hundredth: not the same work.
    """
    norms = {name: found[0] for name, found in outcomes.items()}
    told = ", ".join(f"{name} {norm:.6f}" for name, norm in norms.items())
    if np.ptp(list(norms.values())) > 1e-2 * max(norms.values()):
        raise UserError(f"benchmark: the first job's adapters differ: not the same work: {told}")
    return [f"norm of B of the first job's adapter: {told}"]


def _norm(adapter: Adapter) -> float:
    return float(np.sqrt(sum(np.sum(np.square(pair["b"], dtype=np.float64)) for pair in adapter.weights.values())))


def pooled(model: dict, config: TrainConfig, jobs: list[list[Row]], slots: int):
    """A contender's work: all jobs through one pool."""
    base = load_model(**model)

    def unit(index: int):
        pool = Pool(base, config, slots=slots, mesh=make_mesh())
        named = [Job(f"job{i}", rows) for i, rows in enumerate(jobs)]
        made = {outcome.name: outcome.adapter for gone in pool.train(named) for outcome in gone}
        return len(made), _norm(made["job0"])

    return unit


def one_by_one(model: dict, config: TrainConfig, jobs: list[list[Row]]):
    """A contender's work: each job by itself, in one process."""
    base = load_model(**model)

    def unit(index: int):
        made = [train_adapter("user", "user", base, rows, config, mesh=make_mesh()) for rows in jobs]
        return len(made), _norm(made[0])

    return unit


def first(model: dict, config: TrainConfig, folder):
    """Writes the adapter that a job begins with."""

    def unit(index: int):
        base = load_model(**model)
        adapter = first_adapter("user", "user", base, config)
        return 1, save_adapter(folder, adapter, base_name=base.name, fingerprint=base.fingerprint)

    return unit


def a_process(model: dict, config: TrainConfig, job: list[Row]):
    """A contender's work: a process that does one job."""
    return lambda index: (1, call(HERE / "pool.py", "one_by_one", model=model, config=config, jobs=[job]))


def peft(model: dict, config: TrainConfig, job: list[Row], folder, threads: int):
    """A contender's work: a process of PEFT's that does one job."""
    exported = call(HERE / "inputs.py", "export", model=model, rows=job, prompts=[], config=config, folder=folder)
    call(HERE / "pool.py", "first", model=model, config=config, folder=exported["adapter"])
    names = ("dropout", "learning_rate", "warmup_ratio", "weight_decay", "clip_norm", "max_length")
    given = {
        "model": exported["model"],
        "adapter": exported["adapter"],
        "steps": exported["steps"],
        "config": {name: getattr(config, name) for name in names},
        "threads": threads,
        "dtype": model["dtype"],
        "precision": model["matmul_precision"],
    }
    return lambda index: (1, call(HERE / "torch_training.py", "job", **given))
