"""What flows: volumes, cases, splits. Checked once here, trusted everywhere after.

One axis convention: a volume is ``(H, W, D)`` with the slices along the last axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfrbench.config import digest
from cfrbench.errors import DataError

#: label value that no loss counts; for padding only
IGNORE = 255


def check_classes(num_classes: int) -> None:
    """DataError unless so many classes, background included, can be told apart in a label."""
    if not 1 <= num_classes <= IGNORE:
        raise DataError(f"{num_classes} classes do not fit: labels have 8 bits, and {IGNORE} in them marks padding, so "
                        f"there are 1 to {IGNORE} classes with background. Merge some, or leave some out of the data "
                        "set.")  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """An image, its label if there is one, and its voxel size.

    image: ``(H, W, D)`` float32, finite and not constant. label: ``(H, W, D)`` uint8 in ``[0, num_classes)`` or None.
    """

    image: Tensor
    label: Tensor | None
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(H, W, D)``."""
        height, width, depth = self.image.shape
        return height, width, depth


def checked_volume(
    where: str,
    image: Tensor,
    label: Tensor | None,
    num_classes: int,
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
) -> Volume:
    """Build a Volume from raw arrays; ``where`` names the file in the DataError of anything wrong."""
    if image.ndim != 3 or min(image.shape) < 1:
        raise DataError(f"{where}: the image has shape {tuple(image.shape)}; a 3D volume (H, W, D) is needed. "
                        "Store one scalar volume per case.")  # fmt: skip
    image = image.to(torch.float32)
    if not bool(torch.isfinite(image).all()):
        count = int((~torch.isfinite(image)).sum())
        raise DataError(f"{where}: the image holds {count} NaN or infinite voxels. Replace them or leave the case out.")
    if bool(image.min() == image.max()):
        raise DataError(f"{where}: every voxel of the image is {float(image.min()):g}; there is nothing to segment. "
                        "The file may be damaged: fetch or convert it again.")  # fmt: skip
    if any(not s > 0 for s in spacing_mm):
        raise DataError(f"{where}: the spacing {tuple(spacing_mm)} mm is not positive. Repair the file's header.")
    sx, sy, sz = (float(s) for s in spacing_mm)
    return Volume(image.contiguous(), _checked_label(where, image, label, num_classes), (sx, sy, sz))


def _checked_label(where: str, image: Tensor, label: Tensor | None, num_classes: int) -> Tensor | None:
    check_classes(num_classes)
    if label is None:
        return None
    if label.shape != image.shape:
        raise DataError(f"{where}: the label has shape {tuple(label.shape)}, the image {tuple(image.shape)}. "
                        "They must be on one grid: check that they belong to the same case.")  # fmt: skip
    # Labels stored as floats with scaling come back as 0.9999: round before comparing.
    whole = label.round() if label.is_floating_point() else label
    if label.is_floating_point() and not bool((whole - label).abs().le(1e-3).all()):
        raise DataError(f"{where}: the label holds values that are not whole numbers. Is it a probability map? "
                        "Store class numbers.")  # fmt: skip
    low, high = int(whole.min()), int(whole.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"{where}: the label holds values {low}..{high}, but this data set has {num_classes} classes "
                        f"(0..{num_classes - 1}). Map the labels or choose the right data set.")  # fmt: skip
    return whole.to(torch.uint8).contiguous()


@dataclass(frozen=True)
class Split:
    """Case ids by role. The first N of ``train`` are the labelled ones of budget N."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("train", "test", "val"):
            cases = getattr(self, name)
            twice = sorted({c for c in cases if cases.count(c) > 1})
            if twice:
                raise DataError(f"The {name} list names {', '.join(twice)} more than once. Remove the repetition.")
        for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
            both = sorted(set(getattr(self, a)) & set(getattr(self, b)))
            if both:
                raise DataError(f"{', '.join(both)} stand in the {a} list and in the {b} list; scores on seen cases "
                                "mean nothing. Take them out of one list.")  # fmt: skip
        if not self.train or not self.test:
            empty = "train" if not self.train else "test"
            raise DataError(f"The {empty} list is empty. Name at least one case in it.")

    @property
    def sha256(self) -> str:
        """Hash of the lists: numbers of equal splits are comparable, whatever the files are called or packed in."""
        return digest([self.train, self.val, self.test])

    def labelled(self, budget: int) -> tuple[str, ...]:
        """The first ``budget`` training cases; DataError if there are not as many."""
        if not 1 <= budget <= len(self.train):
            raise DataError(f"{budget} labelled cases were asked for, but the training list has {len(self.train)}. "
                            f"Choose --labels between 1 and {len(self.train)}.")  # fmt: skip
        return self.train[:budget]

    def unlabelled(self, budget: int) -> tuple[str, ...]:
        """The training cases after the first ``budget``."""
        self.labelled(budget)
        return self.train[budget:]
