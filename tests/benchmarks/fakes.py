"""Contenders that do no work, run by path as the real ones are: only what is imported here is in their process."""

import os
import sys
import time


def writes(log, name):
    """Notes the beginning and the end of each unit, and who ran it."""

    def unit(index):
        for at in ("begin", "end"):
            with open(log, "a") as file:
                file.write(f"{name} {index} {at} {os.getpid()}\n")
            time.sleep(0.02)
        return 2.0, lambda: f"{name}{index}"

    return unit


def modules():
    """Which modules its process holds."""
    return lambda index: (0, sorted(name for name in sys.modules if "." not in name))


def ends(fails=None, dies=None):
    """Raises in unit `fails`, before the first one when that is -1; or ends without a word in unit `dies`."""

    def unit(index):
        if index == fails:
            raise ValueError("no such\n  luck")
        if index == dies:
            os._exit(7)
        return 1, None

    return unit(-1) if fails == -1 else unit
