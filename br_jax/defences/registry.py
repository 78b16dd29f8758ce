"""The defences by name."""

from br_jax.defences.antidote import Antidote
from br_jax.defences.asft import AsFT
from br_jax.defences.booster import Booster, Vaccine
from br_jax.defences.constrained import ConstrainedSft
from br_jax.defences.csulora import CsuLora
from br_jax.defences.defence import Defence
from br_jax.defences.inoculation import Inoculation
from br_jax.defences.ldifs import Ldifs
from br_jax.defences.lisa import Lisa
from br_jax.defences.panacea import Panacea
from br_jax.defences.ptst import Ptst
from br_jax.defences.resta import Lox, Resta
from br_jax.defences.safe_grad import SafeGrad
from br_jax.defences.safe_instruct import SafeInstruct
from br_jax.defences.safe_lora import SafeLora
from br_jax.defences.security_vector import SecurityVector
from br_jax.defences.shrunk import Shrunk

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
