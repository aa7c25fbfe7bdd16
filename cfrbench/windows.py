"""Overlapping boxes of one size in a volume: cut out at once, and put back as the mean of what each of them says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.errors import UsageError
from cfrbench.inference import window_starts

Starts = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """Boxes of shape ``patch`` in a volume of shape ``shape``, one at every combination of the starts of each axis."""

    shape: Triple
    patch: Triple
    starts: tuple[Starts, Starts, Starts]

    @property
    def count(self) -> int:
        """N, the number of boxes; the last axis runs fastest."""
        return math.prod(map(len, self.starts))


def cover(shape: Triple, patch: Triple, overlap: float) -> Windows:
    """The fewest windows that cover ``shape`` with neighbours that share at least ``overlap`` of a side; >= 0, < 1.

    ``patch`` is cut to the volume; the last window of an axis ends with it, as in `cfrbench.inference`.
    """
    height, width, depth = (min(side, length) for side, length in zip(shape, patch, strict=True))
    strides = (max(1, int(length - length * overlap)) for length in (height, width, depth))
    x, y, z = (tuple(window_starts(*axis)) for axis in zip(shape, (height, width, depth), strides, strict=True))
    return Windows(shape, (height, width, depth), (x, y, z))


def cut(volumes: Tensor, windows: Windows, chosen: Sequence[int] | None = None) -> Tensor:
    """The boxes ``(..., N, *patch)`` of volumes ``(..., *shape)``, or those numbered ``chosen``; always a copy."""
    _expect(volumes, windows.shape, "volumes")
    corners = np.stack(np.meshgrid(*windows.starts, indexing="ij"), -1).reshape(-1, 3)
    corners = corners if chosen is None else corners[list(chosen)]
    boxes = []
    for axis, length in enumerate(windows.patch):
        along = torch.from_numpy(corners[:, axis, None] + np.arange(length)).to(volumes.device)
        boxes.append(along.view(len(corners), *(length if other == axis else 1 for other in range(3))))
    return volumes[..., boxes[0], boxes[1], boxes[2]]


def mean(patches: Tensor, windows: Windows) -> Tensor:
    """Volumes ``(..., *shape)`` from all their boxes ``(..., N, *patch)``: the mean of a voxel's copies.

    Equal copies come back bit for bit, and equal boxes give equal bits: sums run in one order, in at least float32.
    Integers are labels: each voxel is picked from the first box that holds it.
    """
    _expect(patches, (windows.count, *windows.patch), "boxes")
    half = patches.dtype in (torch.bfloat16, torch.float16)
    merged = torch.unflatten(patches.float() if half else patches, -4, tuple(map(len, windows.starts)))
    # The copies of a voxel are the product of its copies along each axis, so their mean is three means, one an axis.
    for axis in (2, 1, 0):
        beside = merged.movedim(-4, axis - 4)  # (..., n, length, ...): the windows of this axis and their voxels
        merged = _along(beside, axis - 4, windows.starts[axis], windows.patch[axis], windows.shape[axis])
    return merged.to(patches.dtype)


def _along(boxes: Tensor, axis: int, starts: Starts, length: int, side: int) -> Tensor:
    """Merge axes ``axis`` (windows) and ``axis + 1`` (their voxels) into one of ``side`` voxels."""
    flat = boxes.flatten(axis, axis + 1)
    axis = flat.ndim + axis + 1
    source, copies = (torch.from_numpy(table).to(boxes.device) for table in _sources(starts, length, side))
    first = flat.index_select(axis, source[0])
    if not boxes.is_floating_point():
        return first
    others = torch.unflatten(flat.index_select(axis, source[1:].flatten()), axis, (len(source) - 1, side))
    # Not the plain mean, which rounds: three thirds of a value are not always the value.
    excess = (others - first.unsqueeze(axis)).sum(axis)
    return first + excess / copies.view(-1, *(1,) * (first.ndim - 1 - axis))


@lru_cache(maxsize=64)
def _sources(starts: Starts, length: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices ``(most copies, side)`` of each voxel's copies in (windows x length), and how many there are ``(side,)``.

    A voxel with fewer copies than another names its first one again.
    """
    offset = np.arange(side) - np.asarray(starts)[:, None]
    inside = (offset >= 0) & (offset < length)
    copies = inside.sum(0)
    order = np.argsort(~inside, axis=0, kind="stable")[: copies.max()]
    flat = np.take_along_axis(offset + length * np.arange(len(starts))[:, None], order, 0)
    return np.where(np.arange(len(flat))[:, None] < copies, flat, flat[0]), copies


def _expect(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(tensor.shape[-len(shape) :]) != shape:
        raise UsageError(f"These windows are for {what} of shape (..., {', '.join(map(str, shape))}), but were given "
                         f"{tuple(tensor.shape)}. Plan a layout for that shape.")  # fmt: skip
