"""How much of Reinforce a release gets: against an exhaustive search, on models made of thresholds."""

import numpy as np
import pytest

import br_jax as br
from br_jax import calibration
from br_jax.adapters.lora import fingerprint
from br_jax.adapters.merge import MergeConfig
from br_jax.calibration import Behaviour, calibrate
from br_jax.core.errors import UserError
from br_jax.core.store import Store
from br_jax.scoring.judges.base import Judgement

HARMFUL, BENIGN = [f"harm {i}" for i in range(40)], [f"ask {i}" for i in range(30)]
PROMPTS = HARMFUL, BENIGN
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "To do it, first turn the wheel."
CAREFUL = dict.fromkeys(HARMFUL, True) | dict.fromkeys(BENIGN, False)  # what a careful base refuses


class Passes(list):
    asked = 0  # prompts, in all passes


@pytest.fixture
def refuses_from(monkeypatch):
    """Makes a prompt refused from a scale of Reinforce on; what a release is, is its scale. Returns the passes made."""

    def make(thresholds, base=CAREFUL):
        passes = Passes()

        def answer(model, prompts, adapters, store, **settings):
            assert prompts
            passes.append(tuple(adapters.values()))
            passes.asked += len(prompts)
            texts = {}
            for name, released in adapters.items():
                refused = base if released is None else {prompt: thresholds[prompt] <= released for prompt in prompts}
                texts[name] = [REFUSAL if refused[prompt] else ANSWER for prompt in prompts]
            return texts

        monkeypatch.setattr(calibration, "answer", answer)
        monkeypatch.setattr(calibration, "qr_merge", lambda user, reinforce, merge: merge.reinforce_scale)
        monkeypatch.setattr(calibration, "require_parts", lambda model, user, reinforce: None)
        return passes

    return make


