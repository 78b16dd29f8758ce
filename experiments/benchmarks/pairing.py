"""Contenders in processes of their own, taking turns: whatever else the machine does hits all of them alike."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from typing import Any

from br_jax.core.errors import UserError
from br_jax.core.progress import progress

_WORKER = pathlib.Path(__file__).with_name("worker.py")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning",  # PEFT uses a name that transformers will remove
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several contenders share an accelerator
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """Somebody who can do the work.

    Attributes:
        name: in tables.
        file: Python file that holds `function`; it is run by its path, without the package that it lies in.
        function: takes `arguments` and returns the work: a function that takes the number of a unit, does that unit and
            returns (amount of work done, outcome). The outcome is compared, not timed; a function is called for it.
        arguments: what can be pickled.
    """

    name: str
    file: pathlib.Path
    function: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass
class Record:
    """What a contender did; unit 0 warms it up and is no part of `seconds`.

    Attributes:
        loaded: GB resident before the first unit.
        first: seconds from the start of the process to the end of its first unit.
        compiles: programs that XLA compiled up to then.
        recompiles: programs that it compiled after that, which should be none.
        peak: GB, the most that the process ever held.
        seconds: of each round's unit.
        busy: CPU-seconds of each round's unit, over all threads: what other load disturbs least.
        amounts: work done in each round's unit.
        outcomes: of every unit, the first included.
    """

    loaded: float = 0.0
    first: float = 0.0
    compiles: int = 0
    recompiles: int = 0
    peak: float = 0.0
    seconds: list[float] = dataclasses.field(default_factory=list)
    busy: list[float] = dataclasses.field(default_factory=list)
    amounts: list[float] = dataclasses.field(default_factory=list)
    outcomes: list[Any] = dataclasses.field(default_factory=list)


def race(contenders: Sequence[Contender], rounds: int, name: str) -> dict[str, Record]:
    """Starts and warms the contenders one after another, then lets them take turns.

    Each round has every contender do the same unit, one at a time; the next round begins with the next contender.

    Args:
        contenders: with distinct names, by which their records are found.
        rounds: units that are timed; the warm-up is unit 0, round i is unit i.
        name: on the progress bar.

    Raises:
        UserError: a contender failed or died; the others are ended.
    """
    records = {contender.name: Record() for contender in contenders}
    with contextlib.ExitStack() as stack, progress(len(contenders) * (rounds + 1), name, "unit") as bar:
        running = []
        for contender in contenders:
            bar.set_postfix_str(f"{contender.name}: starts")
            record, start = records[contender.name], time.perf_counter()
            process = stack.enter_context(_process(contender))
            record.loaded = process.receive()[0]["resident"]
            _take(process, 0, record)
            record.first = time.perf_counter() - start
            running.append(process)
            bar.update()
        for round_ in range(1, rounds + 1):
            first = (round_ - 1) % len(running)
            for process in running[first:] + running[:first]:
                bar.set_postfix_str(process.name)
                _take(process, round_, records[process.name])
                bar.update()
    return records


def call(file: pathlib.Path, function: str, **arguments) -> Any:
    """The outcome of a contender's first unit: work in a process of its own, so that this one stays small."""
    with _process(Contender(function, file, function, arguments)) as process:
        process.receive()
        return process.unit(0)[1]


def _take(process: "_Process", index: int, record: Record) -> None:
    figures, outcome = process.unit(index)
    record.outcomes.append(outcome)
    record.peak = max(record.peak, figures["peak"])
    if index == 0:
        record.compiles = figures["compiles"]
    else:
        record.recompiles += figures["compiles"]
        record.seconds.append(figures["seconds"])
        record.busy.append(figures["busy"])
        record.amounts.append(figures["amount"])


class _Process:
    """The parent's end of a worker."""

    def __init__(self, contender: Contender, popen: subprocess.Popen, connection):
        self.name, self._popen, self._connection = contender.name, popen, connection

    def unit(self, index: int) -> tuple[dict[str, float], Any]:
        """Has one unit done: its figures and its outcome."""
        with contextlib.suppress(BrokenPipeError):  # `receive` tells why
            self._connection.send(index)
        return self.receive()

    def receive(self) -> tuple:
        """What the worker says next; a `UserError` when it failed, or is no more."""
        try:
            kind, *content = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            status = self._popen.wait()
            hint = ": killed, perhaps for want of memory" if status == -9 else ""
            raise UserError(f"benchmark {self.name}: its process ended with status {status}{hint}") from error
        if kind == "failed":
            raise UserError(f"benchmark {self.name}: {content[0]}")
        return tuple(content)


@contextlib.contextmanager
def _process(contender: Contender) -> Iterator[_Process]:
    """A worker that has been given its contender; it is ended at the end, whatever it is doing."""
    ours, its = Pipe()
    with ours:
        with its:
            command = [sys.executable, "-P", str(_WORKER), str(its.fileno())]
            found = os.pathsep.join(filter(None, [str(_WORKER.parents[1]), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": found}
            popen = subprocess.Popen(command, pass_fds=[its.fileno()], env=environment)
        try:
            process = _Process(contender, popen, ours)
            with contextlib.suppress(BrokenPipeError):
                ours.send((str(contender.file), contender.function, dict(contender.arguments)))
            yield process
        finally:
            popen.kill()
            popen.wait()
