"""How a script runs: flags in, exit status out, one line for whatever is the user's to mend."""

import ctypes
import functools
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags, logging

from br_jax.core import hosts
from br_jax.core.errors import Stopped, UserError, explain
from br_jax.core.io import raise_limits

COORDINATOR = flags.DEFINE_string("coordinator", None, "Several processes: host:port of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several processes: how many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several processes: which one this is, from 0.")
MULTIHOST = flags.DEFINE_bool("multihost", False, "Several processes that JAX finds itself: Cloud TPU, GKE, SLURM.")
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder of compiled programs for the next run, empty for none; default: $JAX_COMPILATION_CACHE_DIR or "
    "~/.cache/br_jax/xla.",
)
MAX_FILE_MB = flags.DEFINE_integer(
    "max_file_mb", 0, "Megabytes of a file, and of a line, that are read where br_jax's own limit is lower.", 0, 10**6
)
_WORTH_KEEPING = 0.1  # seconds: a start compiles a dozen small programs, which are read back in 20 ms each


def run_main(main: Callable[[], int | None], join: Callable[[], bool] = lambda: False) -> None:
    """Runs a script's main and exits: 0 done, 2 after what its user can mend, 130 after Ctrl-C, 143 after SIGTERM.

    What can be mended is one line on stderr: a `UserError`, or what a file system refused (see `errors.explain`).

    Args:
        main: the script; its return value (None means 0) is the exit status.
        join: makes this process one of several, see `hosts.join`; an error then ends it without waiting long for
            the others, and they end by it: with the same status when it is the error of all, else by JAX's abort.
    """
    joined = False
    try:
        joined = join()
        if not hosts.is_main():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as long as the process lives
            logging.set_verbosity(logging.ERROR)
        sys.exit(main() or 0)
    except Stopped as stop:
        if hosts.is_main():
            print(stop, file=sys.stderr)
        status = 143
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # a second one, while threads are waited for
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        status = 130
    except Exception as error:
        message, status = explain(error), 2
        if message is None and joined:
            if isinstance(error, jax.errors.JaxRuntimeError):  # as a rule, another process' end
                print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
                os._exit(os.EX_TEMPFAIL)
            traceback.print_exc()
            status = 1
        elif message is None:
            raise
        else:
            print(f"error: {message}", file=sys.stderr)
    if joined:
        hosts.leave(status)
    sys.exit(status)


def run_with_flags(main: Callable[[list[str]], int | None], one_heap: bool = True) -> None:
    """`run_main` for a script whose flags are absl's (config files and their overrides among them); see `set_up`."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend that is not there
    join = functools.partial(_join, one_heap)
    app.run(lambda argv: run_main(functools.partial(main, argv), join), flags_parser=_parse)


def set_up(compilation_cache: str | None = None, max_file_mb: int = 0, one_heap: bool = True) -> None:
    """What a process of ours sets before it works; the flags of these names say what is meant.

    `one_heap` is for steps: the threads of a compiler wait for each other at it, and take three times as long.
    """
    if one_heap:
        _keep_freed_memory()
    _keep_compiled(compilation_cache)
    raise_limits(max_file_mb * 10**6)


def _join(one_heap: bool) -> bool:
    set_up(COMPILATION_CACHE.value, MAX_FILE_MB.value, one_heap)
    return hosts.join(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, MULTIHOST.value)


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is asked for next, in one heap.

    XLA's CPU asks for a program's temporaries anew at each call. By default large ones come from and go back to the
    system, and each of their pages faults and is cleared, every step: a third of the time of a small model's.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def _keep_compiled(folder: str | None) -> None:
    """Has JAX read programs from a folder and leave there what took it more than `_WORTH_KEEPING` to compile.

    Each machine has its own part of the folder, for a program for a CPU uses what that CPU has. A folder that JAX was
    given by its own settings is used as these say.
    """
    if folder is None:
        if jax.config.jax_compilation_cache_dir:
            return
        folder = "~/.cache/br_jax/xla"
    part = os.path.join(os.path.expanduser(folder), platform.node()) if folder else None
    jax.config.update("jax_compilation_cache_dir", part)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def require_flags(argv: list[str], *needed: flags.FlagHolder) -> None:
    """Raises a `UserError` for an argument that is no flag, and for a needed flag that was not given."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]}: not a flag: write --config.x=y")
    for flag in needed:
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; a wrong one, or a wrong config key or value, is one line and exit status 2."""
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        parts = sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__)
        print(*(part.strip("\n") for part in parts if part), sep="\n\n")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        for name in flags.FLAGS:
            # A config file that could not be loaded is a value that raises at its first use: make that now.
            getattr(flags.FLAGS[name].value, "items", None)
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, UserError) as error:
        # ml_collections wraps its KeyError in another error; and the str of a KeyError is a repr.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = str(error.args[0] if isinstance(error, KeyError) else error)
        if (key := text.strip("'")).isidentifier():  # ml_collections says no more of a key that none is near
            given = next((arg for arg in argv if f".{key}" in arg.partition("=")[0]), "config")
            text = f"{given}: there is no {key!r}: see configs/base.py"
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
