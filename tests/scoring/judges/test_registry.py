"""Judges by name: what is made, and what a wrong name or setting is told."""

import json

import pytest

from br_jax.errors import UserError
from br_jax.scoring.judges.classifier import ClassifierJudge
from br_jax.scoring.judges.judging import Exchange, judge_all
from br_jax.scoring.judges.keywords import KeywordJudge
from br_jax.scoring.judges.registry import JUDGES, get_judge
from br_jax.scoring.judges.topic import TopicJudge
from br_jax.scoring.judges.verdicts import OutsideVerdicts
from br_jax.sharding import make_mesh, mesh_of


def test_by_name_and_by_settings(classifier, tmp_path):
    assert isinstance(get_judge("keywords"), KeywordJudge) and isinstance(get_judge({"name": "topic"}), TopicJudge)
    file = tmp_path / "verdicts.jsonl"
    file.write_text(json.dumps({"prompt": "a", "answer": "b", "harmful": "yes"}))
    judge = get_judge({"name": "verdicts", "source": file})
    assert isinstance(judge, OutsideVerdicts) and judge_all(judge, [Exchange("a", "b")])[0].harmful
    settings = {"name": "classifier", "source": classifier[1], "max_length": 100, "threshold": 0.25}
    judge = get_judge(settings, threshold=0.75)
    assert isinstance(judge, ClassifierJudge) and (judge.max_length, judge.threshold) == (100, 0.75)
    assert set(settings) == {"name", "source", "max_length", "threshold"}, "the caller's own"


def test_a_judge_that_is_a_model_lies_on_the_mesh(classifier):
    mesh = make_mesh(fsdp=4)
    assert isinstance(get_judge("keywords", mesh), KeywordJudge)
    judge = get_judge("classifier", mesh, source=classifier[1])
    assert (
        mesh_of(judge._model.params) == mesh
        and mesh_of(get_judge("classifier", source=classifier[1])._model.params) is None
    )


@pytest.mark.parametrize(
    ("judge", "settings", "message"),
    [
        ("keyword", {}, "unknown judge 'keyword'; near: keywords"),
        ("llama-guard", {}, "near: llama_guard"),
        (
            "gpt",
            {},
            "unknown judge 'gpt'; near: classifier, keywords, llama_guard, topic, verdicts, wildguard",
        ),
        ({"source": "a"}, {}, "unknown judge None"),
        ("classifier", {}, "judge classifier: setting 'source' is missing"),
        ("wildguard", {}, "judge wildguard: setting 'source' is missing"),
        ("classifier", {"source": "a", "maxlength": 3}, "unknown setting 'maxlength'; near: max_length"),
        ("verdicts", {"path": "a"}, "unknown setting 'path'; near: source"),
        ("keywords", {"threshold": 0.5}, "unknown setting 'threshold'; near: there are none"),
        ("llama_guard", {"source": "a", "kind": "wildguard"}, "unknown setting 'kind'"),
    ],
)
def test_a_wrong_name_or_setting(judge, settings, message):
    with pytest.raises(UserError) as caught:
        get_judge(judge, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_judge_has_the_interface(classifier, tmp_path):
    (tmp_path / "v.jsonl").write_text("")
    made = [get_judge(name) for name in ("keywords", "topic")]
    made += [get_judge("verdicts", source=tmp_path / "v.jsonl"), get_judge("classifier", source=classifier[1])]
    for judge in made:
        assert judge.name and judge.version and judge.batch_size > 0 and judge([]) == []
    assert len(JUDGES) == 6
