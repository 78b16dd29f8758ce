"""Seeds' roles, what a cell was made with, and the ledger of a table's test cells."""

import json
import pathlib
import subprocess

import pytest

from br_jax.core.errors import UserError
from br_jax.experiment import protocol
from br_jax.experiment.grid import Grid, run_sweep
from br_jax.experiment.protocol import MARKS, Ledger, made_with, role
from br_jax.organism.judge import Verdict
from br_jax.report.results import read_cells
from br_jax.scoring.judges.texts import KeywordJudge, TopicJudge

MADE = dict.fromkeys(MARKS, "a") | {"commit": "c0ffee"}


def test_a_seed_has_one_role():
    assert [role(seed) for seed in (0, 49, 50, 99, 100, 10**9)] == ["tuning"] * 2 + ["validation"] * 2 + ["test"] * 2


def test_what_a_cell_is_made_with_changes_with_what_it_depends_on_alone(tmp_path, monkeypatch):
    topic = tmp_path / "topic.json"
    topic.write_text("{}")
    config = {"eval": {"topic": 12}, "topics": {"eval": f"devices, {topic}"}, "user": {"n": 30}}
    first = made_with(config, [TopicJudge()])

    def changed(config=config, more=()):
        made = made_with(config, [TopicJudge(), *more])
        return {name for name in made if made[name] != first[name]}

    assert changed() == set() and {*MARKS, "commit", "processor", "threads", "devices", "jax"} <= {*first}
    assert changed(config | {"user": {"n": 31}}) == {"config"}
    assert changed(more=[KeywordJudge()]) == {"judge"}
    assert changed(config | {"eval": {"topic": 13}}) == {"config", "prompts"}
    topic.write_text("{ }")
    assert changed() == {"prompts"}
    read = pathlib.Path.read_bytes
    for path, names in (("method.py", {"code"}), ("report/tables.py", set())):
        with monkeypatch.context() as patch:
            patch.setattr(
                pathlib.Path, "read_bytes", lambda file, path=path: read(file) + b"#" * str(file).endswith(path)
            )
            protocol.code.cache_clear()
            assert changed() == names | {"prompts"}
    protocol.code.cache_clear()


def test_a_package_that_is_no_checkout_has_no_commit(monkeypatch):
    for error in (FileNotFoundError("git"), subprocess.TimeoutExpired("git", 60)):
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", lambda *given, error=error, **options: (_ for _ in ()).throw(error))
            assert protocol.commit.__wrapped__() == ""


def test_the_first_cell_fixes_how_others_are_made_and_each_is_scored_once(tmp_path):
    one, other = tmp_path / "runs" / "x" / "cells" / "sft.json", tmp_path / "cells" / "ours.json"
    ledger = Ledger(tmp_path)
    ledger.require(one, MADE, there=False)  # nothing is entered: anything goes
    ledger.add(one, MADE)
    for book in (ledger, Ledger(tmp_path)):
        book.require(one, MADE, there=True)
        book.require(other, MADE | {"commit": "another", "processor": "another"}, there=False)
        for mark in MARKS:
            known = rf"\(a{', commit c0ffee' * (mark == 'code')}\)"
            said = rf"^{other}: made with another {mark} \(b\) than this table's test cells {known}: [^\n]+$"
            with pytest.raises(UserError, match=said):
                book.require(other, MADE | {mark: "b"}, there=True)
        with pytest.raises(
            UserError, match=rf"^{one}: was scored on \d{{4}}-\d\d-\d\d, and a test seed is scored once: [^\n]+$"
        ):
            book.require(one, MADE, there=False)
    ledger.add(other, MADE | {"code": "b"})  # the table's own marks stay
    assert json.loads((tmp_path / "scored.jsonl").read_text().splitlines()[0])["code"] == "a"
    with pytest.raises(UserError, match="made with another code"):
        Ledger(tmp_path).require(other, MADE | {"code": "b"}, there=True)


@pytest.mark.parametrize("seed", [1, 100])
def test_a_sweep_scores_a_test_seed_once_and_in_one_way(config, calls, tmp_path, monkeypatch, seed):
    monkeypatch.setattr("br_jax.experiment.recipe.judge", lambda answer, prompt: Verdict.HARMFUL)
    axes = {"models": [config.model.source], "tasks": ["moods"], "topics": ["devices"], "seeds": [seed]}

    def sweep(*methods, p=0.1, n=30):
        return list(run_sweep(config, tmp_path / "w", Grid(**axes, n=[n], p=[p], methods=methods, a=[0.1])))

    def refused(*methods, said, **at):
        """Of a test seed."""
        if seed < 100:
            return sweep(*methods, **at)
        with pytest.raises(UserError, match=said):
            sweep(*methods, **at)

    first = sweep("aligned", "sft")
    assert sweep("sft", "aligned") == first[::-1] and len(calls["scored"]) == 2, "read back"
    assert (tmp_path / "w" / "scored.jsonl").exists() == (seed == 100) and len(sweep("sft", p=0.2, n=20)) == 1
    next((tmp_path / "w").glob("runs/*p0.1*/cells/sft.json")).unlink()
    refused("sft", said=r"cells/sft\.json: was scored on [-\d]+, and a test seed is scored once")
    config.eval.topic = 11
    refused(
        "ours", said=r"cells/\S+\.json: made with another config \(\w{12}\) than this table's test cells \(\w{12}\)"
    )
    assert {cell["run"]["seed"] for cell in read_cells(tmp_path / "w")} == {seed}
    assert all({*MARKS} <= {*cell["made"]} for cell in read_cells(tmp_path / "w"))
