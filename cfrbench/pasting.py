"""Copy-paste between crops, and the loss and the clean-up of labels that go with it.

One box, the same for all crops of a step, decides what is pasted: ``outside`` ``(H, W, D)`` is False inside it. Labels
are ``(B, ...)``; whatever is labelled 255 counts in no loss. Sources: DeepMed-Lab-ECNU/BCP code/LA_BCP_train.py,
code/utils/BCP_utils.py, code/utils/losses.py, code/pancreas/pancreas_utils.py and code/ACDC_BCP_train.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from cfrbench.config import Triple
from cfrbench.losses import SMOOTH, one_hot
from cfrbench.volume import IGNORE

# ---------------------------------------------------------------------------------------------------------------------
# boxes


def box_sides(crop: Sequence[int], share: float) -> Triple:
    """Sides of a box that takes ``share`` of each side of the crop, rounded down."""
    height, width, depth = (int(side * share) for side in crop)
    return height, width, depth


def draw_corner(crop: Sequence[int], box: Sequence[int]) -> Triple:
    """Where a box of such sides begins, uniform on each axis in turn; the last place but one is the last, as official.

    The numbers come from torch's CPU generator on every device.
    """
    free = (max(side - length, 1) for side, length in zip(crop, box, strict=True))
    x, y, z = (int(torch.randint(last, ())) for last in free)
    return x, y, z


def outside_box(crop: Sequence[int], corner: Sequence[int], box: Sequence[int],
                device: torch.device | None = None) -> Tensor:  # fmt: skip
    """Bool ``(H, W, D)``: True outside of the box that begins at ``corner``."""
    inside = tuple(slice(first, first + length) for first, length in zip(corner, box, strict=True))
    outside = torch.ones(tuple(crop), dtype=torch.bool, device=device)
    outside[inside] = False
    return outside


def paste(around: Tensor, within: Tensor, outside: Tensor) -> Tensor:
    """Images or labels ``(B, ..., H, W, D)`` that are ``around`` outside of the box and ``within`` inside it."""
    return torch.where(outside, around, within)


def only(labels: Tensor, region: Tensor) -> Tensor:
    """``labels`` ``(B, H, W, D)`` with 255 wherever ``region`` ``(H, W, D)`` is False."""
    return labels.masked_fill(~region, IGNORE)


# ---------------------------------------------------------------------------------------------------------------------
# losses


def labelled_dice_loss(probabilities: Tensor, target: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Mean over crops and classes, background included, of ``1 - (2 sum(p t) + e) / (sum(p) + sum(t) + e)``.

    Sums run over those voxels of one crop that are not labelled 255, and nothing is squared: BCP's mask multiplies the
    intersection and both sizes alike.
    """
    mask = one_hot(target, probabilities.shape[1])
    counted = probabilities * (target != IGNORE).unsqueeze(1)
    overlap = (counted * mask).flatten(2).sum(dim=2)
    size = counted.flatten(2).sum(dim=2) + mask.flatten(2).sum(dim=2)
    return (1.0 - (2.0 * overlap + smooth) / (size + smooth)).mean()


def labelled_ce_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Half of cross-entropy plus `labelled_dice_loss`; the former is a mean over all counted voxels of the batch."""
    log_probabilities = F.log_softmax(logits.float(), dim=1)
    mask = one_hot(target, logits.shape[1])
    entropy = -(log_probabilities * mask).sum() / mask.sum().clamp(min=1)
    return 0.5 * (entropy + labelled_dice_loss(log_probabilities.exp(), target))


def copy_paste_loss(logits: Tensor, known: Tensor, own: Tensor, region: Tensor, own_weight: float) -> Tensor:
    """Loss of mixed crops: true labels where ``region`` is True, ``own_weight`` times the network's own elsewhere."""
    return labelled_ce_dice(logits, only(known, region)) + own_weight * labelled_ce_dice(logits, only(own, ~region))


# ---------------------------------------------------------------------------------------------------------------------
# clean labels


def largest_components(labels: Tensor, neighbours: int = 26) -> Tensor:
    """Labels ``(B, ...)`` uint8 of which each class of each crop keeps its largest connected part; the rest is 0.

    Of equally large parts the first in scan order stays. ``neighbours`` of a voxel: 6 share a face, 18 an edge, 26 a
    corner; in two dimensions 4 and 8. The result is on the device of ``labels``, the work is done on the CPU.
    """
    steps = {4: 1, 6: 1, 8: 2, 18: 2, 26: 3}[neighbours]
    structure = ndimage.generate_binary_structure(labels.ndim - 1, steps)
    kept = np.stack([_largest_of_each(crop, structure) for crop in labels.cpu().numpy()])
    return torch.from_numpy(kept).to(labels.device)


def _largest_of_each(crop: NDArray[np.uint8], structure: NDArray[np.bool_]) -> NDArray[np.uint8]:
    kept = np.zeros_like(crop)
    for value in np.flatnonzero(np.bincount(crop.ravel())[1:]) + 1:
        parts, _ = ndimage.label(crop == value, structure=structure)
        kept[parts == 1 + np.bincount(parts.ravel())[1:].argmax()] = value
    return kept
