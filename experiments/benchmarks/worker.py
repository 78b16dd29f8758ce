"""The process of one contender: builds its work once, then does one unit of it whenever it is told to.

`python -P worker.py FD`, with a pipe at file descriptor FD. In comes (file, function, arguments); out goes
("ready", memory). Then for every number in, ("done", figures) goes out, until None comes. An error goes out as
("failed", one line). Only the standard library is imported here: what a process holds is its contender's.
"""

import importlib.util
import os
import resource
import sys
import time
import traceback
from multiprocessing.connection import Connection


def memory() -> dict[str, float]:
    """GB that this process holds now ("resident") and has held at most ("peak")."""
    # Linux counts in KiB, macOS in bytes. A child starts with its parent's peak, and ours is below any contender's.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    try:
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        resident = peak
    return {"resident": resident / 1e9, "peak": peak / 1e9}


def serve(connection: Connection) -> None:
    """Answers until told to stop."""
    file, function, arguments = connection.recv()
    spec = importlib.util.spec_from_file_location("contender", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compiles = []

    def listen(event: str, seconds: float, **kwargs) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiles.append(event)

    if "jax" in sys.modules:
        sys.modules["jax"].monitoring.register_event_duration_secs_listener(listen)
    unit = getattr(module, function)(**arguments)
    connection.send(("ready", memory()))
    while (index := connection.recv()) is not None:
        start, busy = time.perf_counter(), time.process_time()
        amount, outcome = unit(index)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        figures = {"seconds": seconds, "busy": busy, "amount": amount, "compiles": len(compiles), **memory()}
        # A function is called only now, when clock and memory have been read: checking is not the work.
        connection.send(("done", figures, outcome() if callable(outcome) else outcome))
        compiles.clear()


def main() -> None:
    """Serves the pipe; whatever goes wrong is told to the other end."""
    with Connection(int(sys.argv[1])) as connection:
        try:
            serve(connection)
        except (EOFError, KeyboardInterrupt):
            sys.exit(130)  # the other end is gone, or going
        except Exception as error:
            if type(error).__name__ != "UserError":
                traceback.print_exc()
            connection.send(("failed", " ".join(str(error).split()) or type(error).__name__))


if __name__ == "__main__":
    main()
