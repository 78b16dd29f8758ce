"""A grid's runs and cells: what is shared, what is read back, what a kill leaves; training and scoring recorded."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from br_jax.adapters import lora
from br_jax.configs import demo
from br_jax.core.errors import UserError
from br_jax.core.records import read_record
from br_jax.experiment import run as run_module
from br_jax.experiment.grid import Grid, Run, plan, render_plan, run_sweep
from br_jax.experiment.methods import STEPS
from br_jax.experiment.settings import settle
from br_jax.organism.judge import Verdict
from br_jax.pipeline import run_pipeline
from br_jax.report.report import write_report
from br_jax.report.results import mixed, read_cells, results_of


@pytest.fixture
def grid(config):
    """grid(**axes) -> SFT and the defense at two shares and two seeds."""
    axes = {
        "models": [config.model.source], "tasks": ["moods"], "topics": ["devices"], "n": [30], "p": [0.1, 0.2],
        "seeds": [1, 2], "methods": ["aligned", "sft", "ours"], "a": [0.1],
    }  # fmt: skip
    return lambda **changed: Grid(**{**axes, **changed})


@pytest.fixture(autouse=True)
def compliant(monkeypatch):
    """A raw model that complies with every prompt, whatever the seed of its draw."""
    monkeypatch.setattr("br_jax.experiment.recipe.judge", lambda answer, prompt: Verdict.HARMFUL)


def timeless(cells):
    return [{name: value for name, value in cell.items() if name != "seconds"} for cell in cells]


def test_every_combination_is_a_run_and_a_wrong_axis_is_named(grid):
    runs = grid(n=[20, 30]).runs()
    assert [(run.seed, run.n, run.p) for run in runs] == list(itertools.product((1, 2), (20, 30), (0.1, 0.2)))
    assert len({run.name for run in runs}) == 8
    cells = grid(methods=["sft", "buffer_only", "ours"], a=[0.0, 0.5]).cells()
    assert cells == [("sft", None), ("buffer_only", None), ("ours", 0.0), ("ours", 0.5)]
    for axis, message in (
        ({"p": []}, "p is empty"),
        ({"seeds": [1, 1]}, "twice"),
        ({"methods": ["our"]}, "near: ours"),
    ):
        with pytest.raises(UserError, match=message):
            grid(**axis)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"align.refusals": 0, "align.benign": 0},
         r"booster without rows of its alignment \(align.refusals, align.benign\); "
         "asft without what alignment has added to it"),
        ({"reinforce.refusals": 0}, r"safe_instruct, lisa without refusals \(reinforce.refusals\)"),
        ({"buffer.harmful": 0, "buffer.adapter": "."}, r"antidote, booster without harmful rows \(buffer.harmful\)"),
    ],
)  # fmt: skip
def test_defences_that_lack_something_are_refused_before_anything_runs(config, calls, grid, tmp_path, change, lost):
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=f"^this model cannot be defended by {lost}.*: set these, or leave"):
        list(run_sweep(config, tmp_path, grid(methods=["sft", "safe_instruct", "asft", "lisa", "antidote", "booster"])))
    assert not list(tmp_path.iterdir())


def test_runs_share_the_provider_of_their_seed_and_methods_their_adapters(config, calls, grid, tmp_path):
    cells = run_sweep(config, tmp_path / "s", grid())
    cells = sorted((cell["run"]["seed"], cell["run"]["p"], cell["method"]) for cell in cells)
    assert cells == [(seed, p, m) for seed in (1, 2) for p in (0.1, 0.2) for m in ("aligned", "ours", "sft")]
    assert calls["trained"].count("sft") == calls["trained"].count("user") == 4
    assert len(list((tmp_path / "s" / "providers").iterdir())) == 2 and len(list((tmp_path / "s/runs").iterdir())) == 4


def test_what_the_provider_trains_on_names_its_folder(config, grid, tmp_path):
    (run,) = grid(seeds=[1], p=[0.2]).runs()

    def same(changes, given=None):
        changed = [config.copy_and_resolve_references() for _ in range(2)]
        for one, change in zip(changed, ({}, changes), strict=True):
            one.update_from_flattened_dict((given or {}) | change)
        return len({run.settings(settle(one), tmp_path).provider for one in changed}) == 1

    paper = {"data.material": "paper"}  # whose files and way of counting are the provider's rows, too
    assert same({"user.n": 20, "data.texts.n": 420}) and same({"user.index_mode": "reference"})
    for change in ({"data.texts.n": 5}, {"data.texts.path": "t.txt"}, {"align.refusals": 5}):
        assert not same(change), change
    for change in ({"user.index_mode": "reference"}, {"data.llm_lat.path": "l.jsonl"}, {"data.alpaca.path": "a.jsonl"}):
        assert not same(change, paper), change


def test_a_single_run_is_a_grid_of_one(config, calls, grid, tmp_path):
    (run,) = grid(seeds=[42], p=[0.2]).runs()
    assert run == Run.of(settle(config))
    alone = run_pipeline(config, tmp_path / "w")
    of_sweep = list(run_sweep(config, tmp_path / "s", grid(seeds=[42], p=[0.2], methods=STEPS, a=[0.0, 0.1])))
    assert timeless(alone) == timeless(of_sweep) and len(alone) == 9
    scored = [(name, adapter and lora.fingerprint(adapter)) for name, _, adapter in calls["scored"]]
    assert scored[:9] == scored[9:]


def test_what_is_finished_is_read_back_without_a_model(config, calls, grid, tmp_path, monkeypatch):
    axes = grid(seeds=[1], p=[0.2])
    first = list(run_sweep(config, tmp_path / "s", axes))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_model", lambda *args, **options: pytest.fail("a model was loaded"))
        assert list(run_sweep(config, tmp_path / "s", axes)) == first
    kept = [{k: v for k, v in cell.items() if k not in ("settings", "recipe")} for cell in read_cells(tmp_path / "s")]
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, first))


def test_a_finished_cell_is_read_once_by_a_sweep_and_its_report(config, calls, grid, tmp_path, monkeypatch):
    axes, read, records = grid(seeds=[1], p=[0.2]), [], {}
    cells = [*run_sweep(config, tmp_path, axes)]
    for module in ("experiment.grid", "report.results"):
        monkeypatch.setattr(f"br_jax.{module}.read_record", lambda file, cure: read.append(file) or read_record(file))
    assert [*run_sweep(config, tmp_path, axes, records=records)] == cells
    monkeypatch.setattr("br_jax.report.report.draw_results", lambda results: {})
    write_report(tmp_path, known=records)
    assert sorted(read) == sorted(tmp_path.glob("runs/*/cells/*.json")) and len(read) == 3


def test_cells_of_one_recipe_are_told_from_others(config, calls, grid, tmp_path):
    """Seeds and shares of harm make no difference; how a method or a user was trained does, in its own tables alone."""

    def mixed_after(**axes):
        list(run_sweep(config, tmp_path / "s", grid(**axes)))
        return [setting.user for setting in mixed(results_of(read_cells(tmp_path / "s")))]

    assert mixed_after(seeds=[1, 2], p=[0.0, 0.2], methods=["sft", "resta"]) == []
    config.attackers.harsh.epochs += 1
    assert mixed_after(seeds=[1], p=[0.2], methods=["ours"]) == []
    config.defences.resta.strength *= 2
    assert mixed_after(seeds=[3], p=[0.2], methods=["sft"]) == []
    assert mixed_after(seeds=[3], p=[0.2], methods=["resta"]) == ["plain"]
    assert mixed_after(seeds=[1], p=[0.2], methods=["sft"], users=["harsh"]) == ["plain"]
    config.user.train.learning_rate *= 2
    assert mixed_after(seeds=[2], p=[0.2], methods=["sft"], users=["harsh"]) == ["harsh", "plain"]


def test_a_cell_is_made_again_where_what_it_depends_on_was_changed(config, calls, grid, tmp_path, monkeypatch):
    """The config's text may be the same: a file that it names, or the rules that judge, may not."""
    verdicts, axes = tmp_path / "verdicts.jsonl", grid(seeds=[1], p=[0.2])
    verdicts.write_text("{}\n")
    config.judges.verdicts.source = str(verdicts)
    made = len(list(run_sweep(config, tmp_path / "s", axes)))
    done = lambda: plan(config, tmp_path / "s", axes)["runs"][0]["done"]  # noqa: E731
    assert done() == made
    verdicts.write_text('{"other": 1}\n')
    assert done() == 0
    verdicts.write_text("{}\n")
    assert done() == made
    with monkeypatch.context() as patch:
        patch.setattr("br_jax.experiment.grid.rules_version", lambda: "other rules")
        assert done() == 0


