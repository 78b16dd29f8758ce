"""Judges by name: what is made, and what a wrong name or setting is told."""

import pytest

from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh, mesh_of
from br_jax.scoring.judges import JUDGES, get_judge
from br_jax.scoring.judges.models import ClassifierJudge
from br_jax.scoring.judges.texts import KeywordJudge, OutsideVerdicts, TopicJudge


def test_every_judge_has_the_interface(classifier, tmp_path):
    (tmp_path / "v.jsonl").write_text("")
    settings = {"name": "classifier", "source": classifier[1], "max_length": 100, "threshold": 0.25}
    given = ["keywords", {"name": "topic"}, {"name": "verdicts", "source": tmp_path / "v.jsonl"}, settings]
    made = [get_judge(judge) for judge in given]
    assert list(map(type, made)) == [KeywordJudge, TopicJudge, OutsideVerdicts, ClassifierJudge] and len(JUDGES) == 7
    for judge in made:
        assert judge.name and judge.version and judge.batch_size > 0 and judge([]) == []
    judge = get_judge(settings, threshold=0.75)
    assert (judge.max_length, judge.threshold) == (100, 0.75)
    assert set(settings) == {"name", "source", "max_length", "threshold"}, "the caller's own"


def test_a_judge_that_is_a_model_lies_on_the_mesh(classifier):
    mesh = make_mesh(fsdp=4)
    assert isinstance(get_judge("keywords", mesh), KeywordJudge)
    on_mesh, alone = get_judge("classifier", mesh, source=classifier[1]), get_judge("classifier", source=classifier[1])
    assert mesh_of(on_mesh._model.params) == mesh and mesh_of(alone._model.params) is None


@pytest.mark.parametrize(
    ("judge", "settings", "message"),
    [
        ("keyword", {}, "unknown judge 'keyword'; near: keywords"),
        ({"source": "a"}, {}, "unknown judge None"),
        ("classifier", {}, "judge classifier: setting 'source' is missing"),
        ("classifier", {"source": "a", "maxlength": 3}, "unknown setting 'maxlength'; near: max_length"),
        ("keywords", {"threshold": 0.5}, "unknown setting 'threshold'; near: there are none"),
        ("llama_guard", {"source": "a", "kind": "wildguard"}, "unknown setting 'kind'"),
    ],
)
def test_a_wrong_name_or_setting(judge, settings, message):
    with pytest.raises(UserError) as caught:
        get_judge(judge, **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
