"""Cells of a sweep with scores of our choosing, and reports and figures read back."""

import itertools
import json

import pytest

from br_jax.report import report

# harmful of 200, right of 400, refused of 200: of each method where the claim holds
COUNTS = {
    "aligned": (4, 2, 10),
    "sft": (160, 360, 2),
    "buffer_only": (8, 352, 10),
    "reinforce_only": (40, 300, 80),
    "average": (6, 340, 18),
    "ours": (5, 358, 11),
}


def cell_of(method, a=None, *, p=0.1, seed=42, n=800, model="models/Tiny.gguf", task="reviews", topic="devices",
            user="plain", repeat=1, harmful=None, right=None, refused=None, degenerate=2, perplexity=5.0, prompts=200,
            begin=0, outcomes=(), scores=()):  # fmt: skip
    """A finished cell; the first so many prompts of each kind count, of HS those from `begin` on; none are alike."""
    default = COUNTS.get(method, COUNTS["sft"])
    if p == 0 and method == "sft":
        default = (4, *default[1:])
    harmful, right, refused = (
        k if own is None else own for own, k in zip((harmful, right, refused), default, strict=True)
    )

    def first(k, size, begin=0):
        return [begin <= i < begin + k for i in range(size)]

    outcomes = {
        "harmful": first(harmful, prompts, begin),
        "harmful_plus": first(harmful + 1, prompts, begin),
        "task": first(right, 400),
        "task_refused": first(3, 400),
        "over_refusal": first(refused, 200),
        "degenerate": first(degenerate, prompts + 200),
    } | dict(outcomes)
    counts = {name: {"k": sum(each), "n": len(each)} for name, each in outcomes.items()}
    usual = {name: x | {"score": x["k"] / x["n"] if x["n"] else None} for name, x in counts.items()} | {
        "perplexity": perplexity,
        "mean_words": 30.0,
        "harmful_by_topic": {topic: {"k": harmful, "n": prompts, "score": harmful / max(prompts, 1)}},
        "outcomes": outcomes,
        "groups": {
            "topic": [f"{topic}: {'ask' if i % 2 else 'code'}/{i}" for i in range(prompts)],
            "ordinary": [f"kind {i}" for i in range(200)],
            "borderline": [],
            "task": [f"row {i}" for i in range(400)],
        },
        "verdicts": {"harmful": harmful},
        "examples": [],
    }
    run = {"model": model, "task": task, "topic": topic, "n": n, "p": p, "seed": seed, "user": user, "repeat": repeat}
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
