"""What happens to a finished canvas ``(..., S, S)``: turning it, and fitting it to a model's input size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrbench.errors import UsageError


def rotflip_canvas(canvas: Tensor, k: int, axis: int) -> Tensor:
    """Turn ``(..., S, S)`` by ``k`` quarter turns, then flip it along ``axis`` (0 rows, 1 columns).

    One flip always happens, as in ``RandomRotFlip_2d`` of ``ShumengLI/CFR`` code/utils/util.py.
    """
    return torch.rot90(canvas, k, (-2, -1)).flip(axis - 2)


def undo_rotflip_canvas(canvas: Tensor, k: int, axis: int) -> Tensor:
    """Take back `rotflip_canvas` with the same ``k`` and ``axis``."""
    return torch.rot90(canvas.flip(axis - 2), -k, (-2, -1))


def resample(slices: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """Resize slices ``(..., h, w)`` to ``(..., *size)``, pixel centres kept in proportion.

    Floats: bilinear. Integers are labels: the nearest pixel is picked, so no new value comes up.
    """
    if slices.is_floating_point():
        return _resize(slices, size, antialias=antialias)
    for axis, length in zip((-2, -1), size, strict=True):
        if slices.shape[axis] != length:
            centres = torch.arange(length, device=slices.device) * 2 + 1
            # floor((i + 0.5) * old / new) without rounding
            slices = slices.index_select(axis, centres * slices.shape[axis] // (2 * length))
    return slices


def resize_canvas(canvas: Tensor, size: int) -> Tensor:
    """Resize images ``(..., S, S)`` to ``(..., size, size)``: bilinear, antialiased. UsageError for labels."""
    return _resize(_checked(canvas), (size, size), antialias=True)


def resize_logits(logits: Tensor, size: int) -> Tensor:
    """Resize logits ``(..., s, s)`` to ``(..., size, size)`` as SAM does: bilinear, corners not aligned.

    Labels are never resized: logits are brought back to the canvas on which the label stands.
    """
    return _resize(_checked(logits), (size, size), antialias=False)


def _checked(images: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise UsageError(f"A canvas of {images.dtype} holds labels, which are not resized. Resize the logits instead.")
    return images


def thinned(labels: Tensor, size: int) -> Tensor:
    """Pick ``size`` x ``size`` evenly spaced labels of ``(..., S, S)``: the nearest zoom of hitachinsk/SAMed."""
    pick = torch.arange(size, device=labels.device) * labels.shape[-1] // size
    return labels[..., pick.unsqueeze(1), pick]


def _resize(images: Tensor, size: tuple[int, int], *, antialias: bool) -> Tensor:
    if images.shape[-2:] == size:
        return images
    flat = images.reshape(-1, 1, *images.shape[-2:])
    wide = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat  # no antialiasing in half on CPU
    if antialias and size[1] == 1:
        # torch repeats one row of an image that is one pixel wide (seen in 2.15), so that axis goes alone.
        resized = _bilinear(_bilinear(wide, (wide.shape[-2], 1), True).mT, (1, size[0]), True).mT
    else:
        resized = _bilinear(wide, size, antialias)
    return resized.reshape(*images.shape[:-2], *size).to(images.dtype)


def _bilinear(images: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=antialias)
