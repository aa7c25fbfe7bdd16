"""Class prototypes: the mean feature of each class, and which prototype a voxel's feature is nearest to.

Features are ``(B, K, H, W, D)`` at the size of the labels (`spread`), weights and results ``(B, C, H, W, D)``,
prototypes ``(B, C, K)``: each crop has its own. Everything is computed in float32, under autocast too. Sources:
lemoshu/CPCL code/train_CPCL_general_3D.py and lemoshu/AC-MT code/train_ACMT_PErr_3D.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.losses import class_map

P = ParamSpec("P")


def _in_float32(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep matrix products out of autocast, which would round sums over a million voxels to eight bits."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


@_in_float32
def spread(features: Tensor, sides: Sequence[int]) -> Tensor:
    """Features of a coarser level as float32 at full size, between voxels trilinear."""
    return F.interpolate(features.float(), size=tuple(sides), mode="trilinear", align_corners=False)


@_in_float32
def class_prototypes(features: Tensor, weights: Tensor) -> Tensor:
    """``sum_v F_v w_v / (sum_v w_v + 1e-5)`` over the voxels of a crop; zero for a class that has no voxel."""
    flat = weights.float().flatten(2)
    return flat @ features.flatten(2).transpose(1, 2) / (flat.sum(dim=2, keepdim=True) + 1e-5)


@_in_float32
def cosine_similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of the angle between each voxel's feature and each prototype; 0 where one of them is zero."""
    units = F.normalize(prototypes, dim=2, eps=1e-8)
    lengths = features.square().sum(dim=1, keepdim=True).clamp(min=1e-16).sqrt()
    return _products(features, units) / lengths


@_in_float32
def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Squared Euclidean distance of each voxel's feature to each prototype."""
    sizes = prototypes.square().sum(dim=2)[..., None, None, None]
    return features.square().sum(dim=1, keepdim=True) - 2.0 * _products(features, prototypes) + sizes


def _products(features: Tensor, prototypes: Tensor) -> Tensor:
    return (prototypes @ features.flatten(2)).view(*prototypes.shape[:2], *features.shape[2:])


def nearest_prototype(distances: Tensor) -> Tensor:
    """Bool one-hot of the smallest distance; no class at all where two are equally near."""
    least = distances == distances.amin(dim=1, keepdim=True)
    return least & (least.sum(dim=1, keepdim=True) == 1)


def rectified_labels(probabilities: Tensor, uncertainty: Tensor, threshold: float) -> Tensor:
    """Labels ``(B, H, W, D)`` uint8 of the largest probability among the classes less uncertain than ``threshold``.

    Class 0 where every class is uncertain.
    """
    return class_map(probabilities * (uncertainty < threshold))
