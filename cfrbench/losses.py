"""Segmentation and consistency losses as pure functions.

Shapes: logits and probabilities ``(B, C, ...)`` with any number of spatial axes, background first; targets ``(B, ...)``
of any integer type, uint8 being the cheapest; scores and masks of equal shape. Half-precision logits are widened to
float32 first. Every loss is a scalar unless it says *map*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cfrbench.volume import IGNORE

SMOOTH = 1e-5  # most official Dice losses; the fine-tuning loop of ShumengLI/CFR uses 1e-10

# ---------------------------------------------------------------------------------------------------------------------
# supervised


def cross_entropy(logits: Tensor, target: Tensor, ignore: int | None = IGNORE) -> Tensor:
    """Mean cross-entropy over the voxels whose label is not ``ignore``; 0 where there is none."""
    if ignore is None:
        return F.cross_entropy(_wide(logits), target.long())
    total = F.cross_entropy(_wide(logits), target.long(), ignore_index=ignore, reduction="sum")
    return total / (target != ignore).sum().clamp(min=1)


def dice_loss(
    probabilities: Tensor, target: Tensor, *, smooth: float = SMOOTH, weights: Sequence[float] | None = None
) -> Tensor:
    """Mean over all classes, background included, of ``1 - (2 sum(p t) + e) / (sum(p^2) + sum(t^2) + e)``.

    Sums run over batch and space together. Official trap kept on purpose (ShumengLI/CFR, HiLab-git/SSL4MIS
    ``code/utils/losses.py``, class DiceLoss): a voxel labelled 255 belongs to no class, yet its p^2 counts, so padding
    is not ignored here. ``weights`` multiply the terms, whose sum is still divided by C.
    """
    terms = _dice_terms(probabilities, one_hot(target, probabilities.shape[1]), smooth)
    if weights is not None:
        terms = terms * terms.new_tensor(weights)
    return terms.mean()


def foreground_dice_loss(score: Tensor, mask: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Binary Dice loss with squared denominators, one sum over everything (yulequan/UA-MT ``dice_loss``)."""
    # mask^2 = mask: only 0 and 1 stand in it
    overlap, size = (score * mask).sum(), score.square().sum() + mask.sum()
    return 1.0 - (2.0 * overlap + smooth) / (size + smooth)


