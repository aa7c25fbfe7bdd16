"""Small in-plane rotations and zooms of crops: what one labelled volume cannot show of the others.

Not in the official fine-tuning, whose defaults (0 degrees, zoom 1) change nothing; SAMed turns slices by up to 20
degrees in the same spirit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def draw_affine(rotation_degrees: float, zoom: float, rng: np.random.Generator) -> Tensor:
    """A random ``(2, 3)`` map of the plane: turned by up to ``rotation_degrees``, scaled by 1/zoom to zoom."""
    angle = math.radians(rotation_degrees) * float(rng.uniform(-1, 1))
    scale = math.exp(math.log(zoom) * float(rng.uniform(-1, 1)))
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]])


def warp_image(crop: Tensor, affine: Tensor) -> Tensor:
    """Apply one in-plane map to every slice of a float crop ``(H, W, D)``, bilinear; the rim is repeated outwards."""
    return _warp(crop, affine, "bilinear")


def warp_label(crop: Tensor, affine: Tensor) -> Tensor:
    """Apply one in-plane map to every slice of a label crop ``(H, W, D)``, nearest: no new values appear."""
    return _warp(crop.float(), affine, "nearest").to(crop.dtype)


def _warp(crop: Tensor, affine: Tensor, mode: str) -> Tensor:
    slices = crop.movedim(-1, 0).unsqueeze(0)  # (1, D, H, W): one map for all slices
    height, width = slices.shape[-2:]
    # Grid coordinates are relative to each side: undo their ratio, or a turn would shear slices that are not square.
    ratio = torch.tensor([[1.0, height / width], [width / height, 1.0]])
    square = torch.cat([affine[:, :2] * ratio, affine[:, 2:]], dim=1)
    grid = F.affine_grid(square.unsqueeze(0), list(slices.shape), align_corners=False)
    warped = F.grid_sample(slices, grid, mode=mode, padding_mode="border", align_corners=False)
    return warped[0].movedim(0, -1)
