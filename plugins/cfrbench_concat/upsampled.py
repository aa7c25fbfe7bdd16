"""Slice by slice, each enlarged to the model's input: how MedSAM fits medical images (Section II, Figure 5a)."""

from __future__ import annotations

from cfrbench.contracts import ConcatStrategy
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import SliceBySlice


class Upsampled(SliceBySlice):
    """D canvases of one slice each, which the model sees at its own input size; exact.

    The canvas is the slice itself, made square at its end; whoever runs the model enlarges every canvas to the input
    (bilinear, longest side first as in SAM's preprocessing) and brings the logits back to the slice's size, as
    ``sam_test`` of ShumengLI/CFR code/utils/util.py does. That function has no counterpart for training; here the loss
    is taken at the slice's size, so labels are never resized.
    """

    name = "upsampled"


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Upsampled]
