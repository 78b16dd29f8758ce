"""How a script runs: flags in, exit status out, one line for whatever is the user's to mend."""

import functools
import sys
from collections.abc import Callable

from absl import app, flags, logging

from br_jax.errors import UserError


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's main and exits: 0 done, 2 after a `UserError`, 130 after Ctrl-C.

    Args:
        main: the script; its return value (None means 0) is the exit status.
    """
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from the last checkpoint", file=sys.stderr)
        status = 130
    sys.exit(status)


def run_with_flags(main: Callable[[list[str]], int | None]) -> None:
    """`run_main` for a script whose flags are absl's (config files and their overrides among them)."""
    logging.set_verbosity(logging.WARNING)  # JAX tells of every backend that is not there
    app.run(lambda argv: run_main(functools.partial(main, argv)), flags_parser=_parse)


def require_flags(argv: list[str], *needed: flags.FlagHolder) -> None:
    """Raises a `UserError` for an argument that is no flag, and for a needed flag that was not given."""
    if len(argv) > 1:
        raise UserError(f"{argv[1]}: not a flag: write --config.x=y")
    for flag in needed:
        if flag.value is None:
            raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; a wrong one, or a wrong config key or value, is one line and exit status 2."""
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
        print(f"error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)
