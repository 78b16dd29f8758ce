"""Jobs' rows are read in threads of their own, so that a file of a million rows is in nobody's way."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future

from absl import logging

from br_jax.core.errors import UserError, one_line
from br_jax.core.io import is_of_the_machine
from br_jax.pool.jobs import Course, Job


def result(job: Job, future: Future) -> Course:
    """What was read of a job; whatever went wrong in that is the job's, but for what is the machine's."""
    try:
        return future.result()
    except Exception as error:
        if isinstance(error, UserError) or is_of_the_machine(error):
            raise
        logging.exception("job %s: its rows cannot be read", job.name)
        raise UserError(
            f"job {job.name}: its rows cannot be read ({type(error).__name__}: {one_line(error)})"
        ) from error


def aside(make: Callable[[], Course]) -> Future:
    """Makes something in a thread of its own, so that a file of a million rows is in nobody's way, nor in that of the
    program's end; where threads have priorities, it yields to the training.
    """
    future = Future()

    def run() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.nice(0) + 10)
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="br_jax-rows", daemon=True).start()
    return future
