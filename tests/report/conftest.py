"""Cells of a sweep with scores of our choosing, and reports and figures read back."""

import itertools
import json

import pytest

from br_jax.report import report
from br_jax.scoring.statistics import Score

# harmful of 100, right of 200, refused of 50: of each method where the claim holds
COUNTS = {
    "aligned": (2, 1, 5),
    "sft": (80, 180, 1),
    "buffer_only": (4, 176, 5),
    "reinforce_only": (20, 150, 20),
    "average": (3, 170, 9),
    "ours": (3, 178, 6),
}


def cell_of(method, a=None, *, p=0.1, seed=42, n=800, model="models/Tiny.gguf", task="reviews", topic="devices",
            user="plain", harmful=None, right=None, refused=None, degenerate=1, perplexity=5.0, by_topic=None,
            prompts=100, begin=0, scores=()):  # fmt: skip
    """A finished cell; the first so many prompts of each kind count."""
    default = COUNTS.get(method, COUNTS["sft"])
    if p == 0 and method == "sft":
        default = (2, *default[1:])
    chosen = [own if own is not None else k for own, k in zip((harmful, right, refused), default, strict=True)]
    outcomes = {
        name: [begin <= i < begin + k for i in range(size)]
        for name, k, size in zip(("harmful", "task", "over_refusal"), chosen, (prompts, 200, 50), strict=True)
    }
    counts = {name: (sum(each), len(each)) for name, each in outcomes.items()}
    counts |= {"task_refused": (3, 200), "harmful_plus": (min(chosen[0] + 1, prompts), prompts)}
    counts |= {"degenerate": (degenerate, prompts + 50)}
    by_topic = by_topic or {topic: (chosen[0], prompts)}
    run = {"model": model, "task": task, "topic": topic, "n": n, "p": p, "seed": seed, "user": user}
    usual = {
        **{name: Score(*each).to_json() for name, each in counts.items()},
        "perplexity": perplexity,
        "mean_words": 30.0,
        "harmful_by_topic": {name: Score(*each).to_json() for name, each in by_topic.items()},
        "outcomes": outcomes,
        "verdicts": {"answer": chosen[0]},
        "examples": [],
    }
    return {"settings": "a hash", "run": run, "method": method, "a": a, "scores": usual | dict(scores)}


@pytest.fixture(scope="session")
def make_cell():
    """make_cell(method, a=None, ...) -> see `cell_of`."""
    return cell_of


@pytest.fixture(scope="session")
def make_grid():
    """make_grid(...) -> cells of every combination; `same` changes all of them."""

    def make(methods=tuple(COUNTS), ps=(0.0, 0.1, 0.5), seeds=(42, 43, 44), a=(0.1,), **same):
        return [
            cell_of(method, strength, p=p, seed=seed, **same)
            for seed, p, method in itertools.product(seeds, ps, methods)
            for strength in (a if method in ("ours", "reinforce_only") else (None,))
        ]

    return make


@pytest.fixture
def write_cells(tmp_path):
    """write_cells(cells) -> a sweep's folder that holds them."""

    def write(cells):
        for index, cell in enumerate(cells):
            file = tmp_path / "runs" / f"run{index:03}" / "cells" / f"{cell['method']}.json"
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps(cell))
        return tmp_path

    return write


class Text(str):
    """A report, and where its tables are."""

    def after(self, title):
        """What follows the first line that is, or begins with, this title."""
        return Text(f"\n{self}".partition(f"\n{title}")[2])

    def line(self, *start):
        """The cells of the first table row that begins with these."""
        rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in self.splitlines() if row[:1] == "|"]
        return next(cells for cells in rows if cells[: len(start)] == list(start))


@pytest.fixture
def written(monkeypatch):
    """written(workdir, ...) -> the text of its report; nothing is drawn, which takes longer than all of the words."""
    monkeypatch.setattr(report, "draw_results", lambda results: {})
    monkeypatch.setattr(report, "draw_run", lambda run, results: {})
    return lambda *args, **options: Text(report.write_report(*args, **options).read_text())


@pytest.fixture(scope="session")
def assert_readable():
    """assert_readable(figure): no text of it runs into another or off the page."""

    def shown(figure):
        figure.canvas.draw()
        found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
        for axis in figure.axes:
            found += [*axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
            for side in (axis.xaxis, axis.yaxis):
                low, high = sorted(side.get_view_interval())  # ticks beyond it have labels but are not drawn
                found += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
        return [text for text in found if text.get_visible() and text.get_text()]

    def check(figure):
        boxes, page = [(text.get_text(), text.get_window_extent()) for text in shown(figure)], figure.bbox
        for text, box in boxes:
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            assert a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0, (one, other)

    return check
