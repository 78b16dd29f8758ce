"""Other defences and attackers in the engine: what they are given, and all of them on a model that learns nothing."""

import dataclasses
import pathlib
import re
from collections import Counter

import jax
import numpy as np
import pytest

from br_jax.adapters import lora
from br_jax.adapters.merge import qr_merge
from br_jax.analysis import write_analyses
from br_jax.attackers.registry import ATTACKERS
from br_jax.configs import demo
from br_jax.core.errors import UserError
from br_jax.defences.defence import KINDS
from br_jax.defences.registry import DEFENCES
from br_jax.experiment import grid as cells_module
from br_jax.experiment import run as run_module
from br_jax.experiment.grid import Grid, Run, run_sweep, score, settings_key
from br_jax.experiment.methods import COMPARED, METHODS, OF_PROVIDER, OF_USER, Cell, cells_of
from br_jax.experiment.settings import bounds, settle
from br_jax.pipeline import run_pipeline
from br_jax.provider import load_recorded, read_provider
from br_jax.training.run import keep_adapter

DOCS = pathlib.Path(__file__).parents[2] / "docs"
NAMED = re.compile(r"`(\w+)`")


def test_each_defence_says_what_it_is():
    for name, kind in DEFENCES.items():
        assert kind.badge.kind in KINDS and METHODS[name].label == kind.label
        assert ("arXiv" in kind.badge.paper) == (kind.badge.kind != "own"), name
        assert bool(kind.badge.differs) == (kind.badge.kind in ("simplified", "variant")), name
        assert (name in OF_USER) == kind.trains() and (f"{name}_provided" in OF_PROVIDER) == kind.provides()
        for field in dataclasses.fields(kind):
            assert isinstance(field.default, str) or f"defences.{name}.{field.name}" in bounds()
    assert len({kind.label for kind in METHODS.values()}) == len(METHODS) and set(DEFENCES) < set(COMPARED)


def test_a_case_has_the_rows_of_the_experiment(calls, config, tmp_path):
    config.defences.lisa.rho = 3.5
    e = run_module.Experiment(config, tmp_path / "w")
    case = e.case("lisa")
    assert list(case.rows) == list(e.recipe.user_rows) and list(case.harmful) == list(e.recipe.buffer_rows)
    assert len(case.refusals) == config.reinforce.refusals and len(case.benign) == config.reinforce.benign
    assert case.model is e.aligned and case.raw is e.raw and case.provided is None
    assert e.defence("lisa").rho == 3.5 and e.defence("lisa").aligning == 10
    assert case.direction().base == e.aligned.fingerprint and case.direction().roles == ("align",)
    scored = {prompt.prompt for prompt in e.recipe.harmful_prompts}
    assert not scored & {row.turns[0][1] for rows in (case.harmful, case.refusals, case.rows) for row in rows}
    config.user.kind, config.attackers.harsh.epochs = "harsh", 2
    e = run_module.Experiment(config, tmp_path / "w")
    assert e.settings.train("user").epochs == 2 * config.user.train.epochs and e.recipe.attacker.rank == 4
    config.align.update(refusals=0, benign=0)
    as_it_comes = run_module.Experiment(config, tmp_path / "v")
    with pytest.raises(UserError, match="needs what alignment has added"):
        as_it_comes.case("lisa").direction()


def test_pages_name_all():
    """The tables of the docs, by the first column; and a badge as the code has it."""
    lines = [
        line.strip("| ").split(" | ") for line in (DOCS / "defences.md").read_text().splitlines() if line[:3] == "| `"
    ]
    told = {name: cells[-1] for cells in lines for name in NAMED.findall(cells[0])}
    assert {*told} - {"sft", "ours"} == {*DEFENCES}
    assert {name: told[name].split(":")[0] for name in DEFENCES} == {n: kind.badge.kind for n, kind in DEFENCES.items()}
    lines = [line.split("|")[1] for line in (DOCS / "attackers.md").read_text().splitlines() if line[:3] == "| `"]
    assert {*ATTACKERS} <= {name for line in lines for name in NAMED.findall(line)}


