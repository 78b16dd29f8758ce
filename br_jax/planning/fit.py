"""Compiles a stage for a TPU slice that need not be there: whether it fits, what it moves, what would help."""

import collections
import dataclasses
import importlib.metadata
import math
import os
import pathlib
import re
import time
from collections.abc import Sequence

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tabulate import tabulate

import br_jax.planning
from br_jax.core.errors import UserError
from br_jax.core.io import read_json, write_json
from br_jax.core.mesh import leaf_name, make_mesh, shardings
from br_jax.core.records import key_of
from br_jax.experiment.protocol import code
from br_jax.models.io.load import read_spec
from br_jax.planning.hlo import count_work
from br_jax.planning.programs import TRAINING, Program, make_program, train_section
from br_jax.planning.roofline import CHIPS, Chip, Prediction, predict

_GIB = 1 << 30
_RESERVED = _GIB // 4  # of a chip's memory, for the runtime: the compiler calls 15.75 of a v5e's 16 GiB available
# What an argument is, by the first of these that is in its path; else it is of the batch.
_KINDS = {"opt_state": "optimizer", "/params/": "base", "/lora": "adapters", "cache": "cache"}
# What cuts a part that is too large; of any other, fewer rows.
_CURES = {
    "base": "more chips on mesh.fsdp or mesh.tensor, or model.dtype=bfloat16",
    "optimizer": "a smaller rank, or more chips on mesh.fsdp",
    "adapters": "a smaller rank, or more chips on mesh.fsdp",
    "cache": "a smaller eval.batch_size or eval.answer_tokens, or more chips",
}
# What libtpu would otherwise ask a metadata server for, which is not there, and its lock: no chip is held.
_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
_ALONE |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_HEADER = ["stage", "rows", "tokens\na chip", "args\nGiB", "temps\nGiB", "output\nGiB", "total\nGiB", "fits"]
_HEADER += ["attention", "compile\ns", "step *\nms", "bound\nby", "MFU *\n%", "tokens *\na second", "users *\nan hour"]


def parse_topology(topology: str) -> tuple[Chip, str, tuple[int, ...]]:
    """(chip, its name, chips along each axis) of a name such as "v5e:2x4" or "v5p:4x4x4"."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        known = ", ".join(CHIPS)
        raise UserError(f"topology {topology!r}: write KIND:SHAPE with KIND one of {known}, as v5e:2x4 or v5p:4x4x4")
    return CHIPS[kind], kind, tuple(int(n) for n in shape.split("x"))


def compile_only_devices(topology: str) -> Sequence[jax.Device]:
    """Devices of a TPU slice, one a chip, that programs can be compiled for but not run on, if libtpu is installed."""
    _, kind, shape = parse_topology(topology)
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # its two cores as one device, as a program on a v4 sees them
    os.environ.update(_ALONE | os.environ)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except (RuntimeError, ValueError) as error:
        if "not installed" in str(error):
            raise UserError("the TPU's compiler is missing: pip install 'br_jax[tpu]' (package libtpu)") from error
        raise UserError(f"topology {topology!r}: {str(error).splitlines()[0]}") from error


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
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # see `hlo.Work`
    prediction: Prediction | None = None  # None when it does not fit
    problem: str = ""  # why it does not fit, and what would help
    slots: int = 0  # users of a pool
    calls: int = 0  # that a user takes part in, with as many rows as the config says
    kept: bool = False  # an answer of before

    @property
    def users_an_hour(self) -> float | None:
        """Whose training a slice can do at the predicted time; None where that is not known, or no user is trained."""
        known = self.prediction is not None and self.calls
        return 3600 * max(self.slots, 1) / (self.calls * self.prediction.seconds) if known else None

    @property
    def total(self) -> int | None:
        """Bytes in use at the peak."""
        return None if self.temporaries is None else sum(self.arguments.values()) + self.temporaries + self.output

    def to_json(self) -> dict:
        """As plain JSON types, with what follows from the fields."""
        follows = {"chips": math.prod(self.mesh.values()), "total": self.total, "users_an_hour": self.users_an_hour}
        return dataclasses.asdict(self) | follows | {"fits": not self.problem}

    @classmethod
    def from_json(cls, content: dict) -> "Fit":
        """Of what `to_json` gave, as one that was kept."""
        known = {field.name: content[field.name] for field in dataclasses.fields(cls)} | {"kept": True}
        return cls(**known | {"prediction": content["prediction"] and Prediction(**content["prediction"])})


def check_fit(
    config: ConfigDict, topology: str, stage: str, batch: int = 0, slots: int = 8, keep: pathlib.Path | None = None
) -> Fit:
    """Compiles a stage (see `make_program`) for a slice such as "v5e:2x4", on whose chips `config.mesh` is laid.

    `keep` is a folder of answers: one to the same question, of the same code, compiler and flags, is read back.
    """
    if keep is None:
        return _compile(config, topology, stage, batch, slots)
    spec = config.model.spec or dataclasses.asdict(read_spec(config.model.source))
    compiler = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    compiler += [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")]
    sources = sorted(pathlib.Path(br_jax.planning.__file__).parent.glob("*.py"))
    question = [config.to_dict(), dict(spec), topology, stage, batch, slots]
    file = keep / f"{key_of(question, compiler, code(), [one.read_text() for one in sources])}.json"
    if file.is_file():
        return Fit.from_json(read_json(file, "delete it: it will be made again"))
    fit = _compile(config, topology, stage, batch, slots)
    keep.mkdir(parents=True, exist_ok=True)
    write_json(file, fit.to_json())
    return fit


def _compile(config: ConfigDict, topology: str, stage: str, batch: int, slots: int) -> Fit:
    chip, *_ = parse_topology(topology)
    mesh = make_mesh(**config.mesh, devices=compile_only_devices(topology))
    program = make_program(config, stage, mesh, batch, slots)
    size = {"batch": program.batch, "tokens": program.tokens // mesh.size, "hbm": chip.hbm_bytes}
    size |= {"slots": slots if stage == "pool" else 0, "calls": calls_of_user(config, stage)}
    how = {"attention": program.attention, "remat": program.decoder.remat}
    fit = Fit(stage, topology, dict(mesh.shape), arguments=argument_bytes(program, mesh), **size, **how)
    start = time.perf_counter()
    try:
        compiled = program.lower(mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"\(([\d.]+)G\)", str(error))
        fit.problem = _advice(fit, int(float(used[1]) * _GIB) if used else 0)
        return fit
    finally:
        fit.compile_seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    fit.temporaries = memory.temp_size_in_bytes
    fit.output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    work = count_work(compiled.as_text())
    fit.collectives = work.collectives
    if fit.total > fit.hbm - _RESERVED:
        fit.problem = _advice(fit, fit.temporaries)
    else:
        fit.prediction = predict(program, work, chip, mesh.size)
    return fit


def calls_of_user(config: ConfigDict, stage: str) -> int:
    """Optimizer steps of a user's training; a pool's micro-batches are steps of their own. 0 for any other stage."""
    train = config.user.train
    steps = train.steps or -(-config.user.n // train.batch_size) * train.epochs
    return steps * {"user": 1, "sft": 1, "pool": train.accumulation}.get(stage, 0)


def largest_batch(config: ConfigDict, topology: str, stage: str, first: Fit, keep: pathlib.Path | None = None) -> Fit:
    """The check of a stage at the largest batch that fits, from a first that does; rows rise with the chips.

    Temporaries grow nearly in proportion to the rows, so each compilation tells where to try next.
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
        fit = check_fit(config, topology, stage, guess, first.slots, keep)
        if fit.problem:
            worst = guess
            guess = (best.batch + worst) // 2
        else:
            slope, best = (fit.total - best.total) / (fit.batch - best.batch), fit
            guess = best.batch + int((best.hbm - _RESERVED - best.total) / max(slope, 1))
    return best