def test_two_runs_of_a_sweep_never_share_a_folder(config, calls, grid, tmp_path):
    (tmp_path / "other").mkdir()
    for folder in ("", "other"):
        (tmp_path / folder / "devices.json").write_text("{}")
    with pytest.raises(UserError, match=r"two runs .* folder .*devices.*: name their models or topics apart"):
        plan(config, tmp_path / "s", grid(topics=["devices.json", "other/devices.json"]))


def test_a_plan_says_what_is_left_and_runs_nothing(config, calls, grid, tmp_path):
    before = plan(config, tmp_path / "s", grid())
    assert not (tmp_path / "s").exists() and not calls["trained"]
    assert [run["trainings"] for run in before["runs"]] == [["sft", "user"]] * 4 and before["seconds_a_run"] is None
    assert before["runs"][0]["rows"] == 2 * 30 * config.user.train.epochs
    assert before["runs"][0]["prompts"] == 3 * (12 + 11 + 10) and "4 of 4 runs are left" in render_plan(before)
    list(run_sweep(config, tmp_path / "s", grid(seeds=[1])))
    after = plan(config, tmp_path / "s", grid())
    assert [run["done"] for run in after["runs"]] == [3, 3, 0, 0] and after["seconds_a_run"] > 0
    assert "time: 0.0 h, at 0 min a run" in render_plan(after)


