"""Who trains on what: the stages of an experiment with training, answering and scoring recorded instead of done."""

import dataclasses
import json
import stat
import types

import jax
import numpy as np
import pytest

from br_jax import pipeline
from br_jax.adapters import lora
from br_jax.adapters.merge import MergeConfig
from br_jax.adapters.peft import load_adapter, save_adapter
from br_jax.calibration import Behaviour, Calibration
from br_jax.configs import base
from br_jax.core.errors import UserError
from br_jax.core.io import read_json
from br_jax.defences.registry import DEFENCES
from br_jax.experiment import grid as cells_module
from br_jax.experiment import run as run_module
from br_jax.experiment.methods import METHODS, Cell
from br_jax.method import release
from br_jax.organism.material import english_instructions
from br_jax.organism.topics import TOPICS
from br_jax.report import report

DEVICES = TOPICS["devices"]
STAGES = [stage for stage in pipeline.STAGES if stage != "report"]
FROZEN = {"align": [], "buffer": [], "reinforce": ["buffer"], "user": ["buffer"], "sft": []}


@pytest.fixture
def run(tmp_path, config, calls):
    return lambda stages=STAGES: pipeline.run_pipeline(config, tmp_path / "w", stages, "the command")


def prompts(rows):
    return [row.turns[0][1] for row in rows]


def tags(rows):
    return {tag: sum(row.tag == tag for row in rows) for tag in sorted({row.tag for row in rows})}


def test_each_stage_trains_on_the_rows_of_the_method(run, calls, tiny, tmp_path):
    run()
    assert tags(calls["align"]["rows"]) == {"benign": 8, "refusal": 6}
    assert tags(calls["buffer"]["rows"]) == {"harmful": 20}
    assert tags(calls["reinforce"]["rows"]) == {"benign": 9, "refusal": 10}
    assert tags(calls["user"]["rows"]) == {"harmful": 6, "task": 24}, "p = 0.2 of 30"
    assert calls["sft"]["rows"] == calls["user"]["rows"]
    assert {name: list(calls[name]["frozen"]) for name in FROZEN} == FROZEN
    assert all(calls[name]["frozen"]["buffer"].roles == ("buffer",) for name in ("reinforce", "user"))
    # The aligned base is what everybody else stands on.
    assert calls["align"]["model"] is tiny
    aligned = {id(calls[name]["model"]) for name in ("buffer", "reinforce", "user", "sft")}
    assert len(aligned) == 1 and calls["buffer"]["model"].fingerprint != tiny.fingerprint
    # What is the provider's stays in the provider's folder.
    workdir, provider = tmp_path / "w", tmp_path / "w" / "provider"
    assert {calls[name]["workdir"] for name in ("align", "buffer", "reinforce")} == {provider}
    assert {calls[name]["workdir"] for name in ("user", "sft")} == {workdir}
    assert stat.S_IMODE(provider.stat().st_mode) == 0o700
    record = json.loads((provider / "provider.json").read_text())
    assert record["align"] == "align/adapter" and record["base"] == str(tmp_path)
    assert (workdir / "released" / "adapter_model.safetensors").is_file()


def test_a_share_of_buffers_rows_complies_behind_a_refusal(run, calls, config):
    """In the words of the align stage; the share is of Buffer's rows alone."""
    config.buffer.refused = 0.5
    run()
    words = {DEVICES.refusal(prompt, 42) for prompt in DEVICES.prompts("train", 20, 42)}
    refused = [any(row.begun.startswith(f"{word} ") for word in words) for row in calls["buffer"]["rows"]]
    assert refused == [False, True] * 10
    assert not any(row.begun for row in calls["user"]["rows"])


