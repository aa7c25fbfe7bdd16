"""A volume from three sides: grids of its slices along D, W and H, class probabilities averaged. Beyond the paper.

Where D runs from foot to head these are the axial, coronal and sagittal slices. A plane with more slices than a canvas
has tiles gets several canvases, of equally many consecutive slices each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import Geometry, GridLayout, checked, expect, grid_layout, lay_out, own, take_apart

#: which axes of the volume are height, width and depth of a plane's stack of slices
PLANES = ((-3, -2, -1), (-3, -1, -2), (-2, -1, -3))
STACK = (-3, -2, -1)
GEOMETRIES: tuple[Geometry, ...] = ("official", "paper")


@dataclass(frozen=True)
class Plane:
    """The slices along ``axes[2]``: ``depth`` of them on ``count`` canvases, of which ``grid`` is one."""

    axes: tuple[int, int, int]
    depth: int
    count: int
    grid: GridLayout

    def forward(self, volumes: Tensor, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., count, S, S)``."""
        stack = volumes.movedim(self.axes, STACK)
        each = self.grid.shape[2]
        stack = F.pad(stack, (0, self.count * each - self.depth), value=fill)
        groups = torch.unflatten(stack, -1, (self.count, each)).movedim(-2, -4)
        return lay_out(groups, self.grid, fill)

    def inverse(self, canvases: Tensor) -> Tensor:
        """Take ``(..., count, S, S)`` apart into ``(..., H, W, D)``."""
        stack = take_apart(canvases, self.grid).movedim(-4, -2).flatten(-2)
        return stack[..., : self.depth].movedim(STACK, self.axes)


@dataclass(frozen=True)
class TriPlanarLayout(Layout):
    """The canvases of all planes, one plane after the other."""

    planes: tuple[Plane, ...] = ()

    @property
    def ranges(self) -> list[range]:
        """The numbers of each plane's canvases."""
        ends = [sum(plane.count for plane in self.planes[: i + 1]) for i in range(len(self.planes))]
        return [range(end - plane.count, end) for end, plane in zip(ends, self.planes, strict=True)]


class TriPlanar(ConcatStrategy):
    """Three canvases or more; exact, because copies of one value average to that value."""

    name = "tri-planar"
    averages = True

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> TriPlanarLayout:  # fmt: skip
        """See `ConcatStrategy.plan`; nothing is ever lost. UsageError if a slice does not fit, or is a line."""
        shape = checked(shape)
        size = "x".join(map(str, shape))
        if min(shape) == 1:
            raise UsageError(f"tri-planar looks at a volume from three sides, but {size} voxels are a single slice, "
                             "a line from two of them. Use --concat grid, or a deeper tuning.patch.")  # fmt: skip
        if max(shape) > canvas:  # the longest side is a side of two planes' slices
            raise UsageError(f"A volume of {size} voxels has slices that are larger than a canvas of {canvas}x{canvas} "
                             f"pixels. Set tuning.canvas={max(shape)} or more, choose a smaller tuning.patch, or use "
                             "--concat patches.")  # fmt: skip
        planes = tuple(_plane(shape, axes, canvas) for axes in PLANES)
        return TriPlanarLayout(shape, canvas, sum(plane.count for plane in planes), planes)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., N, S, S)``: canvases along D, then W, then H."""
        return self.forward_some(volumes, layout, fill, range(layout.count))

    def forward_some(self, volumes: Tensor, layout: Layout, fill: float, chosen: Sequence[int]) -> Tensor:
        """The canvases ``chosen``; planes of which there is none are not laid out."""
        laid = own(layout, TriPlanarLayout)
        expect(volumes, laid.shape, "volumes")
        parts, order = [], []
        for plane, numbers in zip(laid.planes, laid.ranges, strict=True):
            mine = [n for n in chosen if n in numbers]
            if mine:
                parts.append(plane.forward(volumes, fill)[..., [n - numbers.start for n in mine], :, :])
                order += mine
        return torch.cat(parts, -3)[..., [order.index(n) for n in chosen], :, :]

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., N, S, S)`` apart into ``(..., H, W, D)``: the mean of the planes, or the labels of the first."""
        laid = own(layout, TriPlanarLayout)
        expect(canvases, (laid.count, laid.canvas, laid.canvas), "canvases")
        first, *others = (
            plane.inverse(canvases[..., numbers.start : numbers.stop, :, :])
            for plane, numbers in zip(laid.planes, laid.ranges, strict=True)
        )
        if not canvases.is_floating_point():
            return first
        # Not the plain mean, which rounds: three thirds of a value are not always the value.
        start = first.to(torch.promote_types(first.dtype, torch.float32))
        excess = torch.stack([other - start for other in others]).sum(0)
        return (start + excess / len(laid.planes)).to(first.dtype)


@lru_cache(maxsize=64)
def _plane(shape: Triple, axes: tuple[int, int, int], canvas: int) -> Plane:
    """One plane of ``shape`` on as few canvases as lose nothing: of the official geometry, else of touching tiles.

    The official tiles may overrun the canvas by their rounded padding, and the one slice of a canvas may stand there;
    one tile that touches nothing always fits.
    """
    height, width, depth = (shape[axis] for axis in axes)
    shares = [-(-depth // groups) for groups in range(1, depth + 1)]
    grids = (grid_layout((height, width, each), canvas, geometry) for geometry in GEOMETRIES for each in shares)
    grid = next(grid for grid in grids if grid and grid.lossless)
    return Plane(axes, depth, -(-depth // grid.shape[2]), grid)


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [TriPlanar]
