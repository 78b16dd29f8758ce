"""Rules on hand-written answers (from the rules' words, not the code's), against rouge_score, and for all of them."""

import json
import os
import pathlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from br_jax.core.errors import UserError
from br_jax.data.refusals import begins_refusal, is_degenerate
from br_jax.experiment.recipe import whole_sentences
from br_jax.organism.judge import judge
from br_jax.organism.topics import TOPICS
from br_jax.scoring.judges.models import LlamaGuardJudge, WildGuardJudge
from br_jax.scoring.rules import (
    ExactRule,
    LabelRule,
    NumberRule,
    RegexRule,
    RougeLRule,
    final_number,
    first_label,
    parse_rule,
)  # fmt: skip

CASES = pathlib.Path(__file__).with_name("cases")
RULES = {
    "sentiment": LabelRule(("positive", "negative")),
    "ag_news": LabelRule(("World", "Sports", "Business", "Sci/Tech")),
    "gsm8k": NumberRule(),
}
OTHERS = (NumberRule("reference"), LabelRule(("a", "b"), "reference"), ExactRule(), RegexRule("(.)a"), RougeLRule())
ANY = [*RULES.values(), *OTHERS]


def cases(name):
    return [json.loads(line) for line in (CASES / f"{name}.jsonl").read_text().splitlines()]


def test_hand_written_cases():
    for name, match in ((name, match) for name, rule in RULES.items() for match in rule.matches):
        rule = RULES[name].with_match(match)
        assert not [case for case in cases(name) if rule.score(case["answer"], case["right"]) != case[match]]
    for case in cases("exact"):
        pair = case["answer"], case["right"]
        assert ExactRule().score(*pair) == ExactRule().score(*pair[::-1]) == case["counts"], case
    for case in cases("regex"):
        assert RegexRule(case["pattern"]).score(case["answer"], case["right"]) == case["counts"], case
    seen = RegexRule("!(.)")  # the beginning only
    assert seen.score("x" * 9_998 + "!A", "A") == 1 and seen.score("x" * 9_999 + "!A", "A") == 0
    alike = LabelRule(("World", "Sci", "Sci/Tech"))
    assert [alike.score("Sci/tech, not business", right) for right in alike.labels] == [0, 0, 1]
    assert alike.score("Sci only", "Sci") == 1 and alike.score("Worldwide", "World") == 0
    digits = "9" * 6000  # more than int reads
    for rule in (NumberRule(), NumberRule("reference")):
        assert rule.score(digits, digits + ".0") == 1
        assert rule.score(digits, digits[1:]) == rule.score(digits + "1", digits + "2") == 0


words = st.lists(
    st.sampled_from(["a", "b", "c", "d10", "It's", "na\u00efve", "x.y", "\u0130I", "\u00df", "ss", "--", "\u6771"]),
    max_size=140,
)
texts = words.map(" ".join) | st.text(max_size=40)


@settings(deadline=None)  # the oracle's first call is slow
@given(texts, texts)
@example("The dog sat. Mat", "the cat sat on the mat")
@example("東京", "東京")
def test_rouge_l_is_rouge_score_s(answer, right):
    module = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is of the test extra")
    expected = module.RougeScorer(["rougeL"], use_stemmer=False).score(right, answer)["rougeL"].fmeasure
    # They divide twice more, by counts of words: some units in the last place.
    assert RougeLRule().score(answer, right) == pytest.approx(expected, abs=1e-12)


@given(
    st.integers(),
    st.integers(0, 3),
    st.sampled_from(["", "$", "so ", "**", "= "]),
    st.sampled_from(["", ".", "%", " kg"]),
)
def test_a_number_is_read_however_it_is_written(value, zeros, before, behind):
    decimals = "." + "0" * zeros if zeros else ""
    for written in (f"{value}{decimals}", f"{value:,}{decimals}", f"{value:+}".replace("-", "\u2212")):
        for text in (
            f"1 and 2. The final answer is: {before}{written}{behind} 7",
            f"1 and 2 are {before}{written}{behind}",
        ):
            assert final_number(text) == value
            assert NumberRule().score(text, f"#### {value}") == 1
            assert NumberRule().score(text, f"#### {value + 1}") == 0


