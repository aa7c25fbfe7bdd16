"""What a training batch is made of: which cases, which crop of each, turned how.

Pure functions of explicit draws. `generator` makes every draw a function of (seed, stream, step), so that no state of a
random generator is ever saved and a resumed run sees the batches of an uninterrupted one. Sources: the data loaders of
yulequan/UA-MT (``code/dataloaders/la_heart.py``) and ShumengLI/CFR (``code/dataloaders/dataset.py``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from cfrbench.config import Triple
from cfrbench.errors import DataError

Draws = np.random.Generator | np.random.RandomState


def generator(seed: int, stream: str, step: int) -> np.random.Generator:
    """A fresh generator that depends on its arguments alone; different arguments give independent numbers."""
    key = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


# ---------------------------------------------------------------------------------------------------------------------
# crops: volumes are (..., H, W, D); everything happens in the last three axes


def rotflip(volume: Tensor, turns: int, axis: int | None) -> Tensor:
    """Rotate by ``turns`` quarter turns in the plane (H, W), then flip ``axis`` 0 or 1 (None: no flip).

    Equals ``np.flip(np.rot90(volume, turns), axis)`` with one copy at most: each of the eight results is a
    transposition followed by flips.
    """
    turned = volume.transpose(-3, -2) if turns % 2 else volume
    flips = _flipped_axes(turns, axis)
    return turned.flip([axis - 3 for axis in flips]) if flips else turned


def _flipped_axes(turns: int, axis: int | None) -> set[int]:
    """Axes to flip after the transposition that an odd number of ``turns`` starts with."""
    rotations: tuple[set[int], ...] = (set(), {0}, {0, 1}, {1})
    return rotations[turns % 4] ^ ({axis} if axis is not None else set())


def padding(shape: Triple, patch: Triple) -> Triple:
    """Zeros added at both ends of each axis before a crop.

    The official rule: none if every side is longer than its patch; else ``max((patch - side) // 2 + 3, 0)`` on *every*
    axis, so that a side that fits exactly gets 3 and one a little longer still 1 or 2.
    """
    if all(side > length for side, length in zip(shape, patch, strict=True)):
        return 0, 0, 0
    height, width, depth = (max((length - side) // 2 + 3, 0) for side, length in zip(shape, patch, strict=True))
    return height, width, depth


def padded(volume: Tensor, patch: Triple) -> Tensor:
    """``volume`` with the zeros of `padding` around it."""
    height, width, depth = padding(_shape(volume), patch)
    return F.pad(volume, (depth, depth, width, width, height, height))


def random_crop(volume: Tensor, patch: Triple, start: Triple) -> Tensor:
    """The crop of shape ``patch`` at ``start`` of the `padded` volume, as the officials take it."""
    (x, y, z), (height, width, depth) = start, patch
    return padded(volume, patch)[..., x : x + height, y : y + width, z : z + depth]


def center_crop(volume: Tensor, patch: Triple) -> Tensor:
    """The crop in the middle of the `padded` volume; half voxels go to the even start, as in the officials."""
    room = _room(_shape(volume), patch)
    x, y, z = (round(slack / 2) for slack in room)
    return random_crop(volume, patch, (x, y, z))


@dataclass(frozen=True)
class CropDraw:
    """One random crop of volumes of ``shape``.

    start: its corner in the volume after ``turns`` quarter turns, a flip of ``axis`` and the official padding.
    """

    shape: Triple
    patch: Triple
    start: Triple
    turns: int = 0
    axis: int | None = None


def draw_crop(shape: Triple, patch: Triple, rotflip: bool, rng: np.random.Generator) -> CropDraw:
    """Draw turns, axis and start in the official order; the last possible start is never drawn, as in the officials.

    With ``rotflip`` one of the two axes is always flipped.
    """
    turns, axis = (int(rng.integers(4)), int(rng.integers(2))) if rotflip else (0, None)
    x, y, z = (int(rng.integers(slack)) for slack in _room(_turned(shape, turns), patch))
    return CropDraw(shape, patch, (x, y, z), turns, axis)


def take_crop(volume: Tensor, draw: CropDraw) -> Tensor:
    """The crop ``(..., *draw.patch)`` of an image, a label or a pseudo-label; it may be a view of ``volume``.

    Bit for bit `random_crop` of the `rotflip` of the whole volume, but only the crop is turned (100 times faster).
    """
    if _shape(volume) != draw.shape:
        raise DataError(f"A crop drawn for volumes of shape {draw.shape} was taken from one of {_shape(volume)}. "
                        "Image, label and pseudo-label of a case must have one shape.")  # fmt: skip
    inside, target = zip(*map(_overlap, _box(draw), draw.shape), strict=True)
    crop = volume[..., *inside]
    lengths = tuple(high - low for low, high in _box(draw))
    if crop.shape[-3:] != lengths:
        frame = volume.new_zeros((*volume.shape[:-3], *lengths))
        frame[..., *target] = crop
        crop = frame
    return rotflip(crop, draw.turns, draw.axis)


def _box(draw: CropDraw) -> list[tuple[int, int]]:
    """The crop as (low, high) per axis of the volume as it is stored; it may stick out of it."""
    turned = _turned(draw.shape, draw.turns)
    pads = padding(turned, draw.patch)
    box = [(s - pad, s - pad + p) for s, pad, p in zip(draw.start, pads, draw.patch, strict=True)]
    for axis in _flipped_axes(draw.turns, draw.axis):
        low, high = box[axis]
        box[axis] = turned[axis] - high, turned[axis] - low
    return [box[1], box[0], box[2]] if draw.turns % 2 else box


def _overlap(bounds: tuple[int, int], size: int) -> tuple[slice, slice]:
    """The part of ``bounds`` inside ``[0, size)``: where it lies in the volume and where in the crop."""
    low, high = (min(max(bound, 0), size) for bound in bounds)
    offset = max(low - bounds[0], 0)
    return slice(low, high), slice(offset, offset + high - low)


def _room(shape: Triple, patch: Triple) -> Triple:
    """How many starts the officials draw from, per axis."""
    pads = padding(shape, patch)
    x, y, z = (side + 2 * pad - length for side, pad, length in zip(shape, pads, patch, strict=True))
    return x, y, z


def _turned(shape: Triple, turns: int) -> Triple:
    height, width, depth = shape
    return (width, height, depth) if turns % 2 else shape


def _shape(volume: Tensor) -> Triple:
    height, width, depth = volume.shape[-3:]
    return height, width, depth


# ---------------------------------------------------------------------------------------------------------------------
# cases


def two_stream_epoch(
    labelled: Sequence[int], unlabelled: Sequence[int], labelled_batch: int, unlabelled_batch: int, rng: Draws
) -> list[tuple[list[int], list[int]]]:
    """One epoch of (labelled, unlabelled) batches: one pass over the shuffled labelled cases; a short rest is dropped.

    Beside them run shuffles of the unlabelled cases, as many as needed; they start afresh in every epoch
    (``TwoStreamBatchSampler``: equal draws give equal batches). With fewer labelled cases than ``labelled_batch`` the
    one batch repeats them in turn: the official sampler refuses that, but the paper's one-label tables need it.
    """
    shuffled = rng.permutation(np.asarray(labelled))
    order: list[int] = np.resize(shuffled, max(len(shuffled), labelled_batch)).tolist()
    count = len(order) // labelled_batch
    shuffles = math.ceil(count * unlabelled_batch / len(unlabelled)) if unlabelled else 0
    stream = iter([case for _ in range(shuffles) for case in rng.permutation(np.asarray(unlabelled)).tolist()])
    firsts = range(0, count * labelled_batch, labelled_batch)
    return [(order[i : i + labelled_batch], list(islice(stream, unlabelled_batch))) for i in firsts]


def two_stream_batch(
    step: int, labelled: Sequence[int], unlabelled: Sequence[int], labelled_batch: int, unlabelled_batch: int, seed: int
) -> tuple[list[int], list[int]]:
    """The cases of training step ``step``: `two_stream_epoch` after `two_stream_epoch`, as a pure function.

    Without unlabelled cases, or with a batch of 0 of them, the second list is empty.
    """
    if not labelled:
        raise DataError("There is no labelled case to draw batches from. Give the split at least one.")
    epoch, position = divmod(step, max(len(labelled) // labelled_batch, 1))
    rng = generator(seed, "batches", epoch)
    return two_stream_epoch(labelled, unlabelled, labelled_batch, unlabelled_batch, rng)[position]