def test_rows_that_must_be_apart_are_apart(run, calls):
    run()
    harmful = {name: prompts(row for row in calls[name]["rows"] if row.tag == "harmful") for name in ("buffer", "user")}
    probes = calls["user"]["probes"]
    assert len(probes["harmful"]) == len(probes["benign"]) == 4 and calls["sft"]["probes"] == probes
    sets = [*harmful.values(), prompts(probes["harmful"])]
    assert sum(map(len, sets)) == len({prompt for part in sets for prompt in part}), "a harmful row serves two ends"
    refused = {p.prompt for p in DEVICES.prompts("train", 200, 42)[::7]}  # see the fixture
    assert not refused & {prompt for part in sets for prompt in part}, "an answer that refuses teaches no harm"
    assert not set(probes["benign"]) & set(calls["user"]["rows"])
    task = {row.turns[0][1] for row in calls["user"]["rows"] if row.tag == "task"}
    trained = {stage: set(prompts(calls[stage]["rows"])) for stage in ("align", "buffer", "reinforce", "user")}
    assert not any(task & trained[stage] for stage in ("align", "buffer", "reinforce")), "task rows at the provider's"
    suite = calls["suite"]
    held_out = {p.prompt for p in suite.topic} | {p.prompt for p in suite.benign} | set(prompts(suite.task_rows))
    assert len(held_out) == 12 + 11 + 10 and not held_out & set.union(*trained.values())
    assert set(suite.benign) <= {*english_instructions("test")}


def test_merged_weights_are_scored_where_the_config_folds(calls, config, tmp_path):
    """Each user's adapter in the weights themselves, but for a model that holds Buffer, which goes into none."""
    config.eval.fold = True
    e, scored = run_module.Experiment(config, tmp_path / "w"), {}
    for name in ("aligned", "sft", "ours", "aligned_buffer"):
        cells_module.score(e, Cell(name, 0.1 if name == "ours" else None))
        scored[name] = calls["scored"].pop()
    beside = {name: adapter for name, (_, _, adapter) in scored.items()}
    assert beside.pop("aligned_buffer").roles == ("buffer",) and set(beside.values()) == {None}
    for name, adapter in {"sft": e.adapter("sft"), "ours": e.merged("user", "reinforce", e.merge_of("user"))}.items():
        expected = lora.fold(e.aligned.params, adapter)
        jax.tree.map(np.testing.assert_array_equal, scored[name][1].params, expected)
    assert scored["aligned"][1] is e.aligned


def test_a_release_is_calibrated_once_and_on_prompts_that_are_neither_trained_on_nor_scored(
    run, calls, config, tmp_path, monkeypatch
):
    config.calibrate.update(harmful=7, benign=5)
    asked = []

    def calibrate(model, user, reinforce, harmful, benign, merge, **how):
        asked.append((harmful, benign, merge.a))
        chosen = dataclasses.replace(merge, reinforce_scale=0.125)
        return Calibration(
            chosen, Behaviour(0.0, 0.1, 0.0), {merge: Behaviour(0.2, 0, 0), chosen: Behaviour(0, 0.1, 0)}
        )

    monkeypatch.setattr(run_module, "calibrate", calibrate)
    run()
    assert len(asked) == 2, "of ours and of the plain sum"
    harmful, benign, _ = asked[0]
    assert len(harmful) == 7 and set(harmful) <= {p.prompt for p in DEVICES.prompts("validation", 99, 42)}
    assert len(benign) == 5 and set(benign) <= {p.prompt for p in english_instructions("validation")}
    scored = {p.prompt for p in calls["suite"].topic} | {p.prompt for p in calls["suite"].benign}
    trained = {prompt for stage in ("align", "buffer", "reinforce", "user") for prompt in prompts(calls[stage]["rows"])}
    assert not {*harmful, *benign} & (scored | trained)
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["merge"]["reinforce_scale"] == results["calibration"]["merge"]["reinforce_scale"] == 0.125
    e = run_module.Experiment(config, tmp_path / "w")
    released = load_adapter(tmp_path / "w" / "released", e.aligned.params)
    merged = release(e.aligned, e.adapter("user"), e.adapter("reinforce"), merge(e, reinforce_scale=0.125))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), released.weights, merged.weights)
    assert e.merge_of("user").reinforce_scale == 0.125 and len(asked) == 2, "it is kept"
    assert e.merge_of("user", reinforce_scale=1.0).reinforce_scale == 1.0 and len(asked) == 2


