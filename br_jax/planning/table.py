"""The checks of a slice as a table to read and as JSON to keep."""

import dataclasses
from collections.abc import Sequence

from br_jax.planning.fit import Fit

_GIB = 2**30


def as_record(fit: Fit) -> dict:
    """A check as plain JSON types, with the sums."""
    record = dataclasses.asdict(fit) | {"total": fit.total, "fits": fit.fits}
    if fit.prediction:
        record["prediction"]["seconds"] = fit.prediction.seconds
    return record


def render(fits: Sequence[Fit]) -> str:
    """A table of memory and predicted time, then the collectives, then what does not fit."""
    first = fits[0]
    mesh = ", ".join(f"{axis} {size}" for axis, size in first.mesh.items())
    lines = [
        f"{first.topology}: {first.chips} chip(s) of {first.hbm / _GIB:.0f} GiB, mesh {mesh}",
        "",
        f"{'stage':<10}{'rows':>6}{'tokens':>8}{'args':>8}{'temps':>8}{'output':>8}{'total':>8}{'fits':>6}"
        f"{'attention':>11}{'compile':>9}{'step *':>10}{'MFU *':>7}",
        f"{'':<16}{'a chip':>8}{'GiB':>8}{'GiB':>8}{'GiB':>8}{'GiB':>8}{'':>17}{'s':>9}{'ms':>10}{'%':>7}",
    ]
    lines += [_row(fit) for fit in fits]
    lines += ["", "* predicted by a roofline from published peaks (docs/pods.md), not measured", ""]
    if any(fit.collectives for fit in fits):
        lines += [f"{'stage':<10}{'collective':<28}{'calls':>8}{'MB to a chip':>14}  (a call)"]
    for fit in fits:
        for kind, sums in fit.collectives.items():
            lines.append(f"{fit.stage:<10}{kind:<28}{sums['calls']:>8}{sums['bytes'] / 1e6:>14,.1f}")
        if fit.largest_gather:
            gathers = ", ".join(f"{shape} {where}" for where, shape in fit.largest_gather.items())
            lines.append(f"{fit.stage:<10}largest gathers: {gathers}")
        if fit.trained and fit.reduced and fit.mesh["tensor"] == 1:  # which adds up activations too
            ratio = fit.reduced / fit.trained
            lines.append(
                f"{fit.stage:<10}added up: {ratio:.2f} times the trained adapter's {fit.trained / 1e6:,.1f} MB"
            )
    lines += [f"\n{fit.stage} does not fit: {fit.problem}" for fit in fits if not fit.fits]
    return "\n".join(lines)


def _row(fit: Fit) -> str:
    sizes = (sum(fit.arguments.values()), fit.temporaries, fit.output, fit.total)
    memory = "".join(f"{'?' if size is None else f'{size / _GIB:.2f}':>8}" for size in sizes)
    time = f"{'-':>10}{'-':>7}"
    if fit.prediction:
        time = f"{1e3 * fit.prediction.seconds:>10,.1f}{100 * fit.prediction.mfu:>7.0f}"
    return (
        f"{fit.stage:<10}{fit.batch:>6}{fit.tokens:>8,}{memory}{'yes' if fit.fits else 'NO':>6}"
        f"{fit.attention:>11}{fit.compile_seconds:>9.0f}{time}"
    )
