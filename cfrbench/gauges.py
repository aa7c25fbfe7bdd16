"""What stages measure of themselves: times, memory, sizes. It stands in manifests and is never part of a key."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn

from cfrbench.contracts import Promptable


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
