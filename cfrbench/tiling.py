"""Slices side by side, row by row, on one square canvas, or one by one: the geometry that strategies share.

Geometry of ``ShumengLI/CFR`` code/utils/util.py (``Spread_bs_tensor``, ``sam_test_tensor``), bit for bit where it is
right. Slice k stands transposed: tile rows run along W, tile columns along H. The official code decides on the sign of
one axis' margin for both, which crashes or returns an empty image for some non-square slices; here each axis is
treated by itself, which changes nothing for square ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.volume import IGNORE

Geometry = Literal["official", "paper"]
L = TypeVar("L", bound=Layout)

#: bytes of volumes that are laid out together: what is turned is then still in the processor's cache when it is placed
CACHED = 1 << 20


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
    """Tiles of a canvas, numbered row by row. Slice k is on tile ``tiles[k]``, or on ``lead + k`` if that is empty.

    A number beyond the last tile means that the slice has none; only with ``overflow="official"``.
    """

    rows: Axis = Axis(1, 1, 0, 0)  # along W, as the slices stand transposed
    cols: Axis = Axis(1, 1, 0, 0)  # along H
    lead: int = 0
    tiles: tuple[int, ...] = ()

    @property
    def places(self) -> int:
        """Tiles of the canvas, those that stay blank included."""
        return self.rows.count * self.cols.count

    @property
    def held(self) -> list[int]:
        """Slices that have a tile, in order of their tiles' numbers if these are ``lead``, ``lead + 1`` ..."""
        numbers = self.tiles or range(self.lead, self.lead + self.shape[2])
        return [k for k, number in enumerate(numbers) if number < self.places]

    @property
    def placed(self) -> int:
        """Number of slices that have a tile; fewer than D only with ``overflow="official"``."""
        return len(self.held) if self.tiles else min(self.shape[2], self.places - self.lead)

    @property
    def lost_rim(self) -> int:
        """Voxels cut off the outermost tiles that hold a slice; cut blank tiles do not matter."""
        used = np.asarray(self.tiles or range(self.lead, self.lead + self.placed))
        rows, cols = np.divmod(used[used < self.places], self.cols.count)
        return max(
            axis.lost(int(numbers.min()), int(numbers.max()), self.canvas)
            for axis, numbers in ((self.rows, rows), (self.cols, cols))
        )

    @property
    def lossless(self) -> bool:
        """Whether every voxel stands on the canvas."""
        return self.placed == self.shape[2] and not self.lost_rim


class Tiled(ConcatStrategy):
    """Every slice on a tile of one canvas, exact; subclasses choose the geometry or which slice is on which tile."""

    @property
    def geometry(self) -> Geometry:
        """``official`` fits as many tiles as the canvas takes, ``paper`` exactly ceil(sqrt(D)) a side."""
        return "official"

    def arrange(self, layout: GridLayout, draw: int) -> GridLayout:
        """Choose tiles; by default slice after slice, row by row."""
        return layout

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> GridLayout:  # fmt: skip
        """See `ConcatStrategy.plan`. UsageError says what would fit."""
        return planned(lambda side: self._arranged(shape, side, draw), shape, canvas, overflow)

    def smallest_canvas(self, shape: Triple) -> int:
        """Side in pixels of the smallest canvas on which volumes of ``shape`` lose nothing."""
        return smallest_canvas(lambda side: self._arranged(shape, side, 0), shape)

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., 1, S, S)``; ``fill`` goes where no slice is (0 image, 255 label)."""
        return lay_out(volumes, own(layout, GridLayout), fill).unsqueeze(-3)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., 1, S, S)`` apart into ``(..., H, W, D)``; `take_apart` says what lost voxels come back as."""
        grid = own(layout, GridLayout)
        expect(canvases, (1, grid.canvas, grid.canvas), "canvases")
        return take_apart(canvases.squeeze(-3), grid)

    def _arranged(self, shape: Triple, canvas: int, draw: int) -> GridLayout | None:
        layout = grid_layout(shape, canvas, self.geometry)
        return layout and self.arrange(layout, draw)


