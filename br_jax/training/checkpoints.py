"""Checkpoints of a run, or of a pool, by Orbax: trainable, optimizer, step, key and data; never the base.

Of training, this file alone touches Orbax.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from br_jax.core.errors import UserError, one_line
from br_jax.core.hosts import agree
from br_jax.core.mesh import abstract

_OVERHEAD = 1 << 20  # bytes: metadata, the manifest, and the folders that hold them


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never. Orbax asks JAX's preemption service with its own numbers and from a thread of its own, which would
        make processes disagree on the step at which `hosts.StopSignal` stops them.
        """
        return False

    def close(self) -> None:
        """Also waits for the thread that clears leftovers: it prints a page where the folder goes under it."""
        try:
            self._maybe_await_cleanup_tmp_directory()
        finally:
            super().close()


class Checkpoints:
    """The checkpoints in one folder; the newest two are kept.

    Saving is asynchronous and atomic (Orbax writes a temporary folder and renames it); leftovers of a save that was
    killed are cleared when the folder is opened.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler()}
        self._manager = _Manager(folder.absolute(), options=options, item_handlers=handlers)

    def save(self, step: int, state: dict, data_state: dict) -> None:
        """Starts saving, once an earlier save is done; a `UserError` when the disk has or had too little room."""
        self.wait()
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _OVERHEAD
        free = shutil.disk_usage(self._folder).free
        if agree(free < needed):  # asked beforehand: Orbax's threads print pages when a disk fills up under them
            raise self._not_saved(f"{free / 1e6:.1f} MB free, {needed / 1e6:.1f} MB needed")
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))
        self._manager.save(step, args=args, force=True, custom_metadata={"data": data_state})

    def data(self) -> dict | None:
        """The data state of the newest checkpoint, or None when there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        with self._restoring(step):
            return self._manager.metadata(step).custom_metadata["data"]

    def restore(self, state: dict, mesh) -> dict:
        """The newest checkpoint's state, on any mesh; `state` is one of the same structure, real or abstract."""
        step = self._manager.latest_step()
        with self._restoring(step):
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract(state, mesh)))
            return self._manager.restore(step, args=args)["state"]

    @contextlib.contextmanager
    def _restoring(self, step: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, FileNotFoundError, TypeError) as error:
            raise UserError(
                f"{self._folder}/{step}: cannot be restored ({one_line(error)}): "
                "delete that folder to go on from the one before"
            ) from error

    def wait(self) -> None:
        """Returns when no save is under way; a `UserError` when the disk refused it."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # tensorstore's errors are ValueErrors
            raise self._not_saved(one_line(error)) from error

    def _not_saved(self, why: str) -> UserError:
        return UserError(f"{self._folder}: checkpoint not saved ({why}): free space, then run again")

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(OSError, ValueError):  # what `wait` has told
                self._manager.close()