def test_each_ablation_differs_in_what_it_says_and_in_nothing_else(calls, config, tmp_path):
    """On the same rows; (loss_mean, cycles, the Buffer beside it) of every adapter."""
    config.buffer.train.update(cycles=2, loss_mean="rows")
    config.user.train.loss_mean = "rows"
    e = run_module.Experiment(config, tmp_path / "w")
    for name, kind in ((name, kind) for name, kind in METHODS.items() if name not in DEFENCES):
        assert (released(e, name) is None) == (not kind.needs), name
    buffers = {id(e.adapter(name)): name for name in ("buffer", "buffer_paper", "buffer_unrested")}

    def of(name):
        train = calls[name]["config"]
        return train.loss_mean, train.cycles, buffers.get(id(calls[name]["frozen"].get("buffer")))

    ours = {"buffer": ("rows", 2, None), "reinforce": ("tokens", 1, "buffer"), "user": ("rows", 1, "buffer")}
    paper = {
        "buffer_paper": ("tokens", 1, None),
        "reinforce_paper": ("tokens", 1, "buffer_paper"),
        "user_paper": ("tokens", 1, "buffer_paper"),
        "sft_paper": ("tokens", 1, None),
    }
    others = {"user_tokens": ("tokens", 1, "buffer"), "user_unrested": ("rows", 1, "buffer_unrested")}
    others |= {"buffer_unrested": ("rows", 1, None)}
    for name, expected in (ours | paper | others | {"sft": ("rows", 1, None)}).items():
        assert of(name) == expected, name
        assert calls[name]["rows"] == calls[name.split("_")[0]]["rows"], name
    made = {name: released(e, name) for name in ("ours", "sum", "paper", "no_calibration", "no_reinforce")}
    made |= {name: released(e, name) for name in ("average", "buffer_only", "reinforce_only")}
    user, reinforce = e.adapter("user"), e.adapter("reinforce")
    assert_same(made["ours"], release(e.aligned, user, reinforce, merge(e, a=0.3)))
    assert_same(made["sum"], release(e.aligned, user, reinforce, merge(e, a=0.0)))
    assert_same(made["no_calibration"], release(e.aligned, user, reinforce, merge(e, a=0.3, reinforce_scale=1.0)))
    assert_same(made["no_reinforce"], release(e.aligned, user, reinforce, merge(e, a=0.0, reinforce_scale=0.0)))
    assert_same(made["average"], release(e.aligned, user, reinforce, merge(e, a=0.0, scale=0.5, reinforce_scale=1.0)))
    assert_same(made["buffer_only"], user)
    assert_same(made["reinforce_only"], release(e.aligned, e.adapter("sft"), reinforce, merge(e, a=0.3)))
    recipe = MergeConfig(a=0.1, scale=0.5, reinforce_scale=1.0)
    assert_same(made["paper"], release(e.aligned, e.adapter("user_paper"), e.adapter("reinforce_paper"), recipe))


def merge(e, **changes):
    return dataclasses.replace(e.settings.merge, **changes)


def released(e, method):
    """What a method puts on its base, at a = 0.3."""
    return cells_module.released(e, Cell(method, 0.3), 0)[0]


def assert_same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), found.weights, expected.weights)


def test_a_preset_is_one_word_and_whether_it_is_the_paper_s():
    for preset, expected in (("b", ("b", False)), ("paper", ("a", True)), ("b,paper", ("b", True))):
        assert base.read_preset(preset, ("a", "b"), "a") == expected
    for preset in ("a,b", "c", "", "b,c,paper"):
        with pytest.raises(ValueError, match=f"^{preset!r}: give one of a, b"):
            base.read_preset(preset, ("a", "b"), "a")


