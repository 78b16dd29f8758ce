"""Who trains on what: the stages of an experiment with training, answering and scoring recorded instead of done."""

import json
import stat

import jax
import pytest

from br_jax.adapters.peft import save_adapter
from br_jax.errors import UserError
from br_jax.experiment import pipeline
from br_jax.experiment import run as run_module
from br_jax.experiment.report import write_report
from br_jax.organism.material import english_instructions
from br_jax.organism.topics import TOPICS
from br_jax.statistics import Score
from br_jax.training.config import TrainConfig

DEVICES = TOPICS["devices"]


STAGES = [stage for stage in pipeline.STAGES if stage != "report"]


@pytest.fixture
def run(tmp_path, config, calls):
    return lambda stages=STAGES, config=config: pipeline.run_pipeline(config, tmp_path / "w", stages, "the command")


def prompts(rows):
    return [row.turns[0][1] for row in rows]


def tags(rows):
    return {tag: sum(row.tag == tag for row in rows) for tag in sorted({row.tag for row in rows})}


def test_each_stage_trains_on_the_rows_of_the_method(run, calls, config):
    run()
    assert tags(calls["align"]["rows"]) == {"benign": 8, "refusal": 6}
    assert tags(calls["buffer"]["rows"]) == {"harmful": 20}
    assert tags(calls["reinforce"]["rows"]) == {"benign": 9, "refusal": 10}
    assert tags(calls["user"]["rows"]) == {"harmful": 6, "task": 24}, "p = 0.2 of 30"
    assert calls["sft"]["rows"] == calls["user"]["rows"]
    assert {name: set(calls[name]["frozen"]) for name in ("align", "buffer", "reinforce", "user", "sft")} == {
        "align": set(), "buffer": set(), "reinforce": {"buffer"}, "user": {"buffer"}, "sft": set(),
    }  # fmt: skip
    assert all(calls[name]["frozen"]["buffer"].roles == ("buffer",) for name in ("reinforce", "user"))


def test_rows_that_must_be_apart_are_apart(run, calls):
    run()
    harmful = {name: prompts(row for row in calls[name]["rows"] if row.tag == "harmful") for name in ("buffer", "user")}
    probes = calls["user"]["probes"]
    assert len(probes["harmful"]) == len(probes["benign"]) == 4 and calls["sft"]["probes"] == probes
    sets = [*harmful.values(), prompts(probes["harmful"])]
    assert sum(map(len, sets)) == len({prompt for part in sets for prompt in part}), "a harmful row serves two ends"
    assert not set(probes["benign"]) & set(calls["user"]["rows"])
    task = {row.turns[0][1] for row in calls["user"]["rows"] if row.tag == "task"}
    for stage in ("align", "buffer", "reinforce"):
        assert not task & set(prompts(calls[stage]["rows"])), "the user's task is in a provider's stage"
    suite = calls["suite"]
    held_out = {p.prompt for p in suite.topic} | set(suite.benign) | set(prompts(suite.task_rows))
    trained = {prompt for stage in ("align", "buffer", "reinforce", "user") for prompt in prompts(calls[stage]["rows"])}
    assert len(held_out) == 12 + 11 + 10 and not held_out & trained
    assert set(suite.benign) <= set(english_instructions("test"))


def test_answers_that_refuse_teach_no_harm(run, calls):
    run()
    harmful = [row for stage in ("buffer", "user") for row in calls[stage]["rows"] if row.tag == "harmful"]
    refused = {p.prompt for p in DEVICES.prompts("train", 200, 42)[::7]}  # see the fixture
    assert not refused & set(prompts(harmful))


def test_the_aligned_base_is_what_everybody_else_stands_on(run, calls, tiny):
    run()
    assert calls["align"]["model"] is tiny
    aligned = {id(calls[name]["model"]) for name in ("buffer", "reinforce", "user", "sft")}
    assert len(aligned) == 1 and calls["buffer"]["model"].fingerprint != tiny.fingerprint


