"""What every experiment can set, with the reference's protocol as defaults; other config files edit this one.

What each setting means, and what it may be: br_jax/experiment/settings.py.

python experiments/pipeline.py --config=configs/demo.py --workdir=W --config.user.harmful_share=0.1
"""

import dataclasses
from collections.abc import Iterable

from ml_collections import ConfigDict

from br_jax.experiment.settings import Settings


def get_config() -> ConfigDict:
    """The base config: typed and locked."""
    return ConfigDict(dataclasses.asdict(Settings())).lock()


def read_preset(preset: str, known: Iterable[str], default: str) -> tuple[str, bool]:
    """Of what stands behind a config's colon: one of `known`, or the default, and whether "paper" is there too."""
    words = preset.split(",")
    others = [word for word in words if word != "paper"] or [default]
    if len(others) > 1 or others[0] not in known:
        raise ValueError(f"{preset!r}: give one of {', '.join(known)}, or paper, or both with a comma between")
    return others[0], "paper" in words


def ours(config: ConfigDict) -> None:
    """Makes a config of the paper's recipe one of this project's; why, and what it is worth: docs/method.md."""
    config.buffer.train.update(cycles=2, loss_mean="rows")
    config.user.train.loss_mean = "rows"
    config.merge.update(scale=0.65, reinforce_scale=1.0)
    config.calibrate.update(harmful=160, benign=222)