def argument_bytes(program: Program, mesh: Mesh) -> dict[str, int]:
    """Bytes of a chip's part of each kind of argument."""
    kinds = collections.Counter()
    leaves = jax.tree_util.tree_leaves_with_path(program.arguments)
    for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings(program.arguments, mesh)), strict=True):
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
    sizes = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in parts.items() if size)
    return f"{part} is the largest part ({sizes} GiB of {fit.hbm / _GIB:.0f}): try {_CURES.get(part, rows)}"


def render(fits: Sequence[Fit]) -> str:
    """A table of memory and predicted time, then the collectives, then what does not fit."""

    def table(rows: list[list], header: list[str], left: int) -> str:
        align = ["left"] * left + ["right"] * (len(header) - left)
        return tabulate(rows, header, colalign=align, disable_numparse=True)

    first, rows, moved = fits[0], [], []
    for fit in fits:
        sizes = (sum(fit.arguments.values()), fit.temporaries, fit.output, fit.total)
        rows.append([f"{fit.stage} of {fit.slots}" if fit.slots else fit.stage, fit.batch, f"{fit.tokens:,}"])
        rows[-1] += ["?" if size is None else f"{size / _GIB:.2f}" for size in sizes]
        rows[-1] += ["NO" if fit.problem else "yes", fit.attention]
        rows[-1] += ["kept" if fit.kept else f"{fit.compile_seconds:.0f}"]
        if found := fit.prediction:
            rows[-1] += [f"{1e3 * found.seconds:,.1f}", found.bound, f"{100 * found.mfu:.0f}"]
            rows[-1] += [f"{fit.tokens * math.prod(fit.mesh.values()) / found.seconds:,.0f}"]
        rows[-1] += ["-"] * (len(_HEADER) - 1 - len(rows[-1])) + [f"{fit.users_an_hour or 0:,.0f}"]
        for kind, sums in fit.collectives.items():
            moved.append([fit.stage, kind, sums["calls"], f"{sums['bytes'] / 1e6:,.1f}"])
    mesh = ", ".join(f"{axis} {size}" for axis, size in first.mesh.items())
    lines = [f"{first.topology}: {math.prod(first.mesh.values())} chip(s) of {first.hbm / _GIB:.0f} GiB, mesh {mesh}\n"]
    lines += [table(rows, _HEADER, left=1)]
    lines += ["\n* predicted by a roofline from published peaks (docs/pods.md), not measured\n"]
    lines += [table(moved, ["stage", "collective", "calls\na call", "MB\nto a chip"], left=2)] if moved else []
    return "\n".join([*lines, *(f"\n{fit.stage} does not fit: {fit.problem}" for fit in fits if fit.problem)])