class SliceBySlice(ConcatStrategy):
    """Every slice a canvas of its own, as small as it can be; exact. Subclasses say what the model makes of it."""

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> Layout:  # fmt: skip
        """See `ConcatStrategy.plan`; every volume fits."""
        shape = checked(shape)
        return Layout(shape, self.canvas_side(shape, canvas), count=shape[2])

    def canvas_side(self, shape: Triple, canvas: int) -> int:
        """The longer side of a slice: ``tuning.canvas`` has no meaning here."""
        return max(shape[:2])

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., D, S, S)``, transposed as in a grid; ``fill`` right of and below it."""
        expect(volumes, layout.shape, "volumes")
        height, width, _ = layout.shape
        return F.pad(transposed_slices(volumes), (0, layout.canvas - height, 0, layout.canvas - width), value=fill)

    def forward_some(self, volumes: Tensor, layout: Layout, fill: float, chosen: Sequence[int]) -> Tensor:
        """Lay out the slices ``chosen`` alone."""
        expect(volumes, layout.shape, "volumes")
        height, width, _ = layout.shape
        return self.forward(volumes[..., list(chosen)], Layout((height, width, len(chosen)), layout.canvas), fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., D, S, S)`` apart into ``(..., H, W, D)``."""
        expect(canvases, (layout.count, layout.canvas, layout.canvas), "canvases")
        height, width, _ = layout.shape
        return as_volumes(canvases[..., :width, :height])


# ---------------------------------------------------------------------------------------------------------------------
# geometry

Layouts = Callable[[int], GridLayout | None]  # side of the canvas -> the layout on it, lossy or not; None: no tile fits


def grid_layout(shape: Triple, canvas: int, geometry: Geometry = "official") -> GridLayout | None:
    """Slice after slice, row by row: the layout, lossy or not; None if no tile fits. UsageError if no volume."""
    height, width, depth = shape = checked(shape)
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


def planned(layouts: Layouts, shape: Triple, canvas: int, overflow: Literal["refuse", "official"]) -> GridLayout:
    """The layout on ``canvas``; UsageError if no tile fits, or if it loses voxels and ``overflow`` is "refuse"."""
    layout = layouts(canvas)
    if layout is None:
        raise UsageError(_refusal(shape, canvas, "not a single tile fits", smallest_canvas(layouts, shape)))
    if overflow == "refuse" and not layout.lossless:
        raise UsageError(_refusal(shape, canvas, _loss(layout), smallest_canvas(layouts, shape)))
    return layout


def smallest_canvas(layouts: Layouts, shape: Triple) -> int:
    """Side in pixels of the smallest canvas on which ``layouts`` loses nothing of a volume of ``shape``."""
    height, width, depth = checked(shape)
    # No canvas smaller than a slice or than all voxels together. A smaller canvas may fit where a larger one does not
    # (rounded padding cuts rims), so sides are tried one by one.
    lowest = max(height, width, math.isqrt(height * width * depth))
    return next(side for side in count(lowest) if (layout := layouts(side)) and layout.lossless)


def checked(shape: Triple) -> Triple:
    """The shape of a volume; UsageError if it is none."""
    if len(shape) != 3 or min(shape) < 1:
        raise UsageError(f"Volumes (H, W, D) of at least one voxel a side can be laid out, not {tuple(shape)}. "
                         "Correct the patch.")  # fmt: skip
    height, width, depth = (int(side) for side in shape)
    return height, width, depth


