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


def resize_canvas(canvas: Tensor, size: int) -> Tensor:
    """Resize images ``(..., S, S)`` to ``(..., size, size)``: bilinear, antialiased. UsageError for labels."""
    return _resize(canvas, size, antialias=True)


def resize_logits(logits: Tensor, size: int) -> Tensor:
    """Resize logits ``(..., s, s)`` to ``(..., size, size)`` as SAM does: bilinear, corners not aligned.

    Labels are never resized: logits are brought back to the canvas on which the label stands.
    """
    return _resize(logits, size, antialias=False)


def _resize(images: Tensor, size: int, *, antialias: bool) -> Tensor:
    if not images.is_floating_point():
        raise UsageError(f"A canvas of {images.dtype} holds labels, which are not resized. Resize the logits instead.")
    if images.shape[-2:] == (size, size):
        return images
    flat = images.reshape(-1, 1, *images.shape[-2:])
    wide = flat.float() if flat.dtype in (torch.bfloat16, torch.float16) else flat  # no antialiasing in half on CPU
    resized = F.interpolate(wide, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
    return resized.reshape(*images.shape[:-2], size, size).to(images.dtype)
