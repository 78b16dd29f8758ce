"""Compiles a stage for a TPU slice and says whether it fits, what it moves, and what would make it fit."""

import dataclasses
import math
import re
import time

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax.planning.chips import compile_only_devices, parse_topology
from br_jax.planning.collectives import Collective, by_kind, find_collectives
from br_jax.planning.programs import TRAINING, Program, make_program, train_section
from br_jax.planning.roofline import Prediction, predict
from br_jax.sharding import leaf_name, make_mesh, shardings

_RESERVED = 1 << 28  # of a chip's memory, for the runtime: the compiler calls 15.75 of a v5e's 16 GiB available


@dataclasses.dataclass(frozen=True)
class Fit:
    """What one stage needs on one slice; bytes are a chip's.

    Attributes:
        stage, topology, chips: what was compiled for what.
        mesh: axis -> size.
        batch: rows of a call, all chips together.
        tokens: of a call on a chip, padding counted.
        attention: implementation in use.
        remat: of a training step.
        arguments: bytes of what a call is given, by kind.
        hbm: the chip's memory.
        trained: bytes of the whole trained adapter, which is what its gradients weigh; 0 for generation.
        compile_seconds: on this host.
        temporaries: bytes while it runs; None where the compiler gave up.
        output: bytes of results that take over no argument's buffer.
        collectives: kind -> {"calls", "bytes"} in a call.
        largest_gather: shape of the largest all-gather of each layer, and of the largest that is made once.
        reduced: bytes that reach a chip to be added up (all-reduce, reduce-scatter).
        prediction: the roofline's; None when it does not fit.
        problem: why it does not fit, and what would help; "" when it fits.
    """

    stage: str
    topology: str
    chips: int
    mesh: dict[str, int]
    batch: int
    tokens: int
    attention: str
    remat: str
    arguments: dict[str, int]
    hbm: int
    trained: int
    compile_seconds: float = 0.0
    temporaries: int | None = None
    output: int = 0
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    largest_gather: dict[str, str] = dataclasses.field(default_factory=dict)
    reduced: int = 0
    prediction: Prediction | None = None
    problem: str = ""

    @property
    def total(self) -> int | None:
        """Bytes in use at the peak."""
        return None if self.temporaries is None else sum(self.arguments.values()) + self.temporaries + self.output

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return not self.problem


def check(config: ConfigDict, topology: str, stage: str, batch: int = 0) -> Fit:
    """Compiles one stage of a config for a slice.

    Args:
        config: see configs/base.py; `config.mesh` is laid on the slice's chips.
        topology: such as "v5e:2x4".
        stage: one of `planning.programs.STAGES`.
        batch: rows of a call instead of the config's.

    Raises:
        UserError: bad settings, no such slice, no TPU compiler.
    """
    chip = parse_topology(topology)[0]
    mesh = make_mesh(**config.mesh, devices=compile_only_devices(topology))
    program = make_program(config, stage, mesh, batch)
    chips = mesh.devices.size
    fit = Fit(
        stage=stage,
        topology=topology,
        chips=chips,
        mesh=dict(mesh.shape),
        batch=program.batch,
        tokens=program.tokens // chips,
        attention=program.attention,
        remat=program.remat,
        arguments=_argument_bytes(program, mesh),
        hbm=chip.hbm_bytes,
        trained=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_trainable(program))),
    )
    start = time.perf_counter()
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"\(([\d.]+)G\)", str(error))
        problem = _advice(fit, program, int(float(used[1]) * 2**30) if used else None)
        return dataclasses.replace(fit, compile_seconds=time.perf_counter() - start, problem=problem)
    seconds = time.perf_counter() - start
    memory, collectives = compiled.memory_analysis(), find_collectives(compiled.as_text())
    fit = dataclasses.replace(
        fit,
        temporaries=memory.temp_size_in_bytes,
        output=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        compile_seconds=seconds,
        collectives=by_kind(collectives),
        largest_gather=_largest_gathers(collectives),
        reduced=sum(c.times * c.received for c in collectives if "reduce" in c.kind),
    )
    if fit.total > fit.hbm - _RESERVED:
        return dataclasses.replace(fit, problem=_advice(fit, program, fit.temporaries))
    received = sum(kind["bytes"] for kind in fit.collectives.values())
    return dataclasses.replace(fit, prediction=predict(program, chip, chips, received, mesh.shape["tensor"]))


def largest_batch(config: ConfigDict, topology: str, stage: str, first: Fit) -> Fit:
    """The largest batch of a stage that fits, rows rising with the chips that share them.

    Temporaries grow nearly in proportion to the rows, so each compilation tells where to try next.

    Args:
        config, topology, stage: as in `check`.
        first: a check of that stage that fits.

    Returns:
        The check at the largest batch.
    """
    micro_batches = train_section(config, stage).accumulation if stage in TRAINING else 1
    unit = first.mesh["data"] * first.mesh["fsdp"] * micro_batches
    best, worst = first, None  # the largest known to fit, the smallest known not to
    guess = 2 * first.batch
    for _ in range(12):
        guess = max(guess // unit * unit, best.batch + unit)
        if worst is not None and guess >= worst:
            guess = (best.batch + worst) // 2 // unit * unit
        if guess <= best.batch:
            break
        fit = check(config, topology, stage, guess)
        if not fit.fits:
            worst = guess
            guess = (best.batch + worst) // 2
            continue
        slope = (fit.total - best.total) / (fit.batch - best.batch)
        best = fit
        guess = best.batch + int((best.hbm - _RESERVED - best.total) / max(slope, 1))
    return best


def _trainable(program: Program) -> dict:
    return program.arguments["state"]["trainable"] if program.trains else {}


def _argument_bytes(program: Program, mesh: Mesh) -> dict[str, int]:
    """Bytes of a chip's part of each kind of argument."""
    kinds: dict[str, int] = {}
    places = shardings(program.arguments, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(program.arguments)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
        kind = _kind(leaf_name(path))
        size = math.prod(place.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        kinds[kind] = kinds.get(kind, 0) + size
    return kinds


def _kind(name: str) -> str:
    if "opt_state" in name:
        return "optimizer"
    if "/params/" in name:
        return "base"
    if "/lora" in name:
        return "adapters"
    return "cache" if name.startswith("cache") else "batch"


def _largest_gathers(collectives: list[Collective]) -> dict[str, str]:
    largest = {}
    for where, inside in (("a layer", True), ("once", False)):
        found = [c for c in collectives if c.kind.startswith("all-gather") and (c.times > 1) == inside]
        if found:
            largest[where] = max(found, key=lambda c: c.received).shape
    return largest


def _advice(fit: Fit, program: Program, temporaries: int | None) -> str:
    """Which part is too large, and the settings that cut it."""
    parts = {**fit.arguments, "temporaries": temporaries or 0}
    part = max(parts, key=parts.get)
    advice = {
        "base": "more chips on mesh.fsdp or mesh.tensor, or model.dtype=bfloat16",
        "optimizer": "a smaller rank, or more chips on mesh.fsdp",
        "adapters": "a smaller rank, or more chips on mesh.fsdp",
        "cache": "a smaller eval.batch_size or eval.answer_tokens, or more chips",
        "batch": "a smaller batch_size",
        "temporaries": "a smaller batch_size"
        if not program.trains
        else "remat=full"
        if program.remat != "full"
        else "a smaller batch_size (or accumulation), max_length or loss_chunk",
    }[part]
    sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
    return f"{part} is the largest part ({sizes} GiB of {fit.hbm / 2**30:.0f}): try {advice}"
