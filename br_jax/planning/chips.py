"""Chips: the one table of their published peaks, and TPU devices to compile for without having any."""

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from br_jax.core.errors import UserError


class Chip(NamedTuple):
    """Published peaks of one chip."""

    flops: float  # bf16, a second
    hbm_bytes: int
    hbm_rate: float  # bytes a second between memory and cores
    ici_rate: float  # bytes a second that reach the chip over all its links to other chips (as many may leave it)


# docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "System architecture", read in November 2026. Links between chips
# are published in Gbit/s: 2400, 1600, 4800, 3584.
CHIPS = {
    "v4": Chip(275e12, 32 << 30, 1228e9, 300e9),
    "v5e": Chip(197e12, 16 << 30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 << 30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 << 30, 1640e9, 448e9),
}

# Dense bf16 FLOP a second by JAX's name of a device; of GPUs from NVIDIA's data sheets.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# What libtpu would otherwise ask a metadata server for, which is not there, and its lock: no chip is held.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def parse_topology(topology: str) -> tuple[Chip, str, tuple[int, ...]]:
    """(chip, its name, chips along each axis) of a name such as "v5e:2x4" or "v5p:4x4x4"."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise UserError(
            f"topology {topology!r}: write KIND:SHAPE with KIND one of {', '.join(CHIPS)}, as v5e:2x4 or v5p:4x4x4"
        )
    return CHIPS[kind], kind, tuple(int(n) for n in shape.split("x"))


def compile_only_devices(topology: str) -> Sequence[jax.Device]:
    """Devices of a TPU slice, one a chip, that programs can be compiled for but not run on.

    Raises:
        UserError: no such slice, or libtpu is not installed.
    """
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
