"""Slice by slice, with a model made for small images: how SAMed and SAMUS fit them (Section II, Figure 5a)."""

from __future__ import annotations

from pydantic import Field

from cfrbench.config import Frozen, Triple
from cfrbench.contracts import ConcatStrategy
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import SliceBySlice

#: the patch of SAM's encoder in pixels, the coarsest there is; inputs are multiples of it
PATCH = 16
#: the smallest input that the models of the package take
SMALLEST = 32


class SmallSize(SliceBySlice):
    """D canvases of one slice each, and a model whose input is as small; exact.

    The model is built for that input: its absolute position table and the relative tables of its global blocks
    (``global_attn_indexes``) are interpolated once, when the checkpoint is loaded (hitachinsk/SAMed
    ``segment_anything/build_sam.py``; ``--input_size`` of ShumengLI/CFR code/train_finetuning.py). By default no slice
    is resampled. SAMed's own input is 512 and SAMUS' 256, from slices of any size: ``side`` sets it.
    """

    name = "small-size"

    class Config(Frozen):
        """side: the model's input in pixels; None = the longer side of a slice, rounded up to a multiple of 16."""

        side: int | None = Field(None, ge=SMALLEST, multiple_of=PATCH, description="input of the model; None = slice")

    config: Config

    def canvas_side(self, shape: Triple, canvas: int) -> int:
        """The longer side of a slice; blank pixels fill up what the model's patches need if ``side`` is not set."""
        side = super().canvas_side(shape, canvas)
        return side if self.config.side else max(SMALLEST, -(-side // PATCH) * PATCH)

    def input_side(self, shape: Triple, input_size: int) -> int:
        """The option, or the canvas as it is."""
        return self.config.side or self.canvas_side(shape, input_size)


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [SmallSize]
