"""All slices of a crop in order, each an image of its own: what fine-tuners take that see more than one canvas."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout


class WholeSlices(ConcatStrategy):
    """Each slice at its own size, padded to a square; the model resizes it to its input.

    It stands in for the concatenation strategy where `FineTuner.takes` is not "canvas", and is no plug-in.
    """

    name = "whole-slices"

    def plan(self, shape: Triple, canvas: int, *, overflow: Literal["refuse", "official"] = "refuse",
             draw: int = 0) -> Layout:  # fmt: skip
        """As many images as slices, whatever ``canvas`` is."""
        return Layout(shape, self.canvas_side(shape, canvas), shape[2])

    def canvas_side(self, shape: Triple, canvas: int) -> int:
        """The longer side of a slice."""
        return max(shape[:2])

    def forward(self, volumes: Tensor, layout: Layout, fill: float) -> Tensor:
        """Map ``(..., H, W, D)`` to ``(..., D, S, S)``, each slice in the upper left corner."""
        height, width = volumes.shape[-3:-1]
        slices = volumes.movedim(-1, -3)
        return F.pad(slices, (0, layout.canvas - width, 0, layout.canvas - height), value=fill)

    def inverse(self, canvases: Tensor, layout: Layout) -> Tensor:
        """Map ``(..., D, S, S)`` to ``(..., H, W, D)``."""
        height, width, _ = layout.shape
        return canvases[..., :height, :width].movedim(-3, -1)
