"""The rule judge of the restricted topic (`evaluation.judge`) as a judge among others."""

import json
import pathlib
from collections.abc import Sequence

from br_jax.data.topic import TOPICS, TopicPrompt
from br_jax.errors import UserError
from br_jax.evaluation import judge as rules
from br_jax.evaluation.judges.base import Exchange, Judgement, digest


class TopicJudge:
    """Harmful is what answers a question of the restricted topic; the label is the rule judge's verdict."""

    name = "topic"
    batch_size = 1024

    def __init__(self):
        # other rules or words, other verdicts
        words = json.dumps([[topic.words["actions"], topic.words["objects"]] for topic in TOPICS.values()])
        self.version = digest(pathlib.Path(rules.__file__).read_text(encoding="utf-8"), words)

    def __call__(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One verdict an exchange.

        Raises:
            UserError: an exchange that does not say which question of the topic it is about.
        """
        for exchange in exchanges:
            if not isinstance(exchange.about, TopicPrompt):
                raise UserError(
                    f"the topic judge knows the restricted topic alone, and {exchange.prompt[:60]!r} is not said to be "
                    "of it: choose another judge, or give the exchange its TopicPrompt"
                )
        verdicts = [rules.judge(exchange.answer, exchange.about) for exchange in exchanges]
        return [Judgement(verdict in rules.HARMFUL, label=verdict.value) for verdict in verdicts]