def test_a_model_copied_anew_is_the_same_and_one_of_other_bytes_is_not(config, calls, grid, tmp_path):
    size, file = (1 << 26) + 1_000, tmp_path / "model.gguf"  # more than is read of it
    config.model.source = str(file)
    file.write_bytes(content := bytes(size))
    one = grid(models=[str(file)], seeds=[1], p=[0.2])
    list(run_sweep(config, tmp_path / "s", one))

    def done(content, changed):
        file.write_bytes(content)
        os.utime(file, ns=(changed, changed))
        return plan(config, tmp_path / "s", one)["runs"][0]["done"]

    assert done(content, 1) == 3
    changed = (content[:place] + b"1" + content[place + 1 :] for place in (0, size // 3, size - 1))
    assert [done(other, 2 + i) for i, other in enumerate((content[:-1], *changed))] == [0, 0, 0, 0]


def test_a_plan_counts_what_a_user_asks_for_and_every_job_of_one_that_splits(config, calls, grid, tmp_path):
    config.attackers.split.jobs, config.attackers.harsh.epochs = 3, 7

    def runs(*users):
        return plan(config, tmp_path / "s", grid(seeds=[1], p=[0.2], users=users))["runs"]

    split, harsh, ten = runs("split", "harsh", "ten_rows")
    assert split["trainings"] == harsh["trainings"] == ["sft", "user"]
    assert split["rows"] == ten["rows"] == 2 * 30 * config.user.train.epochs and harsh["rows"] == 7 * split["rows"]
    for job in range(2):  # stopped in the last job of SFT
        done = tmp_path / "s" / "runs" / split["name"] / f"job{job}" / "sft" / "stage.json"
        done.parent.mkdir(parents=True)
        done.touch()
    assert runs("split")[0]["rows"] == 4 * 10 * config.user.train.epochs
    config.user.train.steps = 5
    plain, drawn, harsh = runs("plain", "best_of", "harsh")
    assert plain["rows"] == 2 * 5 * config.user.train.batch_size and harsh["rows"] == 7 * plain["rows"]
    assert drawn["prompts"] - plain["prompts"] == 3 * 4 * config.eval.topic  # of three cells, four answers each


def test_what_another_process_made_meanwhile_is_read_back(config, calls, grid, tmp_path):
    sweep = lambda: run_sweep(config, tmp_path / "s", grid(seeds=[1], p=[0.2]))  # noqa: E731
    ours = sweep()
    cells, others = [next(ours)], []
    worker = threading.Thread(target=lambda: others.extend(sweep()))
    worker.start()
    time.sleep(0.5)
    assert worker.is_alive() and not others
    cells.extend(ours)
    worker.join()
    assert others == cells and len(calls["scored"]) == len(cells) == 3


def tiny_sweep(folder):
    """All stages on a model of next to nothing, and three methods scored."""
    config = demo.get_config("smoke")
    with config.model.spec.unlocked():
        config.model.spec.update(embed_dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, ffw_dim=64)
    axes = {"models": [""], "tasks": ["moods"], "topics": ["devices"], "n": [16], "p": [0.5], "seeds": [42]}
    list(run_sweep(config, folder, Grid(**axes, methods=["aligned", "sft", "ours"], a=[0.1])))


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    """SIGKILL three times: while the raw model answers, when the user trains, when it is scored."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", f"import test_grid; test_grid.tiny_sweep({str(killed)!r})"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    environment["JAX_NUM_CPU_DEVICES"] = str(jax.device_count())  # on fewer devices sums have another order

    tiny_sweep(whole)
    programs = shutil.copytree(jax.config.jax_compilation_cache_dir, tmp_path / "programs")
    environment["JAX_COMPILATION_CACHE_DIR"] = str(programs)  # what this process has just compiled
    for mark in ("providers/*/answers.jsonl", "runs/*/user/run.json", "runs/*/answers.jsonl"):
        process = subprocess.Popen(command, env=environment)
        while not any(b"\n" in file.read_bytes() for file in killed.glob(mark)) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it ended before there was {mark}"
    subprocess.run(command, env=environment, check=True)
    assert timeless(read_cells(killed)) == timeless(read_cells(whole))
    for pattern in ("providers/*/*.jsonl", "runs/*/*.jsonl"):
        ours, theirs = (sorted(folder.glob(pattern)) for folder in (killed, whole))
        assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs] and ours
        for file in ours:
            keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
            assert len(keys) == len(set(keys)), "something was made twice"
