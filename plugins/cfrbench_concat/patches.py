"""Volumes that do not fit on one canvas: overlapping patches, each laid out as a grid, class probabilities averaged.

Beyond the paper, which cuts BTCV and MACT into patches before its method begins. Here the crop may be larger than what
a canvas holds, up to the whole volume, and its patches are put together again with their overlaps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import GridLayout, checked, expect, grid_layout, lay_out, own, smallest_canvas, take_apart
from cfrbench.windows import Windows, cover, cut, mean


@dataclass(frozen=True)
class PatchLayout(Layout):
    """Canvas n is the grid of window n."""

    windows: Windows = field(kw_only=True)
    grid: GridLayout = field(kw_only=True)


class Patches(ConcatStrategy):
    """As many canvases as there are patches; exact, because copies of one value average to that value."""

    name = "patches"
    averages = True

    class Config(Frozen):
        """Size and overlap."""

        patch: Triple | None = Field(
            None, description="voxels of a patch; None = the largest cube, cut to the volume, that fits on a canvas"
        )
        overlap: float = Field(0.25, ge=0, lt=1, description="share of a side that neighbours have in common, at least")

    config: Config

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> PatchLayout:  # fmt: skip
        """See `ConcatStrategy.plan`; nothing is ever lost. UsageError if the option's patch does not fit."""
        shape = checked(shape)
        windows = cover(shape, checked(self.config.patch or _largest(shape, canvas)), self.config.overlap)
        grid = grid_layout(windows.patch, canvas)
        if grid is None or not grid.lossless:
            size = "x".join(map(str, windows.patch))
            fits = smallest_canvas(lambda side: grid_layout(windows.patch, side), windows.patch)
            raise UsageError(f"The slices of a patch of {size} voxels do not fit side by side on a canvas of "
                             f"{canvas}x{canvas} pixels. Choose a smaller concat.patches.patch, leave that option "
                             f"out for the largest cube that fits, or set tuning.canvas={fits}.")  # fmt: skip
        return PatchLayout(shape, canvas, windows.count, windows=windows, grid=grid)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., N, S, S)``, a canvas for each patch."""
        return self.forward_some(volumes, layout, fill, range(layout.count))

    def forward_some(self, volumes: Tensor, layout: Layout, fill: float, chosen: Sequence[int]) -> Tensor:
        """The canvases ``chosen``; the other patches are not touched."""
        laid = own(layout, PatchLayout)
        return lay_out(cut(volumes, laid.windows, chosen), laid.grid, fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., N, S, S)`` apart into ``(..., H, W, D)``: the mean over patches, or the first one's labels."""
        laid = own(layout, PatchLayout)
        expect(canvases, (laid.count, laid.canvas, laid.canvas), "canvases")
        return mean(take_apart(canvases, laid.grid), laid.windows)


@lru_cache(maxsize=64)
def _largest(shape: Triple, canvas: int) -> Triple:
    """The largest cube, cut to the volume, whose grid loses nothing; one voxel always fits."""
    height, width, depth = shape
    cubes = ((min(height, p), min(width, p), min(depth, p)) for p in range(max(shape), 0, -1))
    return next(cube for cube in cubes if (grid := grid_layout(cube, canvas)) and grid.lossless)


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Patches]
