"""Markdown documents: their pieces, and how one is written together with its figures."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from br_jax import plots
from br_jax.files import writing
from br_jax.statistics import is_finite

CUT = 200  # characters of a foreign text that are printed


def write_document(path: Path, text: str, folder: str, drawn: Mapping[str, Figure]) -> Path:
    """Writes a document and its figures; a full disk leaves the old ones and not half of the new.

    Args:
        path: of the document.
        text: its Markdown, which links to figures as FOLDER/NAME.png.
        folder: of the figures, beside the document; made if absent.
        drawn: figures by name, each written as .png and .pdf.

    Returns:
        The path.

    Raises:
        UserError: when it cannot be written.
    """
    near = {"dir": path.parent, "prefix": f".{path.stem}-"}
    with writing(path, "make room or give access"), tempfile.TemporaryDirectory(**near) as new:
        (Path(new) / path.name).write_text(text, encoding="utf-8")
        files = [file for name, figure in drawn.items() for file in plots.save(figure, Path(new) / name)]
        (path.parent / folder).mkdir(exist_ok=True)
        for file in files:
            file.replace(path.parent / folder / file.name)
        return (Path(new) / path.name).replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def code(text: str, language: str) -> str:
    """A block of code that the text itself cannot close."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def literal(text: str) -> str:
    """Makes untrusted text inert in a Markdown cell: one cut, printable line as code, without cell bars."""
    cut = text if len(text) <= CUT else text[: CUT - 1] + "…"
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(cut.split()))
    line = line.replace("|", "¦")
    fence = _fence(line, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`" if line else "(empty)"


def points(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A difference of shares in points with its sign, and its interval where there is one; else "n/a"."""
    return with_interval(value, low, high, "+.1f", 100)


def with_interval(value: float | None, low: float | None, high: float | None, form: str, scale: float = 1) -> str:
    """`scale` times a number by a format, and its interval where there is one; else "n/a"."""
    if not is_finite(value):
        return "n/a"
    interval = f" ({scale * low:{form}} to {scale * high:{form}})" if is_finite(low) and is_finite(high) else ""
    return f"{scale * value:{form}}{interval}"


def number(value: Any, form: str) -> str:
    """A number by a format, or "n/a" for what is none or not finite."""
    return format(value, form) if is_finite(value) else "n/a"


def _fence(text: str, least: int) -> str:
    # One longer than any run of backticks inside cannot be closed by the text itself.
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