def linear_dice_loss(score: Tensor, other: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Binary Dice loss without squares between a score and a mask or another score (yulequan/UA-MT ``dice_loss1``)."""
    return 1.0 - (2.0 * (score * other).sum() + smooth) / (score.sum() + other.sum() + smooth)


def ce_dice(logits: Tensor, target: Tensor, *, smooth: float = SMOOTH, only_labelled: bool = False,
            dice_weight: float = 0.5) -> Tensor:  # fmt: skip
    """Half of cross-entropy (255 ignored) plus `dice_loss`: the supervised loss of SSL4MIS, AC-MT, CPCL and CFR.

    dice_weight: the share of Dice, if not half. only_labelled: voxels labelled 255 count in neither half, for targets
    that leave out what nobody is sure of. One log-softmax serves both halves, and the target is compared as the bytes
    it is: nothing int64 is made of it.
    """
    log_probabilities = F.log_softmax(_wide(logits), dim=1)
    mask = one_hot(target, logits.shape[1])
    entropy = -(log_probabilities * mask).sum() / mask.sum().clamp(min=1)
    probabilities = log_probabilities.exp()
    if only_labelled:
        probabilities = probabilities * (target != IGNORE).unsqueeze(1)
    return (1.0 - dice_weight) * entropy + dice_weight * _dice_terms(probabilities, mask, smooth).mean()


def mean_foreground_dice_loss(probabilities: Tensor, target: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Mean over the foreground classes of the terms of `dice_loss`; of two classes, the binary Dice loss of class 1."""
    return _dice_terms(probabilities, one_hot(target, probabilities.shape[1]), smooth)[1:].mean()


def ce_foreground_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Half of cross-entropy plus the binary Dice loss of class 1: UA-MT's and DTC's supervised form on LA."""
    foreground = F.softmax(_wide(logits), dim=1)[:, 1]
    return 0.5 * (cross_entropy(logits, target) + foreground_dice_loss(foreground, target == 1))


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over all voxels of ``weight`` ``(B, 1, ...)`` times the cross-entropy, which is 0 where the label is 255."""
    log_probabilities = F.log_softmax(_wide(logits), dim=1)
    entropy = -(log_probabilities * one_hot(target, logits.shape[1])).sum(dim=1, keepdim=True)
    return (weight * entropy).mean()


def block_dice_loss(
    probabilities: Tensor, target: Tensor, blocks: int, *, edges: Sequence[int] | None = None, smooth: float = SMOOTH
) -> Tensor:
    """Mean of `dice_loss` over ``blocks`` blocks along each axis, of ``edges`` voxels (SLC-Net, igip-liu/SLC-Net).

    ``edges`` are ``ceil(side / blocks)`` by default; the official 2D code takes that of the last axis for both. Blocks
    that lie wholly outside count as 0, as they do there: sides that ``blocks`` divides have none.
    """
    axes = target.ndim - 1
    if edges is None:
        edges = [-(-side // blocks) for side in target.shape[1:]]
    mask = one_hot(target, probabilities.shape[1])
    # Zeros behind the last voxel add nothing to any sum; a negative amount cuts voxels off.
    missing = [blocks * edge - side for side, edge in zip(target.shape[1:], edges, strict=True)]
    pads = [amount for axis in reversed(missing) for amount in (0, axis)]
    shape = [*probabilities.shape[:2], *(length for edge in edges for length in (blocks, edge))]
    inside = (0, *range(3, 3 + 2 * axes, 2))

    def summed(values: Tensor) -> Tensor:
        return F.pad(values, pads).reshape(shape).sum(dim=inside)

    size = summed(probabilities.square()) + summed(mask)
    return (1.0 - (2.0 * summed(probabilities * mask) + smooth) / (size + smooth)).mean()


#: the two supervised losses of the field, by the name that options give them
SUPERVISED_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ce_dice": ce_dice,
    "ce_foreground_dice": ce_foreground_dice,
}

# ---------------------------------------------------------------------------------------------------------------------
# consistency: gradients flow to both sides; a teacher has none because it is computed without


def softmax_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Map ``(B, C, ...)`` of squared differences of the two softmaxes."""
    return (_softmax(student_logits) - _softmax(teacher_logits)).square()


def softmax_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Map ``(B, C, ...)`` of ``p' (log p' - log p)``, p' the teacher's softmax (yulequan/UA-MT)."""
    teacher = F.log_softmax(_wide(teacher_logits), dim=1)
    return teacher.exp() * (teacher - F.log_softmax(_wide(student_logits), dim=1))


def softmax_kl_mean(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean of `softmax_kl` over every element, classes included (SSL4MIS, AC-MT, CFR)."""
    return softmax_kl(student_logits, teacher_logits).mean()


def softmax_dice(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over classes of `linear_dice_loss` between the two softmaxes (SSL4MIS ``softmax_dice_loss``)."""
    pairs = zip(_softmax(student_logits).unbind(1), _softmax(teacher_logits).unbind(1), strict=True)
    return torch.stack([linear_dice_loss(a, b) for a, b in pairs]).mean()


def soft_dice_loss(score: Tensor, other: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Mean over classes of ``1 - (2 sum(p q) + e) / (sum(p^2) + sum(q^2) + e)`` of two softmaxes ``(B, C, ...)``.

    Sums run over batch and space together, and gradients flow to both sides (ycwu1997/SS-Net code/train_ss_2d.py).
    """
    everything_else = (0, *range(2, score.ndim))
    size = (score.square() + other.square()).sum(everything_else)
    return (1.0 - (2.0 * (score * other).sum(everything_else) + smooth) / (size + smooth)).mean()


def sigmoid_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Map ``(B, C, ...)`` of squared differences of the two sigmoids."""
    return (_wide(student_logits).sigmoid() - _wide(teacher_logits).sigmoid()).square()


def sigmoid_kl_mean(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean over every element of ``q (log q - log sigmoid(z))``, q the teacher's sigmoid (SSL4MIS)."""
    teacher = F.logsigmoid(_wide(teacher_logits))
    return (teacher.exp() * (teacher - F.logsigmoid(_wide(student_logits)))).mean()


def symmetric_mse(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of two logit maps (CPCL's stability term)."""
    return (_wide(first) - _wide(second)).square().mean()


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """``p^(1/T) / sum_c p^(1/T)`` of the softmax p ``(B, C, ...)``, which is the softmax of ``logits / T``.

    For two classes it is MC-Net's ``p^(1/T) / (p^(1/T) + (1 - p)^(1/T))`` (ycwu1997/MC-Net).
    """
    return F.softmax(_wide(logits) / temperature, dim=1)


def mutual_distances(probabilities: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """For each of K softmaxes the sum over the K - 1 other ones' targets of the mean squared difference, ``(K,)``."""
    rows = [
        [(own - other).square().mean() for index, other in enumerate(targets) if index != place]
        for place, own in enumerate(probabilities)
    ]
    return torch.stack([torch.stack(row).sum() for row in rows])


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` ``(B, C, ...)`` where ``mask`` ``(B, 1 or C, ...)`` is True or 1; 0 where it is nowhere."""
    kept = mask.sum() * (values.shape[1] // mask.shape[1])
    return (mask * values).sum() / (kept + 1e-16)


def entropy_map(probabilities: Tensor, normalised: bool = True) -> Tensor:
    """Map ``(B, 1, ...)`` of ``-sum_c p log(p + 1e-6)``, divided by ln C if ``normalised``."""
    entropy = -(probabilities * (probabilities + 1e-6).log()).sum(dim=1, keepdim=True)
    return entropy / math.log(probabilities.shape[1]) if normalised else entropy


# ---------------------------------------------------------------------------------------------------------------------
# class maps


def class_map(logits: Tensor) -> Tensor:
    """Return the uint8 map ``(B, ...)`` of the largest of ``(B, C, ...)``, the first on ties; scores must not be NaN.

    `torch.argmax` over a channel axis that is not the innermost is a trap on CPUs (365 times slower for two classes).
    """
    best, *others = logits.unbind(1)
    if len(others) == 1:
        return (others[0] > best).to(torch.uint8)
    winner = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for index, score in enumerate(others, start=1):
        winner.masked_fill_(score > best, index)
        best = torch.maximum(best, score)
    return winner


def confident_class_map(probabilities: Tensor, threshold: float) -> Tensor:
    """`class_map`, but 255 where no probability reaches ``threshold``."""
    return class_map(probabilities).masked_fill_(probabilities.amax(dim=1) < threshold, IGNORE)


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Bool ``(B, 1, ...)`` where two logit maps ``(B, C, ...)`` name different classes."""
    return (class_map(first.detach()) != class_map(second.detach())).unsqueeze(1)


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Bool ``(B, C, ...)`` of labels ``(B, ...)``: a byte a class and voxel; all False where the label is no class."""
    names = torch.arange(classes, dtype=target.dtype, device=target.device)
    return target.unsqueeze(1) == names.view(-1, *[1] * (target.ndim - 1))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _softmax(logits: Tensor) -> Tensor:
    return F.softmax(_wide(logits), dim=1)


def _dice_terms(probabilities: Tensor, mask: Tensor, smooth: float) -> Tensor:
    """The Dice loss of each class, ``(C,)``."""
    everything_else = (0, *range(2, probabilities.ndim))
    overlap = (probabilities * mask).sum(everything_else)
    size = probabilities.square().sum(everything_else) + mask.sum(everything_else)
    return 1.0 - (2.0 * overlap + smooth) / (size + smooth)
