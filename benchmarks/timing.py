"""Compares two ways of doing one thing, fairly on a machine that others use too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter, process_time


@dataclass(frozen=True)
class Comparison:
    """Best seconds of the plain and of the fast way: other processes only ever add time."""

    plain: float
    fast: float

    @property
    def ratio(self) -> float:
        """How many times faster the fast way is."""
        return self.plain / self.fast

    def __str__(self) -> str:
        return f"{1e3 * self.plain:.2f} ms / {1e3 * self.fast:.3f} ms = {self.ratio:.1f}x"


def compare(plain: Callable[[], object], fast: Callable[[], object], rounds: int = 5, repeats: int = 5) -> Comparison:
    """Time both in turn, ``rounds`` times after a warm-up, the fast one over ``repeats`` calls each time."""
    plain(), fast()
    pairs = [(seconds(plain), seconds(fast, repeats)) for _ in range(rounds)]
    return Comparison(min(p for p, _ in pairs), min(f for _, f in pairs))


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Mean wall-clock seconds of ``repeats`` calls."""
    start = perf_counter()
    for _ in range(repeats):
        work()
    return (perf_counter() - start) / repeats


def medians(work: Callable[[int], object], times: int) -> tuple[float, float]:
    """Median seconds and processor seconds of calls with the numbers 1 to ``times``."""
    spent = [clocked(work, number) for number in range(1, times + 1)]
    return median(wall for wall, _ in spent), median(processor for _, processor in spent)


def clocked(work: Callable[[int], object], number: int) -> tuple[float, float]:
    """Seconds and processor seconds of one call."""
    began, worked = perf_counter(), process_time()
    work(number)
    return perf_counter() - began, process_time() - worked