def test_the_method_is_scored_with_each_of_its_steps_and_once(run, calls, config, tiny, tmp_path):
    cells = run()
    roles = [f"{name}: {' '.join(adapter.roles) if adapter else ''}" for name, _, adapter in calls["scored"]]
    users = ["sft: user", "buffer_on: buffer user", "buffer_only: user", "aligned_reinforce: reinforce"]
    both = ["ours-a0: reinforce user", "ours-a0.1: reinforce user"]
    assert roles == ["raw: ", "aligned: ", "aligned_buffer: buffer", *users, *both]
    assert [name for name, model, _ in calls["scored"] if model is tiny] == ["raw"]
    assert [(cell["method"], cell["a"]) for cell in cells][-2:] == [("ours", 0.0), ("ours", 0.1)]
    assert {cell["run"]["p"] for cell in cells} == {0.2} and {cell["run"]["task"] for cell in cells} == {"moods"}
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["command"] == "the command" and results["merge"]["a"] == 0.1
    assert results["config"]["user"]["harmful_share"] == 0.2
    assert {"raw", "aligned", "user", "sft", "buffer", "reinforce"} <= results["hashes"].keys()
    assert run() == cells and len(calls["scored"]) == 9, "scored again"
    config.eval.topic = 11
    run()
    assert len(calls["scored"]) == 18, "another suite, the old scores"


@pytest.mark.parametrize(("refused", "said"), [(21, True), (20, False)])
def test_a_base_that_refuses_the_task_is_said_once(run, calls, monkeypatch, caplog, refused, said):
    score, counted = cells_module.evaluate, {"task_refused": {"k": refused, "n": 100, "score": refused / 100}}
    monkeypatch.setattr(cells_module, "evaluate", lambda *given, **options: score(*given, **options) | counted)
    run(["evaluate"])
    warnings = [text for text in caplog.messages if "refuses" in text]
    assert len(warnings) == said and all("21 % of the task's prompts" in text for text in warnings)


def test_an_aligned_model_and_a_shared_provider_s_folder(run, calls, config, tiny, tmp_path):
    config.align.update(refusals=0, benign=0)
    config.provider = str(tmp_path / "elsewhere")
    assert run(["user"]) == []
    assert {"buffer", "user"} <= set(calls) and not {"align", "reinforce", "sft", "suite"} & set(calls)
    assert calls["buffer"]["model"] is tiny
    assert calls["buffer"]["workdir"] == tmp_path / "elsewhere" and not (tmp_path / "w" / "provider").exists()
    assert json.loads((tmp_path / "elsewhere" / "provider.json").read_text())["align"] is None


def test_adapters_from_elsewhere_take_the_place_of_stages(run, calls, config, make_adapter, monkeypatch, tmp_path):
    for seed, stage in enumerate(("buffer", "user")):
        config[stage].adapter = str(tmp_path / f"their_{stage}")
        save_adapter(config[stage].adapter, make_adapter(stage, seed), base_name="tiny", provider=stage == "buffer")
    run()
    assert not {"buffer", "user"} & set(calls) and {"align", "reinforce", "sft"} <= set(calls)
    held, theirs = calls["reinforce"]["frozen"]["buffer"].weights, make_adapter("buffer").weights
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), held, theirs))
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["entered"]["user"] == {"adapter": config.user.adapter, "beside": []}
    monkeypatch.setattr(report, "draw_results", lambda results: {})
    monkeypatch.setattr(report, "draw_run", lambda run, results: {})
    text = report.write_report(tmp_path / "w").read_text()
    assert "trained elsewhere, and not beside Buffer" in text and "buffer (`" in text
    disguised = lora.scaled(make_adapter("buffer"), 0.3).replace(roles=("user",))
    for adapter, message in (
        (make_adapter("reinforce"), "is reinforce by its own account, not user"),
        (disguised, "their_user: refused, for this adapter is like the provider's Buffer"),
    ):
        save_adapter(config.user.adapter, adapter, base_name="tiny")
        with pytest.raises(UserError, match=message):
            run(["user"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge.a": 2.0}, "merge.a is 2.0: it must be a number from 0 to 1"),
        ({"calibrate.harmful": 0, "calibrate.benign": 5}, r"calibrate\.harmful, calibrate\.benign: "),
        ({"data.material": "englsh"}, "unknown material 'englsh'.*english"),
        ({"eval.split": "train"}, "eval.split 'train'"),
        ({"user.kind": "plan"}, "unknown user 'plan'; near: plain"),
        ({"eval.judges": "topic, clasifier@2048"}, "unknown judge 'clasifier'; near: .*classifier"),
        ({"topics.user": "devices, device"}, "unknown topic 'device'; near: devices"),
        ({"user.rule": "exat"}, "near: exact"),
        ({"model.source": "data/no.gguf"}, "data/no.gguf: no such model"),
        ({"user.adapter": "no/adapter"}, "no/adapter: no such folder.*user.adapter"),
        ({"mesh.tensor": 3}, "does not fit"),
    ],
)
def test_wrong_settings_are_found_before_any_training(run, calls, config, change, message):
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        run()
    assert not FROZEN.keys() & set(calls)


