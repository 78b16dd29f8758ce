"""Sweeps on a Ray cluster: a provider's folder, or a user's run, is a task, which goes on elsewhere when its node dies.

Every node sees the sweep's folder, or has one of its own and a bucket between them. Tasks run in the folder that the
sweep was called from, where a node has it.
"""

import os
import pathlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from br_jax.core import cli
from br_jax.core.bounds import Bound, require
from br_jax.core.errors import UserError, explain, one_line
from br_jax.core.io import owned, parse_json, write_bytes
from br_jax.core.progress import announce, progress
from br_jax.experiment.grid import CellFile, Engine, Planned, read_run, run_cells
from br_jax.experiment.methods import Cell
from br_jax.experiment.run import Experiment
from br_jax.experiment.settings import Settings

_RETRIES = 5  # of a task whose worker or node died; it goes on from its last checkpoint
_PASSED = ("JAX_", "XLA_", "HF_", "LIBTPU_", "PYTHONPATH")  # beginnings of variables that tasks have of the caller


def on_ray(address: str, resources: Mapping[str, float], bucket: str = "") -> Engine:
    """An engine of tasks on a Ray cluster. A run begins when its provider's folder is there.

    Args:
        address: of the cluster, or "auto"; "local" starts one on this machine for as long as the sweep runs.
        resources: of a task, as a node offers them: {"CPU": 2}, {"TPU-v5e-8-head": 1}.
        bucket: where nodes that share no file system leave what they make and find what others made.

    Raises:
        UserError: no Ray, no such cluster, or one none of whose nodes has the resources. What stops a run is told when
            the others have ended.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine=ray: Ray is not installed: pip install 'br_jax[ray]'") from error

    def engine(planned: Sequence[Planned], table: pathlib.Path) -> Iterator[CellFile]:
        left = [run for run in planned if any(cell.record is None for cell in run[2].values())]
        for known in (run[2] for run in planned if run not in left):
            yield from known.values()
        if not left:
            return
        passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
        local = {"num_cpus": os.cpu_count()} if address == "local" else {}
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": passed}, **local)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--address={address}: {one_line(error)}: start a cluster with `ray start --head`"
            ) from error
        try:
            _require(resources, ray.nodes())
            yield from work(left, table)
        finally:
            ray.shutdown()

    def work(left: Sequence[Planned], table: pathlib.Path) -> Iterator[CellFile]:
        rest = {name: value for name, value in resources.items() if name not in ("CPU", "GPU")}
        options = {"num_cpus": resources.get("CPU", 1), "num_gpus": resources.get("GPU", 0), "resources": rest}
        options |= {"max_retries": _RETRIES, "max_calls": 1 if set(resources) - {"CPU"} else 0}  # or it keeps its chips
        provide, run = map(ray.remote(**options), (_provide, _run))
        place = os.getcwd(), table, bucket
        providers, runs, errors = {}, {}, []
        for settings, folder, known in left:
            if settings.provider not in providers:
                providers[settings.provider] = provide.remote(settings, folder, *place)
            # An attacker who trains plainly waits for the run whose training it takes.
            plain = (ref for ref, (_, other) in runs.items() if str(other) == settings.user.folder)
            task = run.remote(settings, folder, [*known], *place, providers[settings.provider], *plain)
            runs[task] = len(known), folder
        waiting = dict(runs)
        with progress(sum(count for count, _ in runs.values()), "sweep", "cell") as bar:
            while waiting:
                (done,), _ = ray.wait([*waiting], num_returns=1)
                count, folder = waiting.pop(done)
                try:
                    made = ray.get(done)
                    _pull(bucket, table, folder)
                    yield from made
                except ray.exceptions.RayTaskError as error:
                    cause = error
                    while isinstance(cause, ray.exceptions.RayTaskError):  # a provider's reaches its runs wrapped
                        cause = cause.cause
                    errors.append(cause if explain(cause) else error)
                    announce(f"{folder}: {one_line(cause)}")
                except ray.exceptions.RayError as error:
                    errors.append(UserError(f"{folder}: given up after {_RETRIES} retries: {one_line(error)}"))
                bar.update(count)
        if errors:
            raise errors[0]

    return engine


def parse_resources(text: str) -> dict[str, float]:
    """What a task takes of a node, {"CPU": 2}, from JSON; a `UserError` for anything else."""
    found = parse_json(text, "--resources", 'write {"CPU": 2}')
    if not isinstance(found, dict) or not found:
        raise UserError(f'--resources={text}: write {{"CPU": 2}}, and whatever else a task needs of its node')
    for name, wanted in found.items():
        require(f"--resources: {name}", wanted, Bound(0.0, 1e6))
    return found


def _require(resources: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raises a `UserError` where a task would wait for ever."""
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(offer.get(name, 0) >= wanted for name, wanted in resources.items()) for offer in offers):
        known = sorted({name for offer in offers for name in offer if ":" not in name})
        raise UserError(f"--resources={dict(resources)}: no node has all that: they have some of {', '.join(known)}")


# -- tasks, each in a process of its own -------------------------------------------------------------------------------


def _provide(settings: Settings, folder: pathlib.Path, home: str, table: pathlib.Path, bucket: str) -> None:
    """Makes a provider's folder."""
    _begin(home)
    provider = pathlib.Path(settings.provider)
    _pull(bucket, table, provider)
    with owned(folder, wait=True):
        Experiment(settings, folder).begin().prepare()
    _push(bucket, table, provider)


def _run(
    settings: Settings, folder: pathlib.Path, cells: Sequence[Cell], home: str, table: pathlib.Path, bucket: str, *_
) -> list[CellFile]:
    """Trains and scores a user's run; `_` are the tasks that it needs, which have ended."""
    _begin(home)
    folders = {pathlib.Path(settings.provider), pathlib.Path(settings.user.folder or folder), folder}
    for each in folders:
        _pull(bucket, table, each)
    made = list(run_cells(settings, folder, read_run(settings, folder, cells), table=table))
    for each in folders:
        _push(bucket, table, each)
    return made


def _begin(home: str) -> None:
    if os.path.isdir(home):
        os.chdir(home)
    cli.set_up()


def _in_bucket(bucket: str, table: pathlib.Path, folder: pathlib.Path) -> epath.Path | None:
    """Where a bucket keeps a folder of a table; None without one, and for a folder elsewhere, which every node has."""
    return epath.Path(bucket) / folder.relative_to(table) if bucket and folder.is_relative_to(table) else None


def _pull(bucket: str, table: pathlib.Path, folder: pathlib.Path) -> None:
    """Brings what a bucket has of a table's folder, and this machine has not."""
    far = _in_bucket(bucket, table, folder)
    for inner, _, names in far.walk() if far and far.exists() else ():
        near = folder / inner.relative_to(far)
        near.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (near / name).exists():
                write_bytes(near / name, (inner / name).read_bytes())


def _push(bucket: str, table: pathlib.Path, folder: pathlib.Path) -> None:
    """Leaves what is new or longer in a bucket; not the checkpoints of a stage."""
    far = _in_bucket(bucket, table, folder)
    for file in folder.rglob("*") if far else ():
        there = far / file.relative_to(folder)
        if not file.is_file() or "checkpoints" in file.parts or file.name.endswith(".lock"):
            continue
        if not there.exists() or there.stat().length < file.stat().st_size:
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(file.read_bytes())
