"""What stands on the canvases of any strategy, seen by laying out slice numbers instead of intensities."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from cfrbench.config import Triple, TuningSection
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.tiling import GridLayout
from cfrbench.volume import IGNORE

#: the number of slice 0; smaller ones are values that mean something else
FIRST = IGNORE + 1
#: canvases that are laid out where there are more: they differ in the slices they show, hardly in how many
LOOKED_AT = 8
#: moments of a fine-tuning at which its layouts are looked at, for strategies that change as it goes on
MOMENTS = 8


@dataclass(frozen=True)
class Contents:
    """What one canvas shows, averaged over a volume's canvases.

    slices: how many of the volume's slices it shows, whole or in part. ignored: the share of its pixels that no
    cross-entropy counts.
    """

    slices: float
    ignored: float


def contents(strategy: ConcatStrategy, layout: Layout) -> Contents:
    """Look at the canvases of ``layout``, or at `LOOKED_AT` of them spread evenly."""
    canvases = strategy.forward_some(_numbered(layout.shape), layout, IGNORE, spread(layout.count, LOOKED_AT))
    found = [torch.unique(canvas) for canvas in canvases]
    return Contents(
        slices=fmean(int((values >= FIRST).sum()) for values in found),
        ignored=float((canvases == IGNORE).double().mean()),
    )


def tiles(layout: Layout) -> tuple[int, int, int] | None:
    """Rows and columns of tiles on each canvas, and how many of them stay blank; None if a canvas is no such grid."""
    grid = layout if isinstance(layout, GridLayout) else getattr(layout, "grid", None)
    if not isinstance(grid, GridLayout):
        return None
    return grid.rows.count, grid.cols.count, grid.places - grid.placed


def slices_per_step(strategy: ConcatStrategy, crop: Triple, section: TuningSection) -> float:
    """Slices of one crop that one step of fine-tuning sees on the canvases it draws; a mean over the whole training."""
    layouts = [
        strategy.plan_training(crop, section.canvas, overflow=section.overflow, draw=moment, done=moment / MOMENTS)
        for moment in range(MOMENTS)
    ]
    return fmean(contents(strategy, layout).slices * min(layout.count, section.canvases) for layout in layouts)


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the numbers below ``count``, evenly spread, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [0]


def _numbered(shape: Triple) -> Tensor:
    """A volume whose voxels say which slice they are of, as a strategy is given labels."""
    return torch.arange(FIRST, FIRST + shape[2], dtype=torch.int16).expand(shape).contiguous()
