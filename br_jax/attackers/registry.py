"""The users of an experiment by name: an honest one with harmful rows among the others, and attackers."""

from br_jax.attackers.attacker import Attacker
from br_jax.attackers.kinds import (
    Amplified,
    AntiBuffer,
    BestOf,
    Garbled,
    Harsh,
    Identity,
    Outliers,
    Prefill,
    Quantized,
    RefuseThenComply,
    Rounded,
    Sabotage,
    Split,
    Surrogate,
    TaskFormat,
    TenRows,
    Trigger,
)

ATTACKERS: dict[str, type[Attacker]] = {
    "plain": Attacker,
    "harsh": Harsh,
    "format": TaskFormat,
    "refuse_then_comply": RefuseThenComply,
    "anti_buffer": AntiBuffer,
    "garbled": Garbled,
    "surrogate": Surrogate,
    "trigger": Trigger,
    "identity": Identity,
    "ten_rows": TenRows,
    "outliers": Outliers,
    "split": Split,
    "prefill": Prefill,
    "best_of": BestOf,
    "bf16": Rounded,
    "int8": Quantized,
    "amplified": Amplified,
    "sabotage": Sabotage,
}
