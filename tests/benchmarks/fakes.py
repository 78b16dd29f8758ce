"""Contenders that do no work, run by path as the real ones are: only what is imported here is in their process."""

import os
import sys
import threading
import time


def writes(log, name, amount=2.0, seconds=0.02):
    """Notes the beginning and the end of each unit, and who ran it."""

    def unit(index):
        with open(log, "a") as file:
            file.write(f"{name} {index} begin {os.getpid()}\n")
            file.flush()
            time.sleep(seconds)
            file.write(f"{name} {index} end {os.getpid()}\n")
        return amount, lambda: f"{name}{index}"

    return unit


def modules():
    """Which modules its process holds."""
    return lambda index: (0, sorted(name for name in sys.modules if "." not in name))


def fails(at):
    """Raises in unit `at`; before the first one when that is -1."""

    def unit(index):
        if index == at:
            raise ValueError("no such\n  luck")
        return 1, None

    if at < 0:
        unit(at)
    return unit


def dies(after):
    """Ends without a word, so many seconds after it was asked for its first unit."""

    def unit(index):
        threading.Timer(after, os._exit, [7]).start()
        time.sleep(0 if after else 60)
        return 1, None

    return unit
