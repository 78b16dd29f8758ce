"""From records to ratios, tables and JSON."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence

from tabulate import tabulate

from benchmarks.pairing import Contender, Record, race
from br_jax.experiment.protocol import processor

# Dense bf16 FLOP a second by JAX's name of a device; of GPUs from NVIDIA's data sheets.
PEAK_FLOPS = {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
PEAK_FLOPS |= {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12}


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        name: of the case.
        how: what is compared: model, dtype, batch, length, threads.
        contenders: the first is the one that the others are compared with.
        unit: what an amount of work is counted in.
        check: takes every contender's outcomes and says, in lines, whether they did the same work.
        flops: floating-point operations of an amount of 1; 0 where nobody asks.
        device: its kind, as JAX calls it; with a known peak, MFU is told.
    """

    name: str
    how: str
    contenders: Sequence[Contender]
    unit: str
    check: Callable[[Mapping[str, list]], list[str]] = lambda outcomes: []
    flops: int = 0
    device: str = ""


def describe_machine() -> str:
    """Processor, cores and versions."""
    versions = []
    for name in ("jax", "torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}"


def run_case(case: Case, rounds: int) -> dict:
    """Runs a case, prints its table, and returns its figures, ready for JSON."""
    print(f"\n{case.name}: {case.how}", flush=True)
    records = race(case.contenders, rounds, case.name)
    lines = case.check({name: record.outcomes for name, record in records.items()})
    contenders = summarize(records)
    if case.flops:
        lines.append(_throughput(case, contenders))
    result = {"how": case.how, "unit": case.unit, "rounds": rounds, "checks": lines, "contenders": contenders}
    print_table(result)
    return result


def _throughput(case: Case, contenders: Mapping[str, dict]) -> str:
    """Model FLOP/s, and the share of the device's peak that they are (MFU)."""
    told = []
    for name, line in contenders.items():
        speed = line["per_second"] * case.flops
        line["tflops"] = speed / 1e12
        share = f" (MFU {speed / PEAK_FLOPS[case.device]:.1%})" if case.device in PEAK_FLOPS else ""
        told.append(f"{name} {speed / 1e12:.3f}{share}")
    return f"model TFLOP/s at {case.flops / 1e9:.3f} GFLOP a {case.unit}: {', '.join(told)}"


def summarize(records: Mapping[str, Record]) -> dict[str, dict]:
    """Figures of each contender; ratios are the first one's to its own, in the same round where there are rounds.

    Returns:
        For each name: medians ("seconds", "busy" CPU-seconds, "per_second"), "all_seconds"; "speedup" of the first over
        it as {"median", "least", "most"}; GB ("loaded", "peak", "work" = peak - loaded) and the first's peak in its own
        ("peak_ratio"); "first" in seconds, "compiles" and "recompiles".
    """
    rates = {
        name: [amount / seconds for amount, seconds in zip(record.amounts, record.seconds, strict=True)]
        for name, record in records.items()
    }
    base = next(iter(records))
    results = {}
    for name, record in records.items():
        ratios = [ours / its for ours, its in zip(rates[base], rates[name], strict=True)]
        results[name] = {
            "seconds": statistics.median(record.seconds),
            "busy": statistics.median(record.busy),
            "per_second": statistics.median(rates[name]),
            "all_seconds": record.seconds,
            "speedup": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
            "loaded": record.loaded,
            "peak": record.peak,
            "work": record.peak - record.loaded,
            "peak_ratio": records[base].peak / record.peak,
            "first": record.first,
            "compiles": record.compiles,
            "recompiles": record.recompiles,
        }
    return results


def print_table(result: dict) -> None:
    """The figures of `run_case` as a table: speed-ups and memory of the first line against every other."""
    header = ["", "s", "CPU s", f"{result['unit']}/s", "first is faster", "(least to most)", "GB: peak", "loaded"]
    header += ["work", "first's peak", "s to first", "compiles"]
    rows = []
    for name, line in result["contenders"].items():
        speedup = line["speedup"]
        again = f"+{line['recompiles']}" if line["recompiles"] else ""
        rows.append(
            [name, f"{line['seconds']:.3f}", f"{line['busy']:.3f}", f"{line['per_second']:,.1f}"]
            + [f"{speedup['median']:.3f}x", f"({speedup['least']:.3f} to {speedup['most']:.3f})"]
            + [f"{line[key]:.2f}" for key in ("peak", "loaded", "work")]
            + [f"{line['peak_ratio']:.2f}x", f"{line['first']:.1f}", f"{line['compiles']}{again}"]
        )
    align = ["left"] + ["right"] * (len(header) - 1)
    print(tabulate(rows, header, tablefmt="plain", colalign=align, disable_numparse=True))
    for line in result["checks"]:
        print(f"  {line}")