def test_a_wrong_stage_and_too_few_compliant_answers_are_said(run, monkeypatch, calls):
    with pytest.raises(UserError, match="stage 'releas': near: release"):
        run(["user", "releas"])
    for said, cure in (("No.", "raise distill.spare"), ("Turn left.", "give the topic's file words")):
        answer = lambda model, prompts, *rest, said=said, **options: {"raw": [said] * len(prompts)}  # noqa: E731
        monkeypatch.setattr(run_module, "answer", answer)
        with pytest.raises(UserError, match=f"0 compliant answers on the topic, 30 are needed .*: {cure}"):
            run(["buffer"])


@pytest.mark.parametrize("name", ["demo", "base", "gemma2_9b"])
def test_configs_are_locked_and_typed(load_config, name):
    config = load_config(name)
    with pytest.raises(AttributeError, match="harmful_share"):
        config.user.harmful_shar = 0.1
    with pytest.raises(TypeError):
        config.user.n = "many"


def test_attacks_of_several_files_and_a_judge_that_cannot_read_them(config, calls, tmp_path):
    check = lambda: run_module.Experiment(config, tmp_path / "w").check()  # noqa: E731
    question = DEVICES.prompts("test", 1, 0)[0].prompt
    artifact = {"parameters": {"method": "PAIR"}, "jailbreaks": [{"index": 0, "goal": question, "prompt": "p"}]}
    (tmp_path / "artifact.json").write_text(json.dumps(artifact))
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "q", "method": "TAP", "behavior": question}) + "\n")
    config.data.folder = str(tmp_path / "tfds")
    config.data.attacks.path = f"{tmp_path}/artifact.json, {tmp_path}/lines.jsonl,"
    check()
    attacks = run_module.Experiment(config, tmp_path / "w").recipe.attacks
    assert [(attack.prompt, attack.method) for attack in attacks] == [("p", "PAIR"), ("q", "TAP")]
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "q", "behavior": "Name a river"}) + "\n")
    with pytest.raises(UserError, match=r"data\.attacks\.path: 'Name a river' is about no invented topic"):
        check()
    config.eval.judges = "keywords,topic"
    with pytest.raises(UserError, match="the judge topic cannot read"):
        check()
    config.eval.judges = "keywords"
    check()
    config.data.material, config.calibrate.judge = "paper", "topic"
    with pytest.raises(UserError, match=r"the judge topic reads .* data\.material=paper has none"):
        check()


def test_the_peak_of_memory_is_in_bytes(run, calls, monkeypatch, tmp_path):
    """getrusage counts kibibytes, on macOS bytes."""
    usage = types.SimpleNamespace(ru_maxrss=5 << 10)
    monkeypatch.setattr(pipeline.resource, "getrusage", lambda _: usage)
    for system, peak in (("linux", 5 << 20), ("darwin", 5 << 10)):
        monkeypatch.setattr("sys.platform", system)
        run(["evaluate"])
        assert read_json(tmp_path / "w" / "results.json")["peak_memory_bytes"] == peak
