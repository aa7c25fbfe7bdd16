"""Faults planted in concatenation strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.testing import check_concat


@dataclass(frozen=True)
class StripLayout(Layout):
    """All slices side by side at the top of the canvas."""


class Strip(ConcatStrategy):
    """A sound and simple strategy; the faulty ones below differ from it in one thing."""

    name = "strip"

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> StripLayout:  # fmt: skip
        height, width, depth = shape
        if height > canvas or width * depth > canvas:
            raise UsageError(f"A strip of {shape} needs a canvas of {max(height, width * depth)} pixels.")
        return StripLayout(shape, canvas)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        height, width, depth = layout.shape
        canvas = volumes.new_full((*volumes.shape[:-3], layout.canvas, layout.canvas), fill)
        canvas[..., :height, : width * depth] = volumes.flatten(-2)
        return canvas.unsqueeze(-3)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        height, width, depth = layout.shape
        return canvases.squeeze(-3)[..., :height, : width * depth].unflatten(-1, (width, depth))


class TurnedStrip(Strip):
    """Comes back upside down."""

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout).flip(-3)


class LeakyStrip(Strip):
    """Exact there and back by memory, though the last slice is not on the canvas."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        self.kept = volumes
        canvas = super().forward(volumes, layout, fill)
        canvas[..., layout.shape[1] * layout.shape[2] - 1] = fill
        return canvas

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return self.kept


class UnfilledStrip(Strip):
    """Ignores `fill`, so padding of labels would be class 0."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes, layout, 0)


class FloatStrip(Strip):
    """Labels become floats."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes.float(), layout, fill)


class SlowStrip(Strip):
    """One slice at a time."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        canvas = super().forward(volumes, layout, fill)
        for index in range(layout.shape[2]):
            canvas[..., 0, : layout.shape[0], index : layout.shape[1] * layout.shape[2] : layout.shape[2]].mul_(1)
        return canvas


class MixingStrip(Strip):
    """Volumes of one batch see each other."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        volumes = volumes - volumes.mean() if volumes.ndim > 3 else volumes
        return super().forward(volumes, layout, fill)


class DicedStrip(Strip):
    """Each plan draws its own order of slices, whatever ``draw`` is."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        layout = super().plan(shape, canvas)
        object.__setattr__(layout, "count", 1)
        self.shifts = {**getattr(self, "shifts", {}), id(layout): len(getattr(self, "shifts", {}))}
        self.alive = [*getattr(self, "alive", []), layout]
        return layout

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes.roll(self.shifts[id(layout)], -1), layout, fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout).roll(-self.shifts[id(layout)], -1)


class CurtStrip(Strip):
    """Refuses without a word of help."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        try:
            return super().plan(shape, canvas)
        except UsageError:
            raise UsageError("No.") from None


class NeverFits(Strip):
    """Refuses everything."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        raise UsageError("Nothing fits on any canvas, do not even try.")


class InexactStrip(Strip):
    """States a tolerance that it does not keep."""

    exact = False
    tolerance = 0.01

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout) * 0.9


def test_the_sound_strip_passes() -> None:
    check_concat(Strip)


@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (TurnedStrip, "is off by"),
        (LeakyStrip, "voxels are not on the canvas"),
        (UnfilledStrip, "do not hold `fill`"),
        (FloatStrip, "become torch.float32"),
        (SlowStrip, "loops over them in Python"),
        (MixingStrip, "not laid out independently"),
        (DicedStrip, "two plans of draw 0 differ"),
        (CurtStrip, "without saying what would fit"),
        (NeverFits, "refuses every shape"),
        (InexactStrip, "though the strategy states 0.0"),
    ],
)
def test_a_faulty_strategy_is_found(strategy: type[ConcatStrategy], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_concat(strategy)
