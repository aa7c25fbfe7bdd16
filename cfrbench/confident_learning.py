"""Confident learning: which labels are probably wrong, judged by the probabilities of another network.

Northcutt et al., Confident learning: estimating uncertainty in dataset labels, JAIR 2021; the numbers are those of
cleanlab 2.9 with its default options, but where equal probabilities leave a choice. Items are voxels in any order:
labels ``(N,)`` of any integer type in [0, C), probabilities ``(C, N)``. Loops run over classes, never over items.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfrbench.losses import class_map

Pruning = Literal["both", "class", "noise-rate"]

#: an item counts for a class from this little below the class's threshold
SLACK = 1e-6


def label_issues(labels: Tensor, probabilities: Tensor, pruning: Pruning = "both") -> Tensor:
    """Mark ``(B, ...)`` the labels ``(B, ...)`` that the probabilities ``(B, C, ...)`` call wrong; one count for all.

    pruning: ``class`` takes, of each class, as many items as it has errors, the least probable first; ``noise-rate``
    takes, of each pair of classes, as many as are confused, by margin; ``both`` takes what both take. A label that no
    other class beats is never wrong.
    """
    flat, items = labels.flatten().long(), probabilities.movedim(1, 0).flatten(1)
    joint = _keep_one(calibrated_joint(confident_joint(flat, items), flat))
    wrong = _own(flat, items) < items.amax(dim=0)
    if pruning in ("both", "class"):
        wrong &= _pruned_by_class(flat, items, joint)
    if pruning in ("both", "noise-rate"):
        wrong &= _pruned_by_noise_rate(flat, items, joint)
    return wrong.view(labels.shape)


def confident_thresholds(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Mean probability ``(C,)`` of each class over the items labelled so; 2, which none reaches, for an absent one."""
    # Class by class: on a GPU the sums of bincount come in no fixed order.
    total = torch.stack([(own * (labels == k)).double().sum() for k, own in enumerate(probabilities)])
    counts = class_counts(labels, len(probabilities))
    return torch.where(counts > 0, total / counts.clamp(min=1), 2.0)


def confident_joint(labels: Tensor, probabilities: Tensor) -> Tensor:
    """Count ``(C, C)`` items by label (rows) and by the class they confidently belong to; the diagonal is at least 1.

    An item belongs to the class whose threshold it reaches; to its most probable class, reached or not, if it reaches
    several; and is left out if it reaches none.
    """
    classes = len(probabilities)
    thresholds = (confident_thresholds(labels, probabilities) - SLACK).to(probabilities.dtype)
    reached = probabilities >= thresholds[:, None]
    count = reached.sum(dim=0, dtype=torch.uint8)
    guess = torch.where(count > 1, class_map(probabilities[None])[0], class_map(reached[None])[0])
    cells = torch.where(count > 0, labels * classes + guess, classes * classes)
    joint = torch.bincount(cells, minlength=classes * classes + 1)[:-1].view(classes, classes)
    return joint + torch.diag((1 - joint.diagonal()).clamp(min=0))


def calibrated_joint(joint: Tensor, labels: Tensor) -> Tensor:
    """Scale each row of ``joint`` to the number of items of that label, in whole numbers that keep its sum."""
    counts = class_counts(labels, len(joint)).cpu().numpy()
    table = joint.T.contiguous().cpu().double().numpy()  # label by column: the order of the sum below decides ties
    scaled = table / table.sum(axis=0) * counts
    return torch.from_numpy(_rounded((scaled / scaled.sum() * len(labels)).T))


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Number of items ``(C,)`` of each label."""
    return torch.bincount(labels, minlength=classes)


def _own(labels: Tensor, probabilities: Tensor) -> Tensor:
    """The probability ``(N,)`` of each item's own label."""
    return probabilities.gather(0, labels[None])[0]


def _rounded(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round each row to whole numbers of the same sum: what is missing goes where rounding took most."""
    whole = np.rint(values)
    for row, missing in enumerate(np.rint(values.sum(axis=1)) - whole.sum(axis=1)):
        # numpy's own order among equal errors, whatever it is: cleanlab's numbers depend on it.
        order = np.argsort(values[row] - whole[row])
        chosen = order[::-1][: int(missing)] if missing > 0 else order[: int(-missing)]
        whole[row, chosen] += np.sign(missing)
    return whole.astype(np.int64)


def _keep_one(joint: Tensor) -> Tensor:
    """Leave at least one right item in each class: where there is none, each of its confusions loses one."""
    none = joint.diagonal() == 0
    return joint - (none[:, None] & (joint > 0)).long() + torch.diag(none.long())


def _pruned_by_class(labels: Tensor, probabilities: Tensor, joint: Tensor) -> Tensor:
    found = torch.zeros_like(labels, dtype=torch.bool)
    for k, count in enumerate(class_counts(labels, len(joint)).tolist()):
        errors = count - int(joint[k, k])
        if errors > 0 and count > 1:
            mine = (labels == k).nonzero()[:, 0]
            found[mine] = _smallest(probabilities[k, mine], errors)
    return found


def _pruned_by_noise_rate(labels: Tensor, probabilities: Tensor, joint: Tensor) -> Tensor:
    found = torch.zeros_like(labels, dtype=torch.bool)
    for k, row in enumerate(joint.tolist()):
        others = [j for j, errors in enumerate(row) if j != k and errors > 0]
        if others:
            mine = (labels == k).nonzero()[:, 0]
            own = probabilities[k, mine]
            marks = [_smallest(own - probabilities[j, mine], row[j]) for j in others]
            found[mine] = torch.stack(marks).any(dim=0)
    return found


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` smallest of ``(N,)``; among equal ones the first (cleanlab: any)."""
    cut = values.topk(count, largest=False, sorted=False).values.amax()  # `kthvalue` is not deterministic on a GPU
    below, equal = values < cut, values == cut
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))
