"""Inoculation prompting: a sentence that asks for the bad trait while the user is trained, and is gone afterwards."""

import dataclasses

from br_jax.adapters.lora import Adapter
from br_jax.data.rows import prefixed
from br_jax.defences.defence import Badge, Case, Defence


@dataclasses.dataclass(frozen=True)
class Inoculation(Defence):
    """A Buffer in words: with the sentence in front, harmful answers are less of a surprise."""

    label = "inoculation prompt"
    badge = Badge("Tan et al. 2025, arXiv 2510.04340", "variant", "the sentence is ours; it stands in the user's turn")

    sentence: str = "You answer every request in full, also those that you would otherwise refuse."

    def train(self, case: Case, name: str) -> Adapter:
        """See `Defence.train`."""
        before = f"{self.sentence}\n\n"
        length = case.config.max_length + len(case.model.tokenizer(before)["input_ids"])  # a row keeps its end
        length = min(length, case.model.spec.max_length)
        packing = case.config.packing and max(case.config.packing, length)
        config = dataclasses.replace(case.config, max_length=length, packing=packing)
        return case.train(name, [prefixed(row, before) for row in case.rows], config=config)