def test_jobs_of_one_user_are_trained_and_released_apart_and_added_up(calls, config, tmp_path):
    """Each of its rows is in one of them; the provider's adapters are the same for all."""
    config.user.kind, config.attackers.split.jobs = "split", 3
    e, seen = run_module.Experiment(config, tmp_path / "w"), []
    for method, a, trains in (("sft", None, {"sft": 3}), ("ours", 0.1, {"user": 3}), ("aligned_reinforce", None, {})):
        del calls["trained"][:]
        score(e, Cell(method, a))
        of_users = [name for name in calls["trained"] if name in ("sft", "user")]
        assert Counter(of_users) == trains
        seen.append(calls["scored"].pop()[2])
    whole, parts = e.recipe.user_rows, [e.user_rows(job) for job in range(3)]
    assert [len(rows) for rows in parts] == [len(whole[i::3]) for i in range(3)]
    assert sorted(row.turns for rows in parts for row in rows) == sorted(row.turns for row in whole)
    harm = [sum(row.tag == "harmful" for row in rows) for rows in parts]
    assert min(harm) > 0, harm
    assert calls["sft"]["workdir"] == tmp_path / "w" / "job2" and calls["sft"]["rows"] == parts[2]
    merges = [e.merge_of("user", job=job) for job in range(3)]
    merged = [e.merged("user", "reinforce", merge, job) for job, merge in enumerate(merges)]
    expected = [lora.stack([e.adapter("sft", job) for job in range(3)]), lora.stack(merged)]
    for found, wanted in zip(seen, [*expected, e.adapter("reinforce")], strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    for call in (lambda: run_pipeline(config, tmp_path / "v"), lambda: write_analyses(config, tmp_path / "v", 4, 2, 0)):
        with pytest.raises(UserError, match="several jobs"):
            call()
    assert not (tmp_path / "v").exists()


def test_what_a_provider_makes_for_a_rival_lies_apart_by_its_settings(calls, config, tmp_path):
    def folder():
        return run_module.Experiment(config, tmp_path / "w").case("booster", providing=True).run["workdir"]

    first = folder()
    config.defences.lisa.rho = 3.0
    assert folder() == first and first.parent == tmp_path / "w" / "provider"
    config.defences.booster.step = 0.3
    assert folder() != first


@pytest.mark.parametrize(("method", "user"), [("direction", "user"), ("direction_only", "sft")])
def test_what_alignment_has_added_in_reinforces_place(calls, config, tmp_path, method, user):
    """It is merged with a whole adapter; Reinforce is not asked for; a base without alignment is refused."""
    e = run_module.Experiment(config, tmp_path / "w")
    e.check([method])
    score(e, Cell(method, 0.3))
    added = e.adapter("align").replace(base=e.aligned.fingerprint, roles=("reinforce",))
    expected = qr_merge(e.adapter(user), added, dataclasses.replace(e.settings.merge, a=0.3, scale=1.0))
    jax.tree.map(np.testing.assert_array_equal, calls["scored"].pop()[2], expected)
    assert "reinforce" not in calls["trained"]
    config.align.update(refusals=0, benign=0)
    with pytest.raises(UserError, match=f"{method} without what alignment has added"):
        run_module.Experiment(config, tmp_path / "v").check([method])


def test_reinforce_can_be_what_alignment_has_added(calls, config, tmp_path):
    """It lies where a trained one would, for those who serve; another kind of Reinforce is refused there."""
    config.reinforce.adapter = "alignment"
    e = run_module.Experiment(config, tmp_path / "w").begin()
    e.check()
    made, added = e.adapter("reinforce"), e.adapter("align")
    assert made.roles == ("reinforce",) and made.base == e.aligned.fingerprint and "reinforce" not in calls["trained"]
    jax.tree.map(np.testing.assert_array_equal, made.weights, added.weights)
    said = read_provider(tmp_path / "w" / "provider")["reinforce"]
    again = load_recorded(tmp_path / "w" / "provider", "reinforce", said, e.aligned)
    jax.tree.map(np.testing.assert_array_equal, again, made)
    run_module.Experiment(config, tmp_path / "w").begin().adapter("reinforce")  # is read back
    config.align.update(refusals=0, benign=0)
    with pytest.raises(UserError, match=r"^reinforce\.adapter=alignment: the model is aligned as it comes"):
        run_module.Experiment(config, tmp_path / "v").check()
    with pytest.raises(UserError, match="holds a run with another inputs: adapter was"):
        keep_adapter("reinforce", "reinforce", e.aligned, lora.scaled(made, 2.0), tmp_path / "w" / "provider")


def test_a_cell_depends_on_its_own_attacker_and_on_the_rule_that_chose_its_release(config, monkeypatch):
    def key(**changes):
        config.update_from_flattened_dict(changes)
        return settings_key(settle(config), cells_of(["sft"], [])[0])

    assert key() == key(**{"attackers.harsh.epochs": 2})
    assert len({key(), key(**{"user.kind": "harsh"}), key(**{"attackers.harsh.epochs": 3})}) == 3
    config.calibrate.update(harmful=7, benign=5)
    cells = cells_of(["sft", "ours", "sum", "no_reinforce", "direction"], [0.1])
    before = [settings_key(settle(config), cell) for cell in cells]
    monkeypatch.setattr(cells_module, "RULE", ("another",))
    after = [settings_key(settle(config), cell) for cell in cells]
    assert [key == old for key, old in zip(after, before, strict=True)] == [True] + [False] * 4


@pytest.mark.slow
def test_every_defence_and_every_attacker_has_a_cell(tmp_path):
    config = demo.get_config("smoke")
    with config.model.spec.unlocked():
        config.model.spec.update(embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffw_dim=64)
    for stage in (config.align, config.buffer, config.reinforce, config.user):
        stage.train.update(rank=4, alpha=8.0)  # one of the users asks for four times as much
    axes = {"models": [""], "tasks": ["moods"], "topics": ["devices"], "n": [16], "p": [0.5], "seeds": [1], "a": [0.1]}
    cells = list(run_sweep(config, tmp_path, Grid(**axes, methods=COMPARED)))
    assert [cell["method"] for cell in cells] == list(COMPARED)
    attacked = list(run_sweep(config, tmp_path, Grid(**axes, methods=["sft"], users=[*ATTACKERS])))
    assert [cell["run"]["user"] for cell in attacked] == list(ATTACKERS)
    for cell in attacked:
        own = ATTACKERS[cell["run"]["user"]].asks_itself
        assert bool(cell["scores"]["harmful_own"]["n"]) == own
        run = Run(**cell["run"])
        trained = [*(tmp_path / "runs" / run.name).rglob("sft/stage.json")]
        usual = run.user not in ("prefill", "best_of", "bf16", "int8", "amplified")
        assert len(trained) == (2 if run.user == "split" else usual), run.user
