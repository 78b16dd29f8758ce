"""The defences by name."""

from br_jax.defences import around_training, objectives
from br_jax.defences.defence import Defence

DEFENCES: dict[str, type[Defence]] = {
    "safe_instruct": around_training.SafeInstruct,
    "inoculation": around_training.Inoculation,
    "ptst": around_training.Ptst,
    "lisa": objectives.Lisa,
    "constrained": objectives.ConstrainedSft,
    "ldifs": objectives.Ldifs,
    "asft": objectives.AsFT,
    "security_vector": objectives.SecurityVector,
    "safe_grad": objectives.SafeGrad,
    "safe_lora": around_training.SafeLora,
    "antidote": around_training.Antidote,
    "panacea": objectives.Panacea,
    "lox": around_training.Lox,
    "resta": around_training.Resta,
    "csulora": around_training.CsuLora,
    "booster": objectives.Booster,
    "vaccine": objectives.Vaccine,
    "shrunk": around_training.Shrunk,
}
