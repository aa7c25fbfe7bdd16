"""n x n consecutive slices on each canvas, resampled in plane to fill it (Section IV, Figure 5b)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cfrbench.canvas import resample
from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import Axis, GridLayout, as_volumes, checked, expect, lay_out, own, take_apart, transposed_slices
from cfrbench.windows import Windows, cover, cut, mean


@dataclass(frozen=True, kw_only=True)
class ScaledLayout(Layout):
    """Groups of consecutive slices, a canvas each, and the grid of n x n resampled slices that every canvas is."""

    groups: Windows
    grid: GridLayout


class Scaled(ConcatStrategy):
    """Larger tiles, fewer of them; n = 1 shows one slice at a time, n = ceil(sqrt(D)) all of them, as `grid` does.

    Training shows n x n slices from a random start, as ``Spread_bs_aug_scale`` does (ShumengLI/CFR code/utils/util.py).
    Prediction covers all slices; the last group overlaps its neighbour, and what is said twice is averaged. The
    official ``sam_test_scale`` cannot run; as written it would drop the slices after the last whole group, which
    ``overflow="official"`` does here. Not exact: images are resampled there and back, labels by picking pixels.
    """

    name = "scaled"
    exact = False
    tolerance = 0.05  # on linear ramps; less than a pixel of slice or tile, whichever is coarser
    averages = True

    class Config(Frozen):
        """``sampling="official"`` reproduces the original: squares of canvas // n - 8 pixels, sampled off-centre.

        There, pixel i of a tile shows coordinate ``i * old / new`` of the slice and those beyond its last half voxel
        show 0, also in labels; a slice is shrunk even where it would fit (9 x 9 of 112 pixels on 1024). The journal
        version calls 9 x 9 the LA volume without down-sampling, so by default what fits is not shrunk.
        """

        n: int = Field(2, ge=1, description="tiles along each side of a canvas")
        rim: int = Field(4, ge=0, description="blank pixels around each tile, fewer where a slice then fits unreduced")
        sampling: Literal["centred", "official"] = Field("centred", description="where pixels are sampled")

    config: Config

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> ScaledLayout:  # fmt: skip
        """See `ConcatStrategy.plan`. UsageError says what would fit."""
        shape, per_canvas = self._fitted(shape, canvas)
        groups = cover(shape, (*shape[:2], per_canvas), 0.0)
        if overflow == "official":
            whole = tuple(range(0, shape[2] - per_canvas + 1, per_canvas))
            groups = replace(groups, shape=(*shape[:2], len(whole) * per_canvas), starts=(*groups.starts[:2], whole))
        return ScaledLayout(shape, canvas, groups.count, groups=groups, grid=self._grid(groups.patch, canvas))

    def plan_training(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
                      draw: int = 0, done: float = 0.0) -> ScaledLayout:  # fmt: skip
        """A canvas for every start there is, of which fine-tuning draws."""
        return self.starting_at(range(max(1, shape[2] - self.config.n**2 + 1)), shape, canvas)

    def starting_at(self, starts: Sequence[int], shape: Triple, canvas: int) -> ScaledLayout:
        """A layout of the groups whose first slices are ``starts``; an `inverse` needs groups that cover the volume."""
        shape, per_canvas = self._fitted(shape, canvas)
        patch = (*shape[:2], per_canvas)
        groups = Windows(shape, patch, ((0,), (0,), tuple(starts)))
        return ScaledLayout(shape, canvas, groups.count, groups=groups, grid=self._grid(patch, canvas))

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., N, S, S)``; ``fill`` goes where no slice is (0 image, 255 label)."""
        return self.forward_some(volumes, layout, fill, range(layout.count))

    def forward_some(self, volumes: Tensor, layout: Layout, fill: float, chosen: Sequence[int]) -> Tensor:
        """Lay out the groups ``chosen`` alone."""
        plan = own(layout, ScaledLayout)
        expect(volumes, plan.shape, "volumes")
        groups = cut(volumes[..., : plan.groups.shape[2]], plan.groups, chosen)
        return lay_out(self._resized(groups, plan.grid.shape, forth=True), plan.grid, fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., N, S, S)`` apart into ``(..., H, W, D)``, the mean where groups overlap; 0 in dropped slices."""
        plan = own(layout, ScaledLayout)
        expect(canvases, (plan.count, plan.canvas, plan.canvas), "canvases")
        groups = self._resized(take_apart(canvases, plan.grid), plan.groups.patch, forth=False)
        return F.pad(mean(groups, plan.groups), (0, plan.shape[2] - plan.groups.shape[2]))

    def _fitted(self, shape: Triple, canvas: int) -> tuple[Triple, int]:
        """The shape and the number of slices on one canvas; UsageError if n suits neither volume nor canvas."""
        height, width, depth = shape = checked(shape)
        n, smallest = self.config.n, 1 + 2 * self.config.rim
        least = smallest if self.config.sampling == "official" else min(smallest, max(height, width))
        if n > 1 and (n - 1) ** 2 >= depth:
            most = math.isqrt(depth - 1) + 1
            raise UsageError(f"concat.scaled.n={n} lays {n * n} slices on a canvas, but a volume of "
                             f"{height}x{width}x{depth} voxels has {depth}, which n={most} holds already. "
                             f"Choose n from 1 to {most}, or a deeper tuning.patch.")  # fmt: skip
        if canvas // n < least:
            raise UsageError(f"concat.scaled.n={n} leaves tiles of {canvas // n} pixels on a canvas of "
                             f"{canvas}x{canvas}, too few for a slice of {height}x{width} with a rim of "
                             f"{self.config.rim}. Choose n up to {max(1, canvas // smallest)}, or "
                             f"tuning.canvas={n * smallest}.")  # fmt: skip
        return shape, min(n * n, depth)

    def _grid(self, patch: Triple, canvas: int) -> GridLayout:
        """The grid of one group on one canvas."""
        height, width, depth = patch
        n, cell = self.config.n, canvas // self.config.n
        side = cell - 2 * self.config.rim
        if self.config.sampling == "official":
            rows, cols = (Axis(side, n, self.config.rim, 0) for _ in range(2))
            return GridLayout((side, side, depth), canvas, rows=rows, cols=cols)
        longest = max(height, width)
        side = max(side, longest) if longest <= cell else side
        height, width = (max(1, round(length * side / longest)) for length in (height, width))
        rows, cols = (Axis(length, n, (cell - length) // 2, 0) for length in (width, height))
        rows, cols = (replace(axis, margin=(canvas - n * axis.tile) // 2) for axis in (rows, cols))
        return GridLayout((height, width, depth), canvas, rows=rows, cols=cols)

    def _resized(self, groups: Tensor, shape: Triple, *, forth: bool) -> Tensor:
        """``(..., H, W, D)`` with another H and W, on the way ``forth`` to the canvas or back."""
        height, width, _ = shape
        slices = transposed_slices(groups)
        if self.config.sampling == "centred":
            # On the way back without antialiasing, as logits are brought back everywhere: it would blur what is exact.
            return as_volumes(resample(slices, (width, height), antialias=forth))
        return as_volumes(_off_centre(_off_centre(slices, -2, width, forth), -1, height, forth))


def _off_centre(slices: Tensor, axis: int, length: int, blank: bool) -> Tensor:
    """Pixel i shows coordinate ``i * old / length``: linear for floats, nearest (halves up) for integers.

    What SimpleITK's resampling gives with the origin left as it was. Its rounding of coordinates decides halves: from
    row to row it multiplies a spacing, along a row it divides the whole way. ``blank``: 0 beyond the last half voxel.
    """
    old = slices.shape[axis]
    pixels = torch.arange(length, dtype=torch.float64, device=slices.device)
    spacing = old / length
    at = pixels * spacing if axis == -2 else pixels / length * (length * spacing)
    if slices.is_floating_point():
        low = at.floor().long().clamp(max=old - 1)
        weight = (at - low).clamp(max=1.0).to(slices.dtype).view(-1, *(1,) * (-1 - axis))
        high = (low + 1).clamp(max=old - 1)
        shown = torch.lerp(slices.index_select(axis, low), slices.index_select(axis, high), weight)
    else:
        shown = slices.index_select(axis, (at + 0.5).floor().long().clamp(max=old - 1))
    outside = (at >= old - 0.5).view(-1, *(1,) * (-1 - axis))
    return shown.masked_fill(outside, 0) if blank else shown


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Scaled]