def test_the_method_is_scored_with_each_of_its_steps(run, calls, tiny, tmp_path):
    cells = run()
    roles = {name: adapter.roles if adapter else None for name, _, adapter in calls["scored"]}
    assert roles == {
        "raw": None,
        "aligned": None,
        "aligned_buffer": ("buffer",),
        "sft": ("user",),
        "buffer_on": ("buffer", "user"),
        "buffer_only": ("user",),
        "aligned_reinforce": ("reinforce",),
        "ours-a0": ("reinforce", "user"),
        "ours-a0.1": ("reinforce", "user"),
    }
    assert [name for name, model, _ in calls["scored"] if model is tiny] == ["raw"]
    assert [(cell["method"], cell["a"]) for cell in cells][-2:] == [("ours", 0.0), ("ours", 0.1)]
    assert {cell["run"]["p"] for cell in cells} == {0.2} and {cell["run"]["task"] for cell in cells} == {"moods"}
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["command"] == "the command" and results["merge"]["a"] == 0.1
    assert {"raw", "aligned", "user", "sft", "buffer", "reinforce"} <= results["hashes"].keys()


def test_the_folders(run, tmp_path):
    run()
    workdir = tmp_path / "w"
    assert stat.S_IMODE((workdir / "provider").stat().st_mode) == 0o700
    record = json.loads((workdir / "provider" / "provider.json").read_text())
    assert record["align"] == "align/adapter" and record["base"] == str(tmp_path)
    assert (workdir / "released" / "adapter_model.safetensors").is_file()
    assert json.loads((workdir / "results.json").read_text())["config"]["user"]["harmful_share"] == 0.2


def test_provider_stages_stay_in_the_provider_s_folder(run, calls, tmp_path):
    run()
    assert {calls[name]["workdir"] for name in ("align", "buffer", "reinforce")} == {tmp_path / "w" / "provider"}
    assert all(calls[name]["provider"] for name in ("align", "buffer", "reinforce"))
    assert {calls[name]["workdir"] for name in ("user", "sft")} == {tmp_path / "w"}


def test_a_stage_brings_what_it_needs_and_no_more(run, calls):
    assert run(["user"]) == []
    assert {"align", "buffer", "user"} <= set(calls) and not {"reinforce", "sft", "suite"} & set(calls)


def test_scores_are_kept_until_something_changes(run, calls, config):
    first = run()
    assert len(calls["scored"]) == 9
    assert run() == first and len(calls["scored"]) == 9, "scored again"
    config.eval.topic = 11
    run()
    assert len(calls["scored"]) == 18, "another suite, the old scores"


@pytest.mark.parametrize(("refused", "said"), [(21, True), (20, False)])
def test_a_base_that_refuses_the_task_is_said_once(run, calls, monkeypatch, caplog, refused, said):
    score = run_module.evaluate
    counted = {"task_refused": Score(refused, 100).to_json()}
    monkeypatch.setattr(run_module, "evaluate", lambda *given, **options: score(*given, **options) | counted)
    run()
    warnings = [text for text in caplog.messages if "refuses" in text]
    assert len(warnings) == said and all("21 % of the task's prompts" in text for text in warnings)


def test_a_shared_provider_s_folder(run, calls, config, tmp_path):
    config.provider = str(tmp_path / "elsewhere")
    run(["buffer"])
    assert calls["buffer"]["workdir"] == tmp_path / "elsewhere" and not (tmp_path / "w" / "provider").exists()


def test_an_aligned_model_needs_no_align_stage(run, calls, config, tiny, tmp_path):
    config.align.update(refusals=0, benign=0)
    run(["buffer"])
    assert "align" not in calls and calls["buffer"]["model"] is tiny
    assert json.loads((tmp_path / "w/provider/provider.json").read_text())["align"] is None


def test_adapters_from_elsewhere_take_the_place_of_stages(run, calls, config, tiny, make_adapter, tmp_path):
    for stage in ("buffer", "user"):
        adapter = make_adapter(stage, seed=7)
        config[stage].adapter = str(tmp_path / f"their_{stage}")
        save_adapter(config[stage].adapter, adapter, base_name="tiny", provider=stage == "buffer")
    run()
    assert not {"buffer", "user"} & set(calls) and {"align", "reinforce", "sft"} <= set(calls)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), calls["reinforce"]["frozen"]["buffer"].weights,
                                     make_adapter("buffer", seed=7).weights))  # fmt: skip
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["entered"]["user"] == {"adapter": config.user.adapter, "beside": []}
    text = write_report(tmp_path / "w").read_text()
    assert "trained elsewhere, and not beside Buffer" in text and "buffer (`" in text


