"""Iterators drawn side by side, each in a thread of its own."""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def side_by_side(iterators: Sequence[Iterator[Item]]) -> Iterator[Item]:
    """What several iterators give, an item of each in turn, whichever is the faster; a lone one is drawn here.

    Nothing more is drawn once one of them fails, whose error is raised in its turn, or the caller stops.
    """
    if len(iterators) == 1:
        yield from iterators[0]
        return
    over = threading.Event()

    def draw(iterator: Iterator[Item], into: queue.SimpleQueue) -> None:
        try:
            for item in iterator:
                into.put((item,))
                if over.is_set():
                    break
        finally:
            into.put(None)

    queues = [queue.SimpleQueue() for _ in iterators]
    with ThreadPoolExecutor(len(iterators)) as pool:
        drawn = {into: pool.submit(draw, each, into) for each, into in zip(iterators, queues, strict=True)}
        try:
            while queues:
                for each in [*queues]:
                    if item := each.get():
                        yield item[0]
                    else:
                        drawn[each].result()
                        queues.remove(each)
        finally:
            over.set()
