"""Markdown documents, from the templates beside this file: their pieces, and how one is written with its figures."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from tabulate import tabulate

from br_jax.core.io import write_bytes
from br_jax.report import plots
from br_jax.scoring.statistics import Estimate, is_finite

FIGURES = "figures"  # their folder, beside the document
CUT = 200  # characters of a foreign text that are printed


def write_document(path: Path, template: str, values: Mapping[str, Any], figures: Mapping[str, Figure]) -> Path:
    """Writes a document and its figures, as .png and .pdf; an error leaves the old document, and no file half."""
    text = _TEMPLATES.get_template(template).render(values).rstrip() + "\n"
    drawn = {path.parent / FIGURES / name: plots.encode(figure) for name, figure in figures.items()}
    files = {f"{stem}.{kind}": content for stem, each in drawn.items() for kind, content in each.items()}
    for file, content in (files | {path: text.encode()}).items():
        write_bytes(file, content, durable=False)
    return path


def table(lines: Sequence[Mapping[str, str] | Sequence[str]], header: Sequence[str] | str = "keys") -> str:
    """A table of cells that are Markdown already; the header is that of lines which are no mappings."""
    return tabulate(lines, header, tablefmt="github", disable_numparse=True)


def literal(text: str) -> str:
    """Makes untrusted text inert in a Markdown cell: one cut, printable line as code, without cell bars."""
    cut = text if len(text) <= CUT else text[: CUT - 1] + "…"
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(cut.split()))
    line = line.replace("|", "¦")
    fence = _fence(line, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`" if line else "(empty)"


def _fence(text: str, least: int) -> str:
    """One longer than any run of backticks inside, which the text itself cannot close."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def number(value: Any, form: str, scale: float = 1) -> str:
    """`scale` times a number by a format, or "n/a" for what is none or not finite."""
    return format(scale * value, form) if is_finite(value) else "n/a"


def interval(found: Estimate | None, form: str = "+.1f") -> str:
    """A share or difference in percent with its interval; "n/a" for None."""
    return (
        "n/a"
        if found is None
        else "{:{form}} ({:{form}} to {:{form}})".format(100 * found.mean, 100 * found.low, 100 * found.high, form=form)
    )


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=False,  # Markdown; foreign text goes through `literal`
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_TEMPLATES.filters |= {
    "code": lambda text, language: "{0}{1}\n{2}\n{0}".format(_fence(text, 3), language, text),
    "image": lambda name, words: f"![{words}]({FIGURES}/{name}.png)",
    "literal": literal,
    "number": number,
    "points": lambda share: f"{100 * share:g}",
    "quoted": lambda text: "\n".join(f"> {line}  " for line in text.splitlines() if line),
    "table": table,
}
