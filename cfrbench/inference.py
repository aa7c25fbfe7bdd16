"""Sliding windows: class probabilities of a whole volume from a network that sees one patch at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.config import Triple
from cfrbench.errors import ConfigError

Box = tuple[slice, slice, slice]


def window_starts(size: int, patch: int, stride: int) -> list[int]:
    """The ``ceil((size - patch) / stride) + 1`` starts of windows along one axis; the last window ends at ``size``.

    ConfigError if voxels between two windows would be seen by none.
    """
    last = size - patch
    if min(stride, last) > patch:
        raise ConfigError(f"A stride of {stride} between windows of {patch} leaves out voxels on an axis of {size}. "
                          "Set inference.stride_xy and inference.stride_z to at most the patch.")  # fmt: skip
    return [min(stride * i, last) for i in range(math.ceil(last / stride) + 1)]


def pad_to(volume: Tensor, patch: Triple, value: float = 0.0) -> tuple[Tensor, Box]:
    """``(H, W, D)`` padded to at least ``patch`` and where the volume lies in it; an odd voxel goes to the far side."""
    missing = [max(length - side, 0) for side, length in zip(volume.shape, patch, strict=True)]
    near = [gap // 2 for gap in missing]
    pads = [end for gap, first in zip(reversed(missing), reversed(near), strict=True) for end in (first, gap - first)]
    x, y, z = (slice(first, first + side) for first, side in zip(near, volume.shape, strict=True))
    return F.pad(volume, pads, value=value), (x, y, z)


@torch.no_grad()
def predict_probabilities(
    forward: Callable[[Tensor], Tensor],
    image: Tensor,
    patch: Triple,
    stride_xy: int,
    stride_z: int,
    num_classes: int,
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Mean softmax ``(C, H, W, D)`` of ``image`` ``(H, W, D)`` over all windows that see a voxel, float32.

    ``forward`` maps a window ``(1, 1, *patch)`` to logits ``(1, C, *patch)``: a network in eval mode, or a function
    that moves the window to its device and runs it under its precision. ``on_window(done, total)`` hears of each one.
    Same windows and same order of sums as ShumengLI/CFR ``code/test_util_singleclass.py``; the largest class is left to
    `cfrbench.losses.class_map`.
    """
    volume, inside = pad_to(image, patch)
    total = volume.new_zeros((num_classes, *volume.shape), dtype=torch.float32)
    visits = volume.new_zeros(volume.shape, dtype=torch.float32)
    windows = _windows(volume, patch, (stride_xy, stride_xy, stride_z))
    for done, window in enumerate(windows, start=1):
        logits = forward(volume[window][None, None])
        total[:, *window] += F.softmax(logits[0].float(), dim=0).to(total.device)
        visits[window] += 1
        if on_window is not None:
            on_window(done, len(windows))
    return total.div_(visits)[:, *inside]


def _windows(volume: Tensor, patch: Triple, strides: Triple) -> list[Box]:
    axes = [
        [slice(start, start + length) for start in window_starts(size, length, stride)]
        for size, length, stride in zip(volume.shape, patch, strides, strict=True)
    ]
    return [(x, y, z) for x, y, z in product(*axes)]
