"""A small training run that dies: python stopped_run.py WORKDIR [STEP | save].

STEP kills the process (SIGKILL) once that step's metrics are written, "save" while a checkpoint after the first is
being written; without either it runs to its end.
"""

import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

import br_jax as br
from br_jax.models.decoder import abstract_params
from br_jax.models.model import make_model
from br_jax.models.spec import ModelSpec
from br_jax.models.tokenizer import byte_tokenizer
from br_jax.training.folder import MetricWriter


def die_at_step(step: int) -> None:
    """Arms the metrics' writer."""
    write = MetricWriter.write

    def deadly(self, record):
        write(self, record)
        if record["step"] >= step and "grad_norm" in record:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    MetricWriter.write = deadly


def die_in_a_save(checkpoints: pathlib.Path) -> None:
    """Arms Orbax's rename of a temporary folder, where there is a whole checkpoint already."""
    finalize = AtomicRenameTemporaryPath.finalize

    async def deadly(self, *args, **kwargs):
        if any(path.name.isdigit() for path in checkpoints.glob("*")):
            os.kill(os.getpid(), signal.SIGKILL)
        return await finalize(self, *args, **kwargs)

    AtomicRenameTemporaryPath.finalize = deadly


def make_parts() -> tuple:
    """A tiny model, of numbers that are the same in every process and cost nothing to make, and rows.

    Half a sine: with whole ones what sums are rounded to grows from step to step, a thousandfold in twenty.
    """
    spec = ModelSpec(264, 32, 2, 4, 2, 8, 40, max_length=64)
    leaves, tree = jax.tree.flatten(abstract_params(spec))
    leaves = [jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape) / 2 for leaf in leaves]
    rows = [br.Row((("user", f"{i}?"), ("assistant", f"it is {i}" + "!" * (i % 5)))) for i in range(20)]
    return make_model(spec, tree.unflatten(leaves), byte_tokenizer(), "tiny", "chat"), rows


def main(workdir: str, death: str = "") -> None:
    if death == "save":
        die_in_a_save(pathlib.Path(workdir) / "sft" / "checkpoints")
    elif death:
        die_at_step(int(death))
    model, rows = make_parts()
    every = {"checkpoint_every": 2, "log_every": 1}
    config = br.TrainConfig(rank=2, dropout=0.1, learning_rate=1e-2, steps=12, cycles=2, max_length=24, **every)
    br.train_user(model, rows, config, undefended=True, workdir=workdir)


if __name__ == "__main__":
    main(*sys.argv[1:])