def _official_axis(side: int, canvas: int) -> Axis:
    tiles = canvas // side
    pad = round((canvas / tiles - side) / 2)  # a half goes to the even side, as in the original
    return Axis(side, tiles, pad, (canvas - tiles * (side + 2 * pad)) // 2)


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


def lay_out(volumes: Tensor, grid: GridLayout, fill: float) -> Tensor:
    """Lay ``(..., H, W, D)`` out as ``(..., S, S)``; ``fill`` goes where no slice is."""
    expect(volumes, grid.shape, "volumes")
    side, rows, cols = grid.canvas, grid.rows.spill, grid.cols.spill
    canvas = volumes.new_empty((*volumes.shape[:-3], side + 2 * rows, side + 2 * cols))
    stack, sheets = volumes[None].flatten(0, -4), canvas[None].flatten(0, -3)
    together = max(1, CACHED // (math.prod(grid.shape) * volumes.element_size()))
    for first in range(0, len(stack), together):
        these = slice(first, first + together)
        _write(transposed_slices(stack[these]), _tiles(sheets[these].fill_(fill), grid), grid)
    return canvas[..., rows : rows + side, cols : cols + side]


def _write(slices: Tensor, tiles: Tensor, grid: GridLayout) -> None:
    """Put ``(n, D, W, H)`` onto the tiles ``(n, n_rows, n_cols, W, H)`` of as many canvases."""
    if grid.tiles:
        held, at_rows, at_cols = _addresses(grid, slices.device)
        tiles[:, at_rows, at_cols] = slices[:, held] if len(held) < grid.shape[2] else slices
        return
    for chosen, grid_rows, grid_cols in _blocks(grid.lead, grid.lead + grid.placed, grid.cols.count):
        block = tiles[:, grid_rows, grid_cols]
        block.copy_(slices[:, chosen].reshape(block.shape))


def take_apart(canvases: Tensor, grid: GridLayout) -> Tensor:
    """Take ``(..., S, S)`` apart into ``(..., H, W, D)``, a view of memory that holds the slices first.

    What a lossy layout could not hold comes back as the official code returns it: 255 where rims were cut (also in
    probability maps), 0 in slices without a tile.
    """
    rows, cols = grid.rows.spill, grid.cols.spill
    if rows or cols:
        canvases = F.pad(canvases, (cols, cols, rows, rows), value=IGNORE)
    tiles = _tiles(canvases, grid)
    missing = grid.shape[2] - grid.placed
    if grid.tiles:
        held, at_rows, at_cols = _addresses(grid, canvases.device)
        slices = tiles[..., at_rows, at_cols, :, :]
        if missing:
            all_slices = slices.new_zeros((*slices.shape[:-3], grid.shape[2], *slices.shape[-2:]))
            slices = all_slices.index_copy(-3, held, slices)
    else:
        slices = tiles.flatten(-4, -3).narrow(-3, grid.lead, grid.placed)
        if missing:
            slices = F.pad(slices, (0, 0, 0, 0, 0, missing))
    return as_volumes(slices)


def transposed_slices(volumes: Tensor) -> Tensor:
    """Volumes ``(..., H, W, D)`` as transposed slices ``(..., D, W, H)``."""
    turned = volumes.transpose(-3, -2)
    if volumes.is_cpu and volumes.stride(-1) == 1:
        # Reversing three axes at once reads one number per cache line; swapping two at a time is 1.0-4.2 times faster
        # (56x56x40 to 128x128x64, fp32 and uint8, one thread). Volumes held slices-first need none of this.
        turned = turned.contiguous()
    return turned.movedim(-1, -3)


def as_volumes(slices: Tensor) -> Tensor:
    """Transposed slices ``(..., D, W, H)`` seen as volumes ``(..., H, W, D)``."""
    return slices.movedim((-3, -2), (-1, -2))


def own(layout: Layout, kind: type[L]) -> L:
    """The layout as one of ``kind``; UsageError if it is of another strategy."""
    if not isinstance(layout, kind):
        raise UsageError(f"A {kind.__name__} is needed, but a {type(layout).__name__} was given. Pass the layout that "
                         "the strategy's own `plan` returned.")  # fmt: skip
    return layout


def expect(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    """UsageError if the last axes of ``tensor`` are not ``shape``."""
    if tuple(tensor.shape[-len(shape) :]) != shape:
        raise UsageError(f"This layout is for {what} of shape (..., {', '.join(map(str, shape))}), but was given "
                         f"{tuple(tensor.shape)}. Plan a layout for that shape.")  # fmt: skip


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


def _addresses(grid: GridLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Slices that have a tile, and the grid row and column of each; for layouts that number their tiles."""
    numbers = torch.tensor(grid.tiles, device=device)
    held = torch.tensor(grid.held, device=device)
    numbers = numbers[held]
    return held, numbers // grid.cols.count, numbers % grid.cols.count


def _tiles(canvas: Tensor, grid: GridLayout) -> Tensor:
    """The voxels of all tiles as a view ``(..., n_rows, n_cols, W, H)`` of a canvas ``(..., S, S)``."""
    rows, cols = grid.rows, grid.cols
    windows = canvas[..., rows.start :, cols.start :].unfold(-2, rows.side, rows.tile).unfold(-2, cols.side, cols.tile)
    # Margins may leave room for one more window than there are tiles.
    return windows[..., : rows.count, : cols.count, :, :]
