"""The users of an experiment by name: an honest one with harmful rows among the others, and attackers."""

from br_jax.attackers import kinds
from br_jax.attackers.attacker import Attacker

ATTACKERS: dict[str, type[Attacker]] = {
    "plain": Attacker,
    "harsh": kinds.Harsh,
    "format": kinds.TaskFormat,
    "refuse_then_comply": kinds.RefuseThenComply,
    "anti_buffer": kinds.AntiBuffer,
    "garbled": kinds.Garbled,
    "surrogate": kinds.Surrogate,
    "trigger": kinds.Trigger,
    "identity": kinds.Identity,
    "ten_rows": kinds.TenRows,
    "outliers": kinds.Outliers,
    "split": kinds.Split,
    "prefill": kinds.Prefill,
    "best_of": kinds.BestOf,
    "bf16": kinds.Rounded,
    "int8": kinds.Quantized,
    "amplified": kinds.Amplified,
    "sabotage": kinds.Sabotage,
}
