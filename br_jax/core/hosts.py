"""Several processes (hosts) as one run: how they join, agree, wait for each other, stop together and go down together.

One process is the case in which every function here does nothing. Files are written by process 0 and read by all, so
they see one file system.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost as orbax

from br_jax.core.errors import Stopped, UserError, one_line

_WEEK = 7 * 24 * 3600 * 1000  # milliseconds
_PREEMPTION_CHECKS = itertools.count(1)  # JAX wants numbers that never fall while the process lives


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    multihost: bool = False,
    wait: int = 300,
    heartbeat: int = 40,
) -> bool:
    """Joins the processes of a run by `jax.distributed.initialize`; before JAX is used.

    Should another process die or never come, JAX ends this one by an abort that no Python code sees (at once after
    process 0, else within `heartbeat` seconds), so what that means is printed beforehand.

    Args:
        coordinator, num_processes, process_id: host:port of process 0, how many there are, which one this is.
        multihost: JAX finds these three itself (Cloud TPU, GKE, SLURM, Open MPI).
        wait: seconds until processes that do not come are given up.
        heartbeat: seconds of silence after which a process counts as dead.

    Returns:
        Whether this is one of several now; False where nothing was asked for.

    Raises:
        UserError: arguments that are missing or contradict each other, or that JAX cannot join by.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None) and not multihost:
        return False
    if given.count(None) != (3 if multihost else 0):
        raise UserError(
            "several processes need all of --coordinator, --num_processes and --process_id, or --multihost alone"
        )
    if not multihost:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 <= process_id < num_processes:
            raise UserError(
                f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: write "
                "host:port, the address of process 0, and number the processes from 0"
            )
    name = "this process" if multihost else f"process {process_id} of {num_processes}"
    print(
        f"{name} waits {wait} s for the others; should JAX abort it, then or later, another one died or never came: "
        "the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=None if multihost else "deactivate",
            initialization_timeout=wait,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"the processes could not be joined ({one_line(error)}): on machines that JAX does not know give "
            "--coordinator, --num_processes and --process_id"
        ) from error
    return True


def leave(status: int) -> None:
    """Ends one of several processes after an error; if it is the error of all of them, with this status in each.

    JAX's own shutdown, which waits minutes for processes that may never come, is given five seconds.
    """
    sys.stdout.flush()
    threading.Timer(5, os._exit, (status,)).start()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()
    os._exit(status)


def is_main() -> bool:
    """Whether this is process 0, which alone writes files and speaks."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here, hours later if need be.

    By Orbax, which asks JAX's coordination service: `multihost_utils.sync_global_devices` is a collective, and gloo
    gives one up after 30 minutes.
    """
    if jax.distributed.is_initialized():
        orbax.get_barrier_sync_fn()(key=name, timeout_ms=_WEEK)


def agree(value: bool | Sequence[bool]) -> bool | list[bool]:
    """Process 0's value or values, in all of them."""
    return multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)).astype(bool).tolist()


def gather(value: bool) -> list[bool]:
    """Every process' value, in each."""
    return [bool(x) for x in multihost_utils.process_allgather(np.asarray([value], np.int32), tiled=True)]


def require_shared(path, seen: bool) -> None:
    """Raises a `UserError`, in every process, where one does not see what process 0 wrote."""
    everyone = gather(seen)
    if not all(everyone):
        raise UserError(
            f"{path}: written by process 0 and not seen by process {everyone.index(False)}: choose a workdir on a file "
            "system that all of them share"
        )


def main_first(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and, when it is done there, in the others, which find the files it left."""
    stop_if_asked()
    if is_main():
        result = function()
    barrier("main_first")
    return result if is_main() else function()


def stop_if_asked() -> None:
    """Raises a `Stopped`, in every process that comes here, when one of several got SIGTERM since the last check."""
    if _stop_agreed():
        raise Stopped("stopped by SIGTERM: the same command goes on from there")


def fetch(tree):
    """A pytree of global arrays with every leaf that lies on several processes' devices whole, as numpy, in each."""
    return jax.tree.map(
        lambda leaf: leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True), tree
    )


class StopSignal(contextlib.AbstractContextManager):
    """SIGTERM as a question that a loop asks between its steps, instead of the end of the process.

    One process: a signal handler while the context lasts (in the main thread; elsewhere Python has none). Several:
    JAX's preemption service, which has the signal from `join` on and picks one step for all of them.
    """

    def __enter__(self):
        self._came, self._before = False, None
        if not jax.distributed.is_initialized() and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, signum, frame) -> None:
        self._came = True

    def asked(self) -> bool:
        """Whether to stop here; the same answer in every process, if each asks after the same step."""
        return self._came or _stop_agreed()

    def __exit__(self, kind, error, traceback) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self._came and kind is None:  # it came when nobody asked any more
                os.kill(os.getpid(), signal.SIGTERM)


def _stop_agreed() -> bool:
    """Whether every process stops here, because one got SIGTERM; costs a mutex, no communication."""
    return multihost_utils.reached_preemption_sync_point(next(_PREEMPTION_CHECKS))
