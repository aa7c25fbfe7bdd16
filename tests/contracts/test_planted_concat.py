"""Faults planted in concatenation strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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


class OtherSideStrip(Strip):
    """Its layouts have another side than the one asked for."""

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        super().plan(shape, canvas)
        return StripLayout(shape, canvas + 1)


class BlurredLabelStrip(Strip):
    """Exact for images; labels come back one higher."""

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        volumes = super().inverse(canvases, layout)
        return volumes if volumes.is_floating_point() else volumes + 1


class ShiftedImageStrip(Strip):
    """Images and labels both come back, but stand in different places."""

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        shift = int(volumes.is_floating_point())
        return super().forward(volumes.roll(shift, -3), layout, fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return super().inverse(canvases, layout).roll(-int(canvases.is_floating_point()), -3)


class Twice(Strip):
    """The strip on two canvases, averaged; the faulty ones below differ from it in one thing."""

    averages = True

    def plan(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        return replace(super().plan(shape, canvas), count=2)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes, layout, fill).repeat_interleave(2, -3)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        first, second = (super(Twice, self).inverse(canvases[..., [n], :, :], layout) for n in (0, 1))
        return (first + second) / 2 if canvases.is_floating_point() else first


class LastOfTwo(Twice):
    """Forgets the first canvas."""

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        return Strip.inverse(self, canvases[..., [1], :, :], layout)


class SilentTwice(Twice):
    """Does not say that it averages."""

    averages = False


class WrongSome(Twice):
    """Lays out other canvases than the chosen ones."""

    def forward_some(self, volumes: Tensor, layout: Layout, fill: float, chosen: Sequence[int]) -> Tensor:
        return super().forward_some(volumes + 1, layout, fill, chosen)


class DicedTraining(Strip):
    """Turns training volumes at its own whim."""

    def plan_training(self, shape: Triple, canvas: int, **options: Any) -> StripLayout:
        self.turned = not getattr(self, "turned", False)
        return super().plan(shape, canvas)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        return super().forward(volumes.flip(-3) if getattr(self, "turned", False) else volumes, layout, fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        volumes = super().inverse(canvases, layout)
        return volumes.flip(-3) if getattr(self, "turned", False) else volumes


@pytest.mark.parametrize("strategy", [Strip, Twice])
def test_the_sound_ones_pass(strategy: type[ConcatStrategy]) -> None:
    check_concat(strategy)


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
        (OtherSideStrip, "not the shape and canvas asked for"),
        (BlurredLabelStrip, "labels come back with new values"),
        (ShiftedImageStrip, "laid out otherwise than its labels"),
        (LastOfTwo, "from the mean over all places"),
        (SilentTwice, "`averages` is False"),
        (WrongSome, "`forward_some` differs"),
        (DicedTraining, "two plans for fine-tuning of draw 3 differ"),
    ],
)
def test_a_faulty_strategy_is_found(strategy: type[ConcatStrategy], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_concat(strategy)
