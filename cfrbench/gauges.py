"""What stages measure of themselves: times, memory, sizes, lost classes. It is logged and never part of a key."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn

from cfrbench.contracts import Promptable
from cfrbench.hookspecs import LOST

#: how often a network is looked at in one training
LOOKS = 20


@dataclass
class Laps:
    """Wall-clock seconds of pieces of work that follow each other or are timed one by one."""

    seconds: list[float] = field(default_factory=list)
    _last: float | None = None

    def lap(self) -> None:
        """One piece has ended and the next begins; the first call only begins."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time one piece by itself."""
        began = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - began)

    @property
    def typical(self) -> float | None:
        """The median, which neither warming up nor a checkpoint moves; None if nothing was timed."""
        return round(median(self.seconds), 6) if self.seconds else None


class ClassWatch:
    """Notices foreground classes that have collapsed: not one voxel of them is found where they are labelled.

    Two looks in a row without one, because a crop may hold just a rim of a class; and a class that was never found
    counts only in the second half of training, because small ones are learnt late.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._found = [False] * len(names)
        self._misses = [0] * len(names)
        self._late = False

    def due(self, step: int, total: int) -> bool:
        """Whether to look after the 0-based ``step``."""
        return bool(self._names) and (step + 1) % max(1, total // LOOKS) == 0

    def look(self, predicted: Tensor, label: Tensor, *, late: bool) -> None:
        """Compare label maps of any one shape; ``late``: in the second half of training."""
        self._late = late
        right = label[predicted == label]
        for index in range(1, len(self._names)):
            if bool((right == index).any()):
                self._found[index], self._misses[index] = True, 0
            elif bool((label == index).any()):
                self._misses[index] += 1

    @property
    def lost(self) -> dict[str, float]:
        """A value ``lost NAME`` for each class that has collapsed, as observers of steps take it."""
        gone = (found or self._late for found in self._found)
        return {LOST + name: 1.0 for name, misses, counts in zip(self._names, self._misses, gone, strict=True)
                if misses > 1 and counts}  # fmt: skip


@contextmanager
def counted_inputs(network: nn.Module) -> Iterator[list[int]]:
    """Count what goes through ``network``: the length of each batch ``(B, ...)`` it is given."""
    batches: list[int] = []

    def count(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        batches.append(arguments[0].shape[0])

    handle = network.register_forward_pre_hook(count)
    try:
        yield batches
    finally:
        handle.remove()


def sizes(model: Promptable) -> dict[str, Any]:
    """Numbers of a fine-tuned model as it trained: all parameters, those flagged trainable, image tokens of an input.

    tokens: positions of the embedding that the prompt encoder is made for; None if it does not say.
    """
    grid = getattr(model.prompt_encoder, "image_embedding_size", None)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens": None if grid is None else math.prod(grid),
    }
