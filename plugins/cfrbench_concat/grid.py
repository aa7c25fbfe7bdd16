"""The paper's concatenation: slices side by side, row by row, on one square canvas.

Geometry of ``ShumengLI/CFR`` code/utils/util.py (``Spread_bs_tensor``, ``sam_test_tensor``), bit for bit where it is
right. Slice k stands transposed: tile rows run along W, tile columns along H. The official code decides on the sign of
one axis' margin for both, which crashes or returns an empty image for some non-square slices; here each axis is
treated by itself, which changes nothing for square ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.volume import IGNORE

Geometry = Literal["official", "paper"]


@dataclass(frozen=True)
class Axis:
    """Tiles along one side of the canvas, in pixels: ``count`` tiles of ``side + 2 * pad``, the first at ``margin``.

    A negative margin means that the tiles need more room than there is; the excess is cut off, half at each end.
    """

    side: int
    count: int
    pad: int
    margin: int

    @property
    def tile(self) -> int:
        """Distance between two tiles."""
        return self.side + 2 * self.pad

    @property
    def spill(self) -> int:
        """Voxels that a negative margin cuts off the first tile, beyond its padding; off the last at most as many."""
        return max(0, -self.margin - self.pad)

    @property
    def start(self) -> int:
        """First voxel of the first tile on a canvas enlarged by `spill` at both ends."""
        return self.margin + self.pad + self.spill

    def lost(self, first: int, last: int, canvas: int) -> int:
        """Voxels of tiles ``first`` to ``last`` that stand beyond an edge of the canvas."""
        begin = self.margin + self.pad
        return max(0, -(begin + first * self.tile), begin + last * self.tile + self.side - canvas)


@dataclass(frozen=True)
class GridLayout(Layout):
    """Tiles of a canvas in row-major order; slice 0 of the volume is on tile number ``lead``."""

    rows: Axis = Axis(1, 1, 0, 0)  # along W, as the slices stand transposed
    cols: Axis = Axis(1, 1, 0, 0)  # along H
    lead: int = 0

    @property
    def placed(self) -> int:
        """Slices that have a tile; fewer than D only with ``overflow="official"``."""
        return min(self.shape[2], self.rows.count * self.cols.count - self.lead)

    @property
    def lost_rim(self) -> int:
        """Voxels cut off the outermost tiles that hold a slice; cut blank tiles do not matter."""
        (top, left), (bottom, right) = (divmod(t, self.cols.count) for t in (self.lead, self.lead + self.placed - 1))
        if bottom > top:
            left, right = 0, self.cols.count - 1
        return max(self.rows.lost(top, bottom, self.canvas), self.cols.lost(left, right, self.canvas))

    @property
    def lossless(self) -> bool:
        """Whether every voxel stands on the canvas."""
        return self.placed == self.shape[2] and not self.lost_rim


class Grid(ConcatStrategy):
    """Rows of slices on one canvas; exact."""

    name = "grid"

    class Config(Frozen):
        """geometry: ``official`` fits as many tiles as the canvas takes, ``paper`` exactly ceil(sqrt(D)) a side."""

        geometry: Geometry = "official"

    config: Config

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> GridLayout:  # fmt: skip
        """See `ConcatStrategy.plan`; ``draw`` has no meaning here. UsageError says what would fit."""
        layout = _layout(shape, canvas, self.config.geometry)
        if layout is None:
            raise UsageError(_refusal(shape, canvas, "not a single tile fits", self.smallest_canvas(shape)))
        if overflow == "refuse" and not layout.lossless:
            raise UsageError(_refusal(shape, canvas, _loss(layout), self.smallest_canvas(shape)))
        return layout

    def smallest_canvas(self, shape: Triple) -> int:
        """Side in pixels of the smallest canvas on which volumes of ``shape`` lose nothing."""
        return smallest_canvas(shape, self.config.geometry)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., 1, S, S)``; ``fill`` goes where no slice is (0 image, 255 label)."""
        grid = _own(layout)
        _expect(volumes, grid.shape, "volumes")
        side, rows, cols = grid.canvas, grid.rows.spill, grid.cols.spill
        canvas = volumes.new_full((*volumes.shape[:-3], side + 2 * rows, side + 2 * cols), fill)
        tiles = _tiles(canvas, grid)
        slices = _slices(volumes)
        for chosen, grid_rows, grid_cols in _blocks(grid.lead, grid.lead + grid.placed, grid.cols.count):
            block = tiles[..., grid_rows, grid_cols, :, :]
            block.copy_(slices[..., chosen, :, :].reshape(block.shape))
        return canvas[..., rows : rows + side, cols : cols + side].unsqueeze(-3)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., 1, S, S)`` apart into ``(..., H, W, D)``, a view of memory that holds the slices first.

        What a lossy layout could not hold comes back as the official code returns it: 255 where rims were cut (also
        in probability maps), 0 in slices without a tile.
        """
        grid = _own(layout)
        _expect(canvases, (1, grid.canvas, grid.canvas), "canvases")
        canvas = canvases.squeeze(-3)
        rows, cols = grid.rows.spill, grid.cols.spill
        if rows or cols:
            canvas = F.pad(canvas, (cols, cols, rows, rows), value=IGNORE)
        slices = _tiles(canvas, grid).flatten(-4, -3).narrow(-3, grid.lead, grid.placed)
        if grid.placed < grid.shape[2]:
            slices = F.pad(slices, (0, 0, 0, 0, 0, grid.shape[2] - grid.placed))
        return slices.movedim((-3, -2), (-1, -2))


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Grid]


def smallest_canvas(shape: Triple, geometry: Geometry = "official") -> int:
    """Side in pixels of the smallest canvas that `Grid` accepts for volumes of ``shape``."""
    height, width, depth = _checked(shape)
    # No canvas smaller than a slice or than all voxels together. A smaller canvas may fit where a larger one does not
    # (rounded padding cuts rims), so sides are tried one by one.
    lowest = max(height, width, math.isqrt(height * width * depth))
    fits = (side for side in count(lowest) if (plan := _layout(shape, side, geometry)) and plan.lossless)
    return next(fits)


# ---------------------------------------------------------------------------------------------------------------------
# geometry


def _layout(shape: Triple, canvas: int, geometry: Geometry) -> GridLayout | None:
    """The layout, lossy or not; None if no tile fits."""
    height, width, depth = shape = _checked(shape)
    if geometry == "paper":
        # Section III-B: d x d slices, blank ones after all others. It leaves open how the image becomes a canvas of
        # fixed side; here the tiles touch and stand in the middle.
        per_side = math.isqrt(depth - 1) + 1
        if per_side * max(height, width) > canvas:
            return None
        rows, cols = (Axis(side, per_side, 0, (canvas - per_side * side) // 2) for side in (width, height))
        return GridLayout(shape, canvas, rows=rows, cols=cols)
    if max(height, width) > canvas:
        return None
    rows, cols = _official_axis(width, canvas), _official_axis(height, canvas)
    # Blank slices: half in front, half (and the odd one) behind.
    return GridLayout(shape, canvas, rows=rows, cols=cols, lead=max((rows.count * cols.count - depth) // 2, 0))


def _official_axis(side: int, canvas: int) -> Axis:
    tiles = canvas // side
    pad = round((canvas / tiles - side) / 2)  # a half goes to the even side, as in the original
    return Axis(side, tiles, pad, (canvas - tiles * (side + 2 * pad)) // 2)


def _checked(shape: Triple) -> Triple:
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"A grid lays out volumes (H, W, D) of at least one voxel a side, not {tuple(shape)}. "
                         "Correct the patch.")  # fmt: skip
    height, width, depth = (int(side) for side in shape)
    return height, width, depth


def _loss(layout: GridLayout) -> str:
    """What a lossy layout loses, in words."""
    rows, cols = layout.rows, layout.cols
    if layout.placed < layout.shape[2]:
        return f"its {rows.count} x {cols.count} tiles hold {layout.placed} of {layout.shape[2]} slices"
    return (f"tiles rounded up to {cols.tile}x{rows.tile} pixels overrun it and would cut "
            f"{layout.lost_rim} voxels off the rims of slices")  # fmt: skip


def _refusal(shape: Triple, canvas: int, reason: str, smallest: int) -> str:
    height, width, depth = shape
    return (f"A volume of {height}x{width}x{depth} voxels does not fit on a canvas of {canvas}x{canvas} pixels as a "
            f"grid: {reason}. The smallest canvas for it is {smallest} (tuning.canvas={smallest}); or choose a smaller "
            "tuning.patch.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# pixels


def _blocks(first: int, last: int, width: int) -> Iterator[tuple[slice, slice, slice]]:
    """Split tiles ``first ... last - 1`` into at most three rectangles: a begun row, whole rows, a part of a row.

    Each is (tiles counted from ``first``, grid rows, grid columns).
    """
    head = min(last, -(-first // width) * width)
    tail = max(head, last // width * width)
    for begin, end in ((first, head), (head, tail), (tail, last)):
        if begin < end:
            rows = slice(begin // width, (end - 1) // width + 1)
            yield slice(begin - first, end - first), rows, slice(begin % width, (end - 1) % width + 1)


def _slices(volumes: Tensor) -> Tensor:
    """Volumes ``(..., H, W, D)`` as transposed slices ``(..., D, W, H)``."""
    turned = volumes.transpose(-3, -2)
    if volumes.is_cpu and volumes.stride(-1) == 1:
        # Reversing three axes at once reads one number per cache line; swapping two at a time is 1.0-4.2 times faster
        # (56x56x40 to 128x128x64, fp32 and uint8, one thread). Volumes held slices-first need none of this.
        turned = turned.contiguous()
    return turned.movedim(-1, -3)


def _tiles(canvas: Tensor, grid: GridLayout) -> Tensor:
    """The voxels of all tiles as a view ``(..., n_rows, n_cols, W, H)`` of a canvas ``(..., S, S)``."""
    rows, cols = grid.rows, grid.cols
    windows = canvas[..., rows.start :, cols.start :].unfold(-2, rows.side, rows.tile).unfold(-2, cols.side, cols.tile)
    # Margins may leave room for one more window than there are tiles.
    return windows[..., : rows.count, : cols.count, :, :]


def _own(layout: Layout) -> GridLayout:
    if not isinstance(layout, GridLayout):
        raise UsageError(f"A grid was handed a {type(layout).__name__}. Pass the layout that its own `plan` returned.")
    return layout


def _expect(tensor: Tensor, shape: Triple, what: str) -> None:
    if tuple(tensor.shape[-3:]) != shape:
        raise UsageError(f"This grid layout is for {what} of shape (..., {', '.join(map(str, shape))}), but was given "
                         f"{tuple(tensor.shape)}. Plan a layout for that shape.")  # fmt: skip
