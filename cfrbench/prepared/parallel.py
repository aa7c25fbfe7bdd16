"""The same work on many items, in processes of its own; results as they come."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from cfrbench.errors import StoreError

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T], R], items: Sequence[T], workers: int = 1) -> Iterator[tuple[int, R]]:
    """(number, ``work(items[number])``) of every item, in the order in which they are finished.

    One worker, or one item: in this process. ``work`` and items must be picklable otherwise. StoreError if a process
    dies; what ``work`` raises is raised here.
    """
    if workers <= 1 or len(items) <= 1:
        yield from ((number, work(item)) for number, item in enumerate(items))
        return
    # A fresh interpreter a worker: a forked copy of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(items)), mp_context=context) as pool:
        yield from _fed(pool, work, items, 2 * workers)


def _fed(
    pool: ProcessPoolExecutor, work: Callable[[T], R], items: Sequence[T], at_hand: int
) -> Iterator[tuple[int, R]]:
    """Hand in a few items at a time, so that Ctrl-C waits for what runs and not for everything."""
    queue = iter(enumerate(items))
    waiting: dict[Future[R], int] = {}
    try:
        while True:
            for number, item in islice(queue, at_hand - len(waiting)):
                waiting[pool.submit(work, item)] = number
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise StoreError("A process that was reading cases has died, probably for lack of memory. Give the same "
                         "command again with fewer --jobs: finished cases are kept.") from error  # fmt: skip
    finally:
        for future in waiting:
            future.cancel()
