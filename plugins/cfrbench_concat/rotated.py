"""The grid with every slice turned and flipped by itself (Section IV, Figure 4): order without common orientation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrbench.canvas import rotflip_canvas, undo_rotflip_canvas
from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.hookspecs import hookimpl
from cfrbench.sampling import generator
from cfrbench.tiling import (
    GridLayout,
    as_volumes,
    checked,
    expect,
    grid_layout,
    lay_out,
    own,
    planned,
    take_apart,
    transposed_slices,
)

Turns = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class RotatedLayout(Layout):
    """A grid of square tiles, and of each slice its quarter turns and the axis that is flipped after them."""

    grid: GridLayout
    turns: Turns


class Rotated(ConcatStrategy):
    """Each slice gets 0-3 quarter turns, then always one flip, new ones for each ``draw``; exact.

    ``flip_2d`` of ``Spread_bs_aug`` (ShumengLI/CFR code/utils/util.py), which takes square slices only. A slice that is
    not square stands here in the middle of a square tile of its longer side. As `shuffled`, it turns the slices of a
    prediction too, always as in draw 0; the official code has no such switch for prediction.
    """

    name = "rotated"

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> RotatedLayout:  # fmt: skip
        """See `ConcatStrategy.plan`. UsageError says what would fit."""
        height, width, depth = shape = checked(shape)
        square = (max(height, width), max(height, width), depth)
        grid = planned(lambda side: grid_layout(square, side), shape, canvas, overflow)
        turns = generator(draw, "concat-rotated", 0).integers([4, 2], size=(depth, 2)).tolist()
        return RotatedLayout(shape, canvas, grid=grid, turns=tuple((k, axis) for k, axis in turns))

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Lay ``(..., H, W, D)`` out as ``(..., 1, S, S)``; ``fill`` goes where no slice is (0 image, 255 label)."""
        plan = own(layout, RotatedLayout)
        expect(volumes, plan.shape, "volumes")
        slices = transposed_slices(volumes)
        if plan.shape[0] != plan.shape[1]:
            slices = F.pad(slices, _rims(plan), value=fill)
        return lay_out(as_volumes(_turned(slices, plan.turns)), plan.grid, fill).unsqueeze(-3)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Take ``(..., 1, S, S)`` apart into ``(..., H, W, D)``."""
        plan = own(layout, RotatedLayout)
        expect(canvases, (1, plan.canvas, plan.canvas), "canvases")
        squares = _turned(transposed_slices(take_apart(canvases.squeeze(-3), plan.grid)), plan.turns, undo=True)
        height, width, _ = plan.shape
        left, _, top, _ = _rims(plan)
        return as_volumes(squares[..., top : top + width, left : left + height])


def _turned(slices: Tensor, turns: Turns, *, undo: bool = False) -> Tensor:
    """Square slices ``(..., D, m, m)``, each turned (or turned back) as ``turns`` says."""
    side = slices.shape[-1]
    numbers = torch.arange(side * side, device=slices.device).view(side, side)
    turn = undo_rotflip_canvas if undo else rotflip_canvas
    kinds = torch.stack([turn(numbers, k, axis) for k in range(4) for axis in range(2)]).flatten(1)
    # Pixel numbers, so that one gathering turns all slices: a third faster than copies for each kind of turn.
    sources = kinds[[2 * k + axis for k, axis in turns]]
    flat = slices.flatten(-2)
    return flat.gather(-1, sources.expand_as(flat)).view(slices.shape)


def _rims(layout: RotatedLayout) -> tuple[int, int, int, int]:
    """Pixels left, right, above and below a transposed slice in its square tile."""
    height, width, _ = layout.shape
    missing = (max(height, width) - height, max(height, width) - width)
    (left, right), (top, bottom) = ((gap // 2, gap - gap // 2) for gap in missing)
    return left, right, top, bottom


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Rotated]
