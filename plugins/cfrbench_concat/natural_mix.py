"""Slices among photographs (Section IV, Figure 4): fine-tuning moves from natural images to medical ones.

The official code (ShumengLI/CFR) has no such thing, and the paper says little: photographs from PASCAL VOC 2012, ever
more medical slices of unchanged size. The text of the journal version adds: all tiles natural at first, then step by
step replaced by slices until only these remain; fresh random photographs in every iteration; tested on slices only.
Left open, and chosen here: the slices of a canvas are consecutive, from a random start (as the official code takes
those of its n x n canvases), each on its own tile of the grid; photographs stand on the tiles of the others, so tiles
that are blank in `grid` stay blank; every number of slices has an equal share of the training. Photographs have the
label 255, so cross-entropy ignores them; the Dice loss counts what the model says there, as it does on all padding (the
official loss, see `cfrbench.losses.dice_loss`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.sampling import generator
from cfrbench.tiling import GridLayout, Tiled, expect
from cfrbench_concat.photographs import find_photographs, fingerprint, grey_tiles, standardised


@dataclass(frozen=True)
class MixedLayout(GridLayout):
    """A grid on which only slices ``first`` to ``first + medical - 1`` stand; the others give place to photographs.

    photographs: the number of the photograph in the place of each other slice, in order.
    """

    first: int = 0
    medical: int = 0
    photographs: tuple[int, ...] = ()


class NaturalMix(Tiled):
    """A grid in prediction; in fine-tuning photographs, whose labels are ignored, replace some slices of it."""

    name = "natural-mix"

    class Config(Frozen):
        """How many slices, and which photographs."""

        medical: int | None = Field(
            None, ge=1, description="slices on every canvas of fine-tuning; None = the paper's curriculum, none to all"
        )
        root: Path | None = Field(
            None, description="PASCAL VOC 2012, or a folder of images; None = the photographs inside scikit-image"
        )

    config: Config

    def identity(self) -> str:
        """A hash of the photographs' names and contents."""
        return fingerprint(find_photographs(self.config.root))

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> GridLayout:  # fmt: skip
        """A grid of all slices; UsageError if there are fewer than the option ``medical`` asks for."""
        layout = super().plan(shape, canvas, overflow=overflow, draw=draw)
        if (self.config.medical or 0) > shape[2]:
            raise UsageError(f"concat.natural-mix.medical={self.config.medical} asks for more slices than a crop "
                             f"of {'x'.join(map(str, shape))} voxels has. Choose at most {shape[2]}, or leave the "
                             "option out for the curriculum from none to all.")  # fmt: skip
        return layout

    def plan_training(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
                      draw: int = 0, done: float = 0.0) -> MixedLayout:  # fmt: skip
        """A grid in which photographs replace slices; DataError if there are none."""
        grid = self.plan(shape, canvas, overflow=overflow)
        depth = shape[2]
        medical = self.config.medical
        if medical is None:
            medical = min(int(done * (depth + 1)), depth)
        rng = generator(draw, self.name, 0)
        first = int(rng.integers(depth - medical + 1))
        order = rng.permutation(len(find_photographs(self.config.root)))
        chosen = np.resize(order, depth - medical)  # in turn, where there are more places than photographs
        return MixedLayout(**vars(grid), first=first, medical=medical, photographs=tuple(chosen.tolist()))

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """See `Tiled.forward`; on label canvases photographs are ``fill``, which no cross-entropy counts."""
        if isinstance(layout, MixedLayout):
            expect(volumes, layout.shape, "volumes")
            others = self._others(volumes, layout, fill)
            stay = volumes.narrow(-1, layout.first, layout.medical)
            volumes = torch.cat([others[..., : layout.first], stay, others[..., layout.first :]], -1)
        return super().forward(volumes, layout, fill)

    def _others(self, volumes: Tensor, layout: MixedLayout, fill: float) -> Tensor:
        """What stands in the place of the other slices, ``(..., H, W, n)``: photographs, or ``fill`` in a label."""
        if not volumes.is_floating_point() or not layout.photographs:
            return volumes.new_full((*volumes.shape[:-1], len(layout.photographs)), fill)
        height, width, _ = layout.shape
        # Slices stand transposed on a canvas: rows run along W.
        tiles = grey_tiles(find_photographs(self.config.root), width, height)[list(layout.photographs)]
        photographs = standardised(tiles.to(volumes.device)).permute(2, 1, 0)
        # Models want z-scores or [0, 1] or something else, and volumes arrive here in whatever their model wants: each
        # photograph gets the mean and deviation of the volume it stands beside. For z-scores that is what SAM's own
        # preprocessing does to a natural image; in [0, 1] a few pixels leave the range.
        deviation, mean = torch.std_mean(volumes.float().flatten(-3), dim=-1, correction=0)
        return (photographs * deviation[..., None, None, None] + mean[..., None, None, None]).to(volumes.dtype)


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [NaturalMix]
