"""The checks of a slice as a table to read."""

from collections.abc import Sequence

from tabulate import tabulate

from br_jax.planning.fit import Fit

_GIB = 2**30
_HEADER = ["stage", "rows", "tokens\na chip", "args\nGiB", "temps\nGiB", "output\nGiB", "total\nGiB", "fits"]
_HEADER += ["attention", "compile\ns", "step *\nms", "MFU *\n%", "users *\nan hour"]


def render(fits: Sequence[Fit]) -> str:
    """Memory and predicted time, then the collectives, then what does not fit."""
    first = fits[0]
    mesh = ", ".join(f"{axis} {size}" for axis, size in first.mesh.items())
    moved = [
        [fit.stage, kind, sums["calls"], f"{sums['bytes'] / 1e6:,.1f}"]
        for fit in fits
        for kind, sums in fit.collectives.items()
    ]
    lines = [
        f"{first.topology}: {first.chips} chip(s) of {first.hbm / _GIB:.0f} GiB, mesh {mesh}\n",
        _table([_row(fit) for fit in fits], _HEADER, left=1),
        "\n* predicted by a roofline from published peaks (docs/pods.md), not measured\n",
    ]
    if moved:
        lines.append(_table(moved, ["stage", "collective", "calls\na call", "MB\nto a chip"], left=2))
    lines += [f"\n{fit.stage} does not fit: {fit.problem}" for fit in fits if fit.problem]
    return "\n".join(lines)


def _table(rows: list[list], header: list[str], left: int) -> str:
    align = ["left"] * left + ["right"] * (len(header) - left)
    return tabulate(rows, header, colalign=align, disable_numparse=True)


def _row(fit: Fit) -> list:
    sizes = (sum(fit.arguments.values()), fit.temporaries, fit.output, fit.total)
    memory = ["?" if size is None else f"{size / _GIB:.2f}" for size in sizes]
    time = ["-", "-", "-"]
    if fit.prediction:
        users = fit.users_an_hour
        time = [
            f"{1e3 * fit.prediction.seconds:,.1f}",
            f"{100 * fit.prediction.mfu:.0f}",
            f"{users:,.0f}" if users else "-",
        ]
    fits = "NO" if fit.problem else "yes"
    name = f"{fit.stage} of {fit.slots}" if fit.slots else fit.stage
    return [name, fit.batch, f"{fit.tokens:,}", *memory, fits, fit.attention, f"{fit.compile_seconds:.0f}", *time]