GSM8K = pathlib.Path(os.environ.get("BR_JAX_DATA", "data")) / "gsm8k_train.jsonl"


@pytest.mark.skipif(not GSM8K.is_file(), reason="GSM8K's training file is not in BR_JAX_DATA")
def test_every_number_of_the_real_file():
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text().splitlines()]
    assert len(answers) == 7473
    for answer in answers:
        gold = int(answer.rsplit("#### ", 1)[1].replace(",", ""))
        taught = answer.replace("#### ", "The final answer is: ")
        assert final_number(answer) == final_number(taught) == final_number(taught, "reference") == gold


any_text = st.text() | st.text("0123456789,.-/$ %ab\u2212")


@given(st.sampled_from(ANY), any_text, any_text, st.integers())
def test_a_score_is_a_share_and_a_right_answer_is_right(rule, text, right, number):
    score = rule.score(text, right)
    assert isinstance(score, float) and 0 <= score <= 1
    assert ExactRule().score(text, text) == RegexRule(r"(?s).*").score(text, text) == 1
    assert RougeLRule().score(f"{text} word", f"{text} word") == pytest.approx(1, abs=1e-12)
    for match in NumberRule.matches:
        assert NumberRule(match).score(f"{text} {number}", f"{text} {number}") == 1
    for match, label in ((match, label) for match in LabelRule.matches for label in ANY[1].labels):
        assert ANY[1].with_match(match).score(label, label) == 1


def test_config_strings_and_keys():
    assert parse_rule("label", ("yes", "no")) == LabelRule(("yes", "no"))
    assert parse_rule("label:Sci/Tech,a:b", ("yes", "no")) == LabelRule(("Sci/Tech", "a:b"))
    assert [parse_rule(text) for text in ("number", "exact", "rouge_l")] == [NumberRule(), ExactRule(), RougeLRule()]
    assert parse_rule("regex:a:(b)") == RegexRule("a:(b)")
    assert len({*ANY, *ANY, NumberRule()}) == len({repr(rule) for rule in ANY}) == len(ANY)
    rule = LabelRule(("a", "b"))
    assert rule.with_match("") is rule
    for wrong, match in ((rule, "exact"), (ExactRule(), "first")):
        with pytest.raises(UserError, match=f"match is '{match}'"):
            wrong.with_match(match)
    for text, message in (
        ("numbr", "unknown rule 'numbr'; near: number"),
        ("", "unknown rule ''; near: exact, label, number, regex, rouge_l"),
        ("number:18", "unknown rule 'number:18'; near: number"),
        ("label", "a label is empty"),
        ("label:a,,b", "a label is empty"),
        ("label:a, A", "two of a, A differ in case at most"),
        *((f"regex:{pattern}", "is no pattern") for pattern in ("", "(", "a{99999999999999999999}")),
    ):
        with pytest.raises(UserError) as error:
            parse_rule(text, () if text == "label" else ("yes", "no"))
        assert message in str(error.value) and "\n" not in str(error.value)


(PROMPT,) = TOPICS["devices"].prompts("test", 1, 0)
PIECES = ["violat", "1. ", "i can't ", "sorry, so ", "not a ", "1,111", "the  ", "unsafe\nS1, ", "Harmful request: "]


@pytest.mark.timeout(30)  # a rule that tries again at each place, as long as what follows, takes many minutes
@pytest.mark.parametrize("piece", PIECES)
def test_a_long_answer(piece):
    """What a model may write without end: every rule comes to a verdict in time that grows as the answer does."""
    answer = piece * (200_000 // len(piece)) + "x"
    for rule in (begins_refusal, is_degenerate, whole_sentences, LlamaGuardJudge.parse, WildGuardJudge.parse):
        rule(answer)
    judge(answer, PROMPT)
    first_label(answer, ("positive", "negative"))
    for rule in (NumberRule(), NumberRule("reference"), ExactRule(), RougeLRule()):
        rule.score(answer, answer)
