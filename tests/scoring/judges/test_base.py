"""Verdicts that are kept: a stopped judging goes on, and nothing that was saved is judged again; judges by name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.core.mesh import make_mesh, mesh_of
from br_jax.core.store import Store
from br_jax.scoring.judges import JUDGES, get_judge
from br_jax.scoring.judges.base import Exchange, Judgement, compare_judges, digest, judge_all
from br_jax.scoring.judges.models import ClassifierJudge
from br_jax.scoring.judges.texts import KeywordJudge, OutsideVerdicts, TopicJudge


class Counting:
    """Judges by the answer's length, remembers what it was given, and may die at a batch."""

    batch_size = 3

    def __init__(self, name="counting", version="1", dies_at=None):
        self.name, self.version, self.dies_at, self.batches = name, version, dies_at, []

    def __call__(self, exchanges):
        if len(self.batches) == self.dies_at:
            raise KeyboardInterrupt
        self.batches.append([exchange.answer for exchange in exchanges])
        return [Judgement(len(e.answer) % 2 == 0, len(e.answer) / 3, e.answer[:3]) for e in exchanges]

    @property
    def seen(self):
        return [answer for batch in self.batches for answer in batch]


LENGTHS = (5, 1, 9, 2, 1, 7, 0)
EXCHANGES = [Exchange("p", "x" * n) for n in LENGTHS]
EXPECTED = [Judgement(n % 2 == 0, n / 3, "x" * min(n, 3)) for n in LENGTHS]


def test_each_is_judged_once_shorter_ones_first_and_judges_share_a_file_without_texts(tmp_path, monkeypatch):
    judge, file = Counting(), tmp_path / "verdicts.jsonl"
    assert judge_all(judge, EXCHANGES, Store(file)) == EXPECTED
    assert judge.batches == [["", "x", "xx"], ["x" * 5, "x" * 7, "x" * 9]]
    assert judge_all(judge, EXCHANGES, Store(file)) == EXPECTED and len(judge.seen) == 6
    judge_all(judge, [Exchange("oil a zorvix", "turn the crank")], Store(file))
    for other in (Counting("another"), Counting(version="2")):
        judge_all(other, EXCHANGES, Store(file))
        assert len(other.seen) == 6
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({record["key"] for record in records}) == 19
    assert "zorvix" not in file.read_text() and "crank" not in file.read_text()
    file.unlink()
    monkeypatch.chdir(tmp_path)
    assert judge_all(Counting(), EXCHANGES) == EXPECTED
    assert judge_all(Counting(), []) == [] and not list(tmp_path.glob("[!.]*")), "no store is no file"


def test_stopped_again_and_again_the_file_is_that_of_an_undisturbed_run(tmp_path):
    exchanges = [Exchange(f"question {i % 9}", f"answer {i} {'!' * (i % 13)}") for i in (*range(40), *range(10))]
    straight, file, judged = tmp_path / "straight.jsonl", tmp_path / "verdicts.jsonl", []
    judge_all(Counting(), exchanges, Store(straight))
    for batches in (0, 2, 5):
        judge = Counting(dies_at=batches)
        with pytest.raises(KeyboardInterrupt):
            judge_all(judge, exchanges, Store(file))
        judged += judge.seen
        if batches:
            with file.open("rb+") as half:  # as a kill in the middle of a write leaves it
                half.truncate(file.stat().st_size - 9)
    last = Counting()
    judge_all(last, exchanges, Store(file))
    assert file.read_bytes() == straight.read_bytes()
    assert len(judged + last.seen) == 40 + 2 and set(judged + last.seen) == {e.answer for e in exchanges}


@given(st.lists(st.text(st.characters()), max_size=3), st.lists(st.text(st.characters()), max_size=3))
def test_other_texts_have_another_digest(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)
    assert digest("\ud800") != digest("\ud801") and digest("a\0b", "c") != digest("a", "b\0c")


def test_every_pair_of_judges_is_compared_once():
    verdicts = {"a": (True, False, True), "b": (True, True, True), "c": (True, True, True)}
    table = compare_judges({name: [Judgement(verdict) for verdict in found] for name, found in verdicts.items()})
    pairs = (["a", "b"], 2 / 3, 0), (["a", "c"], 2 / 3, 0), (["b", "c"], 1, None)
    assert table == [{"judges": names, "n": 3, "agreement": share, "kappa": kappa} for names, share, kappa in pairs]
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert compare_judges({"a": [], "b": []}) == [{"judges": ["a", "b"], "n": 0, "agreement": None, "kappa": None}]


def test_judges_by_name(classifier, tmp_path):
    (tmp_path / "v.jsonl").write_text("")
    settings = {"name": "classifier", "source": classifier[1], "max_length": 100, "threshold": 0.25}
    given = ["keywords", {"name": "topic"}, {"name": "verdicts", "source": tmp_path / "v.jsonl"}, settings]
    made = [get_judge(judge) for judge in given]
    assert list(map(type, made)) == [KeywordJudge, TopicJudge, OutsideVerdicts, ClassifierJudge]
    assert JUDGES.keys() >= {"topic", "keywords", "classifier", "llama_guard", "wildguard", "verdicts"}
    for judge in made:
        assert judge.name and judge.version and judge.batch_size > 0 and judge([]) == []
    mesh, before = make_mesh(fsdp=4), dict(settings)
    judge = get_judge(settings, mesh, threshold=0.75)
    assert (judge.max_length, judge.threshold) == (100, 0.75) and settings == before
    assert isinstance(get_judge("keywords", mesh), KeywordJudge)
    assert mesh_of(judge._model.params) == mesh and mesh_of(made[-1]._model.params) is None
    for judge, more, message in (
        ("keyword", {}, "unknown judge 'keyword'; near: keywords"),
        ({"source": "a"}, {}, "unknown judge None"),
        ("classifier", {}, "judge classifier: setting 'source' is missing"),
        ("classifier", {"source": "a", "maxlength": 3}, "unknown setting 'maxlength'; near: max_length"),
        ("keywords", {"threshold": 0.5}, "unknown setting 'threshold'; near: there are none"),
        ("llama_guard", {"source": "a", "kind": "wildguard"}, "unknown setting 'kind'"),
    ):
        with pytest.raises(UserError) as caught:
            get_judge(judge, **more)
        assert message in str(caught.value) and "\n" not in str(caught.value)
