"""Compiles a stage for a TPU slice and says whether it fits, what it moves, and what would make it fit."""

import collections
import dataclasses
import math
import re
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from br_jax.core.mesh import leaf_name, make_mesh, shardings
from br_jax.planning.chips import compile_only_devices, parse_topology
from br_jax.planning.collectives import count_collectives
from br_jax.planning.programs import TRAINING, Program, make_program, train_section
from br_jax.planning.roofline import Prediction, predict

_RESERVED = 1 << 28  # of a chip's memory, for the runtime: the compiler calls 15.75 of a v5e's 16 GiB available
# What an argument is, by the first of these that is in its path; else it is of the batch.
_KINDS = {"opt_state": "optimizer", "/params/": "base", "/lora": "adapters", "cache": "cache"}
# What cuts a part that is too large; of any other, fewer rows.
_CURES = {
    "base": "more chips on mesh.fsdp or mesh.tensor, or model.dtype=bfloat16",
    "optimizer": "a smaller rank, or more chips on mesh.fsdp",
    "adapters": "a smaller rank, or more chips on mesh.fsdp",
    "cache": "a smaller eval.batch_size or eval.answer_tokens, or more chips",
}


@dataclasses.dataclass
class Fit:
    """What one stage needs on one slice; bytes are a chip's."""

    stage: str
    topology: str
    mesh: dict[str, int]  # axis -> size
    batch: int  # rows of a call, all chips together
    tokens: int  # of a call on a chip, padding counted
    attention: str
    remat: str
    arguments: dict[str, int]  # bytes of what a call is given, by kind
    hbm: int
    compile_seconds: float = 0.0  # on this host
    temporaries: int | None = None  # bytes while it runs; None where the compiler gave up
    output: int = 0  # bytes of results that take over no argument's buffer
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # see `count_collectives`
    prediction: Prediction | None = None  # None when it does not fit
    problem: str = ""  # why it does not fit, and what would help
    slots: int = 0  # users of a pool
    calls: int = 0  # that a user takes part in, with as many rows as the config says

    @property
    def users_an_hour(self) -> float | None:
        """Whose training a slice can do at the predicted time; None where that is not known, or no user is trained."""
        if self.prediction is None or not self.calls:
            return None
        return 3600 * max(self.slots, 1) / (self.calls * self.prediction.seconds)

    @property
    def chips(self) -> int:
        """Of the slice."""
        return math.prod(self.mesh.values())

    @property
    def total(self) -> int | None:
        """Bytes in use at the peak."""
        return None if self.temporaries is None else sum(self.arguments.values()) + self.temporaries + self.output

    def to_json(self) -> dict:
        """As plain JSON types, with what follows from the fields."""
        follows = {"chips": self.chips, "total": self.total, "users_an_hour": self.users_an_hour}
        return dataclasses.asdict(self) | follows | {"fits": not self.problem}


def check(config: ConfigDict, topology: str, stage: str, batch: int = 0, slots: int = 8) -> Fit:
    """Compiles a stage (see `make_program`) for a slice such as "v5e:2x4", on whose chips `config.mesh` is laid.

    Raises:
        UserError: bad settings, no such slice, no TPU compiler.
    """
    chip = parse_topology(topology)[0]
    mesh = make_mesh(**config.mesh, devices=compile_only_devices(topology))
    program = make_program(config, stage, mesh, batch, slots)
    fit = Fit(
        stage=stage,
        topology=topology,
        mesh=dict(mesh.shape),
        batch=program.batch,
        tokens=program.tokens // mesh.size,
        attention=program.attention,
        remat=program.decoder.remat,
        arguments=argument_bytes(program, mesh),
        hbm=chip.hbm_bytes,
        slots=slots if stage == "pool" else 0,
        calls=_calls_of_user(config, stage) if stage in ("user", "sft", "pool") else 0,
    )
    start = time.perf_counter()
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"\(([\d.]+)G\)", str(error))
        fit.problem = _advice(fit, int(float(used[1]) * 2**30) if used else 0)
        return fit
    finally:
        fit.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    fit.temporaries = memory.temp_size_in_bytes
    fit.output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    fit.collectives = count_collectives(compiled.as_text())
    if fit.total > fit.hbm - _RESERVED:
        fit.problem = _advice(fit, fit.temporaries)
    else:
        received = sum(kind["bytes"] for kind in fit.collectives.values())
        fit.prediction = predict(program, chip, mesh.size, received, mesh.shape["tensor"])
    return fit


def _calls_of_user(config: ConfigDict, stage: str) -> int:
    """Optimizer steps; a pool's micro-batches are turns of their own."""
    train = config.user.train
    steps = train.steps or -(-config.user.n // train.batch_size) * train.epochs
    return steps * (train.accumulation if stage == "pool" else 1)


def largest_batch(config: ConfigDict, topology: str, stage: str, first: Fit) -> Fit:
    """The check of a stage at the largest batch that fits, rows rising with the chips that share them.

    Temporaries grow nearly in proportion to the rows, so each compilation tells where to try next. `first` is a check
    of that stage that fits.
    """
    micro_batches = train_section(config, stage).accumulation if stage in TRAINING else 1
    unit = first.slots or first.mesh["data"] * first.mesh["fsdp"] * micro_batches  # slots are a multiple of the parts
    best, worst = first, None  # the largest known to fit, the rows of the smallest known not to
    guess = 2 * first.batch
    for _ in range(12):
        guess = max(guess // unit * unit, best.batch + unit)
        if worst is not None and guess >= worst:
            guess = (best.batch + worst) // 2 // unit * unit
        if guess <= best.batch:
            break
        fit = check(config, topology, stage, guess, first.slots)
        if fit.problem:
            worst = guess
            guess = (best.batch + worst) // 2
            continue
        slope = (fit.total - best.total) / (fit.batch - best.batch)
        best = fit
        guess = best.batch + int((best.hbm - _RESERVED - best.total) / max(slope, 1))
    return best


def argument_bytes(program: Program, mesh: Mesh) -> dict[str, int]:
    """Bytes of a chip's part of each kind of argument."""
    kinds = collections.Counter()
    places = shardings(program.arguments, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(program.arguments)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(places), strict=True):
        kind = next((kind for part, kind in _KINDS.items() if part in leaf_name(path)), "batch")
        kinds[kind] += math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return dict(kinds)


def _advice(fit: Fit, temporaries: int) -> str:
    """Which part is too large, and the settings that cut it."""
    rows = "a smaller batch_size"
    if fit.stage in TRAINING:
        rows = "remat=full" if fit.remat != "full" else f"{rows} (or accumulation), max_length or loss_chunk"
    parts = {**fit.arguments, "temporaries": temporaries}
    part = max(parts, key=parts.get)
    sizes = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
    return f"{part} is the largest part ({sizes} GiB of {fit.hbm / 2**30:.0f}): try {_CURES.get(part, rows)}"