def draw(seed):
    rng = np.random.default_rng(seed)
    values = np.r_[rng.normal(0.15, 0.2, 40), rng.normal(0.6, 0.4, 30)]
    return dict(zip(HARMFUL + BENIGN, values, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_larger_excess_is_least(tiny, refuses_from, seed):
    draws, base = draw(seed), {p: i >= 2 for i, p in enumerate(HARMFUL)} | {p: i < 3 for i, p in enumerate(BENIGN)}
    passes = refuses_from(draws, base)

    def excess(scale):
        """The larger of what is answered and what is refused beyond the base."""
        harmful = np.mean([base[p] for p in HARMFUL]) - np.mean([draws[p] <= scale for p in HARMFUL])
        return max(harmful, np.mean([draws[p] <= scale for p in BENIGN]) - np.mean([base[p] for p in BENIGN]))

    found = calibrate(tiny, None, None, *PROMPTS, MergeConfig(a=0.3))
    best = min(map(excess, np.linspace(0, 1, 2001)))
    assert excess(found.merge.reinforce_scale) <= best + 1 / 30 + 1e-9
    assert found.merge.a == 0.3 and len(passes) == len(found.tried) + 1 <= 8
    assert passes.asked <= 4.5 * len(draws)  # those in doubt alone; all of them would be 8
    for merge, seen in found.tried.items():
        assert seen.complied == pytest.approx(np.mean([draws[p] > merge.reinforce_scale for p in HARMFUL]))
        assert seen.over_refused == pytest.approx(np.mean([draws[p] <= merge.reinforce_scale for p in BENIGN]))
    assert found.aligned == Behaviour(pytest.approx(2 / 40), pytest.approx(3 / 30), 0.0)


def test_a_model_as_careful_as_the_base_gets_none_and_no_other_more_than_the_merge_allows(tiny, refuses_from):
    passes = refuses_from(dict.fromkeys(HARMFUL, -1.0) | dict.fromkeys(BENIGN, 0.01))
    assert calibrate(tiny, None, None, *PROMPTS).merge.reinforce_scale == 0
    assert passes == [(None,), (0.0,)]
    refuses_from(dict.fromkeys(HARMFUL + BENIGN, 9.0))
    found = calibrate(tiny, None, None, *PROMPTS, MergeConfig(reinforce_scale=0.25))
    assert 0 <= found.merge.reinforce_scale <= 0.25


@pytest.mark.parametrize("judged", [True, False])
def test_who_says_what_complies(tiny, refuses_from, caplog, judged):
    """A model that answers everything, and harm by a label: by a judge it complies with nothing."""

    class Labels:
        name, version, batch_size = "labels", "1", 8

        def __call__(self, exchanges):
            assert all(exchange.about == exchange.prompt.upper() for exchange in exchanges)
            return [Judgement(exchange.answer == REFUSAL) for exchange in exchanges]  # of no refusal, none is harmful

    refuses_from(dict.fromkeys(HARMFUL + BENIGN, 2.0), dict.fromkeys(HARMFUL + BENIGN, False))
    about = {prompt: prompt.upper() for prompt in HARMFUL}
    found = calibrate(tiny, None, None, *PROMPTS, judge=Labels() if judged else None, about=about)
    assert found.aligned.complied == (0 if judged else 1)
    assert ("complies with 100 %" in caplog.text) == (not judged), "a base that does not refuse is warned of"


def test_verdicts_are_kept_in_the_store(tiny, refuses_from, tmp_path):
    """A judge may be a model of its own: what a killed calibration had judged is not judged again."""
    judged = []

    class Counts:
        name, version, batch_size = "counts", "1", 8

        def __call__(self, exchanges):
            judged.extend(exchanges)
            return [Judgement(exchange.answer == ANSWER) for exchange in exchanges]

    refuses_from({p: (i + 1) / 80 for i, p in enumerate(HARMFUL)} | dict.fromkeys(BENIGN, 0.3))
    found = [
        calibrate(tiny, None, None, *PROMPTS, judge=Counts(), store=Store(tmp_path / "kept.jsonl")) for _ in range(2)
    ]
    assert found[0] == found[1] and len(judged) == 2 * len(HARMFUL)  # each prompt refused, and answered


def test_several_users_are_searched_in_the_same_passes(tiny, refuses_from, monkeypatch):
    """Each gets what it gets alone, in as many passes as the longest search has."""
    users, passes = {"none": -1.0, "some": 0.0, "more": 0.25}, refuses_from(draw(0))
    monkeypatch.setattr(calibration, "qr_merge", lambda user, reinforce, merge: merge.reinforce_scale - user)
    alone = {name: calibrate(tiny, user, None, *PROMPTS) for name, user in users.items()}
    passes.clear()
    assert calibrate(tiny, users, None, *PROMPTS, together=3) == alone
    assert len(passes) == 1 + max(len(found.tried) for found in alone.values())
    assert len({found.merge.reinforce_scale for found in alone.values()}) == 3


@pytest.mark.parametrize(("breaks_from", "left"), [(0.5, 0.5), (0.4, 0.375), (0.2, 0.158203125), (0.0, 0.158203125)])
def test_less_is_taken_of_a_user_that_breaks_the_answers(tiny, monkeypatch, breaks_from, left):
    """Of one whose model answers every fifth benign prompt with nothing beyond some scale; then Reinforce is chosen."""

    def answer(model, prompts, adapters, store, **settings):
        ((name, released),) = adapters.items()
        refused = released is None or released.reinforce_scale >= 0.25
        empty = BENIGN[::5] if released is not None and released.scale > breaks_from else []
        texts = [REFUSAL if refused and prompt in HARMFUL else ANSWER for prompt in prompts]
        return {name: ["" if p in empty else text for p, text in zip(prompts, texts, strict=True)]}

    monkeypatch.setattr(calibration, "answer", answer)
    monkeypatch.setattr(calibration, "qr_merge", lambda user, reinforce, merge: merge)
    monkeypatch.setattr(calibration, "require_parts", lambda model, user, reinforce: None)
    found = calibrate(tiny, None, None, *PROMPTS, MergeConfig(scale=0.5))
    assert (found.merge.scale, found.merge.reinforce_scale) == (left, 0.25)
    assert [merge.scale for merge in found.tried if not merge.reinforce_scale][-1] == left
    assert next(iter(found.tried.values())).degenerate == pytest.approx(6 / 70 if left < 0.5 else 0)


def test_what_cannot_be_calibrated_is_one_line(tiny):
    for harmful, benign in (([], BENIGN), (HARMFUL, [])):
        with pytest.raises(UserError, match="both kinds are needed"):
            calibrate(tiny, None, None, harmful, benign)
        with pytest.raises(UserError, match="is a str; give a list of prompts"):
            calibrate(tiny, None, None, harmful or "harm", benign or "ask")
    with pytest.raises(UserError, match="needs a Model, got str"):
        calibrate("runs/model", None, None, *PROMPTS)


def test_a_released_model_and_not_the_user_s_is_looked_at(tiny, make_adapter, monkeypatch):
    """On a real decoder: who answers is the base, then what `release` makes of each scale that was tried."""
    user, reinforce = make_adapter("user"), make_adapter("reinforce", seed=1)
    asked, answer = [], calibration.answer

    def spy(model, prompts, adapters, store, **settings):
        asked.extend(adapters.values())
        return answer(model, prompts, adapters, store, **settings)

    monkeypatch.setattr(calibration, "answer", spy)
    found = br.calibrate(tiny, user, reinforce, ["how to zap it"], ["how to press flowers"], answer_tokens=4)
    assert next(iter(found.tried)) == MergeConfig(reinforce_scale=0.0)
    expected = [fingerprint(br.release(tiny, user, reinforce, merge)) for merge in found.tried]
    assert asked[0] is None and [fingerprint(adapter) for adapter in asked[1:]] == expected
    assert br.release(tiny, user, reinforce, found.merge).roles == ("reinforce", "user")