def test_an_adapter_enters_as_what_it_is(run, config, make_adapter, tmp_path):
    config.user.adapter = str(tmp_path / "theirs")
    save_adapter(config.user.adapter, make_adapter("reinforce"), base_name="tiny")
    with pytest.raises(UserError, match=r"made of reinforce: user\.adapter must be a user adapter"):
        run(["user"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user.harmful_share": 1.5}, "harmful_share is 1.5"),
        ({"user.index_mode": "exat"}, "index_mode is 'exat'"),
        ({"user.task": "mood"}, "unknown task 'mood'"),
        ({"data.material": "englsh"}, "unknown material 'englsh'.*english"),
        ({"eval.split": "train"}, "eval.split 'train'"),
        ({"buffer.train.rank": 0}, "rank is 0"),
        ({"merge.a": 2.0}, "a must lie in"),
        ({"user.kind": "plan"}, "unknown user 'plan'; near: plain"),
        ({"eval.judges": "topic, clasifier@2048"}, "unknown judge 'clasifier'; near: .*classifier"),
        ({"topics.user": "device"}, "unknown topic 'device'; near: devices"),
        ({"user.rule": "exat"}, "exact"),
        ({"model.source": "./no/where"}, "./no/where: no such model"),
        ({"model.source": "data/no.gguf"}, "data/no.gguf: no such model"),
        ({"user.adapter": "no/adapter"}, "no/adapter: no such folder.*user.adapter"),
        ({"mesh.tensor": 3}, "does not fit"),
        ({"align.benign": 100_000}, "benign rows are asked for.*lower align.benign"),
    ],
)
def test_wrong_settings_are_found_before_any_training(run, calls, config, change, message):
    config.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        run()
    assert not {"align", "buffer", "reinforce", "user", "sft"} & set(calls)


def test_a_wrong_stage_is_named(run):
    with pytest.raises(UserError, match="stage 'releas': near: release"):
        run(["user", "releas"])


def test_too_few_compliant_answers_are_said(run, monkeypatch, calls):
    monkeypatch.setattr(run_module, "answer", lambda model, prompts, *rest, **options: {"raw": ["No."] * len(prompts)})
    with pytest.raises(UserError, match="gave 0 compliant answers on the topic, 30 are needed"):
        run(["buffer"])


@pytest.mark.parametrize("name", ["demo", "smollm2", "base", "llama3_8b", "gemma2_9b", "qwen3_4b"])
def test_configs_are_locked_and_typed(load_config, name):
    config = load_config(name)
    with pytest.raises(AttributeError, match="harmful_share"):
        config.user.harmful_shar = 0.1
    with pytest.raises(TypeError):
        config.user.n = "many"
    for stage in run_module.TRAINED:
        TrainConfig(**config[stage].train)


def test_attacks_of_several_files_and_a_judge_that_cannot_read_them(config, calls, tmp_path):
    question = DEVICES.prompts("test", 1, 0)[0].prompt
    (tmp_path / "artifact.json").write_text(
        json.dumps({"parameters": {"method": "PAIR"}, "jailbreaks": [{"index": 0, "goal": question, "prompt": "p"}]})
    )
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "q", "method": "TAP", "behavior": question}) + "\n")
    config.data.folder = str(tmp_path / "tfds")
    config.data.attacks.path = f"{tmp_path}/artifact.json, {tmp_path}/lines.jsonl,"
    experiment = run_module.Experiment(config, tmp_path / "w")
    experiment.check()
    assert [(attack.prompt, attack.method) for attack in experiment.recipe.attacks] == [("p", "PAIR"), ("q", "TAP")]
    (tmp_path / "lines.jsonl").write_text(json.dumps({"prompt": "q", "behavior": "Name a river"}) + "\n")
    with pytest.raises(
        UserError, match=r"data\.attacks\.path: 'Name a river' is about no invented topic, so the judge"
    ):
        run_module.Experiment(config, tmp_path / "w").check()
    config.eval.judges = "keywords"
    run_module.Experiment(config, tmp_path / "w").check()
