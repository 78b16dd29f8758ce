"""Buffer-and-Reinforce: safe LoRA fine-tuning of aligned language models in JAX.

```python
import br_jax as br
```
"""

import os

from br_jax.adapters import peft
from br_jax.adapters.lora import Adapter, detach
from br_jax.adapters.merge import MergeConfig, qr_merge
from br_jax.calibration import calibrate
from br_jax.core.errors import UserError
from br_jax.data.rows import Row, read_rows
from br_jax.inference.generate import generate
from br_jax.method import release, train_buffer, train_reinforce, train_user, train_users
from br_jax.models.model import Model, guard, require_model, require_releasable
from br_jax.provider import export_adapter, export_model, load_model
from br_jax.scoring.suite import Suite, evaluate
from br_jax.training.config import TrainConfig
from br_jax.training.jobs import Job
from br_jax.version import __version__

__all__ = [
    "Adapter",
    "Job",
    "MergeConfig",
    "Model",
    "Row",
    "Suite",
    "TrainConfig",
    "UserError",
    "__version__",
    "calibrate",
    "detach",
    "evaluate",
    "export_adapter",
    "export_model",
    "generate",
    "guard",
    "load_adapter",
    "load_model",
    "qr_merge",
    "read_rows",
    "release",
    "save_adapter",
    "train_buffer",
    "train_reinforce",
    "train_user",
    "train_users",
]


def load_adapter(folder: str | os.PathLike, model: Model, role: str | None = None) -> Adapter:
    """Reads an adapter folder in PEFT's layout and checks that it belongs to `model`; see `adapters.peft`.

    An adapter that was not made by br_jax records no role: say which it is, or it is "unknown" and goes nowhere.
    """
    folder = peft.as_folder(folder, "load_adapter(folder, model)")
    require_model(model, folder)
    return peft.load_adapter(folder, model.params, fingerprint=model.fingerprint, role=role)


def save_adapter(folder: str | os.PathLike, adapter: Adapter, model: Model) -> None:
    """Writes an adapter folder in PEFT's layout; one that holds a Buffer is refused; see `adapters.peft`."""
    folder = peft.as_folder(folder, "save_adapter(folder, adapter, model)")
    require_releasable(model, adapter, folder)
    peft.save_adapter(folder, adapter, base_name=model.name, fingerprint=model.fingerprint)
