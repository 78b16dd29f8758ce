"""Checkpoints of a run by Orbax: trainable, optimizer, step, key and data iterator; never the base.

Of training, this file alone touches Orbax.
"""

import pathlib
import shutil

import jax
from orbax.checkpoint import v1 as ocp

from br_jax.distributed import agree
from br_jax.errors import UserError
from br_jax.sharding import shardings

_OVERHEAD = 1 << 20  # bytes: metadata, the manifest, and the folders that hold them


class Checkpoints:
    """The checkpoints of one stage in one folder; the newest two are kept.

    Saving is asynchronous and atomic (Orbax writes a temporary folder and renames it); leftovers of a save that was
    killed are cleared when the folder is opened.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._checkpointer = ocp.training.Checkpointer(
            folder.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(2),
            cleanup_tmp_directories=True,
        )
        # Orbax asks JAX's preemption service too, with its own numbers and from a thread of its own, which would make
        # processes disagree on the step at which `distributed.StopSignal` stops them.
        self._checkpointer._manager.reached_preemption = lambda step: False

    def save(self, step: int, state: dict, data_state: dict) -> None:
        """Starts saving; waits first for a save that is still under way, and raises what went wrong in it.

        Raises:
            UserError: when there is too little room on the disk.
        """
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        free = shutil.disk_usage(self._folder).free
        if agree(free < needed):  # asked beforehand: Orbax's threads print pages when a disk fills up under them
            raise UserError(
                f"{self._folder}: checkpoint not saved ({free / 1e6:.1f} MB free, {needed / 1e6:.1f} MB needed): "
                "free space, then run again"
            )
        self._checkpointer.save_async(step, state, force=True, custom_metadata={"data": data_state})

    def restore(self, state: dict, mesh) -> tuple[dict, dict] | None:
        """The newest state, laid on `mesh` (which need not be the one that saved it), and its data state.

        Args:
            state: a state of the same structure, real or abstract.
            mesh: where the arrays go.

        Returns:
            (state, data state), or None when there is no checkpoint.
        """
        latest = self._checkpointer.latest
        if latest is None:
            return None
        places = shardings(state, mesh)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
        try:
            restored = self._checkpointer.load(latest.step, abstract)
            data_state = self._checkpointer.metadata(latest.step).custom_metadata["data"]
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            raise UserError(
                f"{self._folder}/{latest.step}: cannot be restored ({str(error).splitlines()[0]}): "
                "delete that folder to go on from the one before"
            ) from error
        return restored, data_state

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
            UserError: when the disk refused the save.
        """
        try:
            self._checkpointer.wait()
        except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
            raise UserError(
                f"{self._folder}: checkpoint not saved ({str(error).splitlines()[0]}): free space, then run again"
            ) from error

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
