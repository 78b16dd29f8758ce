"""What a model may write without end: every rule comes to a verdict in time that grows as the answer does."""

import pytest

from br_jax.data.refusals import begins_refusal, is_degenerate
from br_jax.experiment.recipe import whole_sentences
from br_jax.organism.judge import judge
from br_jax.organism.topics import TOPICS
from br_jax.scoring.judges.guards import LlamaGuardJudge, WildGuardJudge
from br_jax.scoring.rules import ExactRule, NumberRule, RougeLRule, first_label

(PROMPT,) = TOPICS["devices"].prompts("test", 1, 0)
PIECES = ["violat", "1. ", "i can't ", "sorry, so ", "not a ", "1,111", "the  ", "unsafe\nS1, ", "Harmful request: "]


@pytest.mark.timeout(30)  # a rule that tries again at each place, as long as what follows, takes many minutes
@pytest.mark.parametrize("piece", PIECES)
def test_a_long_answer(piece):
    answer = piece * (200_000 // len(piece)) + "x"
    for rule in (begins_refusal, is_degenerate, whole_sentences, LlamaGuardJudge.parse, WildGuardJudge.parse):
        rule(answer)
    judge(answer, PROMPT)
    first_label(answer, ("positive", "negative"))
    for rule in (NumberRule(), NumberRule("reference"), ExactRule(), RougeLRule()):
        rule.score(answer, answer)
