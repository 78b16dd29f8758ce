"""The defences by name."""

from br_jax.defences.alignments import Booster, Vaccine
from br_jax.defences.defence import Defence
from br_jax.defences.objectives import AsFT, ConstrainedSft, Ldifs, Lisa, Panacea, SafeGrad, SecurityVector
from br_jax.defences.post_hoc import Antidote, CsuLora, Lox, Resta, SafeLora, Shrunk
from br_jax.defences.rows import Inoculation, Ptst, SafeInstruct

DEFENCES: dict[str, type[Defence]] = {
    "safe_instruct": SafeInstruct,
    "inoculation": Inoculation,
    "ptst": Ptst,
    "lisa": Lisa,
    "constrained": ConstrainedSft,
    "ldifs": Ldifs,
    "asft": AsFT,
    "security_vector": SecurityVector,
    "safe_grad": SafeGrad,
    "safe_lora": SafeLora,
    "antidote": Antidote,
    "panacea": Panacea,
    "lox": Lox,
    "resta": Resta,
    "csulora": CsuLora,
    "booster": Booster,
    "vaccine": Vaccine,
    "shrunk": Shrunk,
}
