"""Ways to disturb images and features as pure functions: what is random comes in as an argument.

Features are ``(B, channels, ...)`` with any number of spatial axes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Return ``(1 - share) first + share second``, ``share`` ``(B,)`` one number for each pair (mixup)."""
    weight = share.view(-1, *[1] * (first.ndim - 1)).to(first)
    return (1.0 - weight) * first + weight * second


def scale_features(features: Tensor, noise: Tensor) -> Tensor:
    """Return ``features * (1 + noise)``, ``noise`` ``(channels, ...)`` the same for the whole batch.

    Feature noise of cross-consistency training (HiLab-git/SSL4MIS code/networks/unet.py).
    """
    return features * (1.0 + noise)


def drop_most_active(features: Tensor, share: Tensor | float) -> Tensor:
    """Zero the voxels whose mean over channels is at least ``share`` of that crop's largest; nothing is rescaled.

    Feature dropout of cross-consistency training (HiLab-git/SSL4MIS code/networks/unet.py).
    """
    attention = features.mean(dim=1, keepdim=True)
    largest = attention.amax(dim=tuple(range(1, features.ndim)), keepdim=True)
    return features * (attention < largest * share)


def bend_intensity(image: Tensor, gamma: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Return ``(B, 1, H, W, D)`` with each crop's range bent by a power, scaled around its mean, shifted.

    ``gamma`` (1 = none), ``contrast`` (1 = none) and ``brightness`` (0 = none) are ``(B,)``, one number a crop. The
    order of intensities stays for positive contrast.
    """
    everything = tuple(range(1, image.ndim))
    power, scale, shift = (value.view(-1, *[1] * (image.ndim - 1)).to(image) for value in (gamma, contrast, brightness))
    low, high = image.amin(everything, keepdim=True), image.amax(everything, keepdim=True)
    span = (high - low).clamp(min=1e-6)
    bent = low + span * ((image - low) / span).pow(power)
    mean = bent.mean(everything, keepdim=True)
    return mean + scale * (bent - mean) + shift


def empty_boxes(image: Tensor, corners: Tensor, side: float) -> Tensor:
    """Return ``(B, 1, H, W, D)`` with zeros in N boxes of each crop, whose sides are the share ``side`` of the crop's.

    ``corners`` ``(B, N, 3)`` in [0, 1) say where a box lies between one end of each axis and the other.
    """
    inside = torch.ones((), dtype=torch.bool, device=image.device)
    for axis, length in enumerate(image.shape[2:]):
        start = (corners[:, :, axis, None] * (1.0 - side) * length).round()
        place = torch.arange(length, device=image.device)
        hit = (place >= start) & (place < start + round(side * length))
        inside = inside & hit.view(*hit.shape[:2], *[length if other == axis else 1 for other in range(3)])
    return image.masked_fill(inside.any(dim=1, keepdim=True), 0.0)
