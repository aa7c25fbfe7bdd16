"""From stored volumes to working volumes and back: decoded once, standardised once, kept in memory.

The working grid is the stored grid, or a coarser one (`grid.downsample`). Networks see the working grid; predictions
return to the stored grid as probabilities, so scores are always at full resolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cfrbench.config import GridSection, Triple
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.losses import class_map
from cfrbench.volume import Volume


@dataclass(frozen=True)
class WorkingCase:
    """One case on the working grid: image ``(h, w, d)`` float32, label ``(h, w, d)`` uint8 or None."""

    case: str
    image: Tensor
    label: Tensor | None
    stored_shape: Triple
    spacing_mm: tuple[float, float, float]

    @property
    def shape(self) -> Triple:
        """``(h, w, d)`` on the working grid."""
        height, width, depth = self.image.shape
        return height, width, depth


def standardise(image: Tensor) -> Tensor:
    """Zero mean and unit variance over all voxels (ShumengLI/CFR code/dataloaders/dataset.py).

    numpy's standard deviation, which the original uses, divides by n.
    """
    return (image - image.mean()) / image.std(correction=0)


def coarse_shape(shape: Triple, factor: int) -> Triple:
    """Sides of the working grid: stored sides over ``factor``, rounded up."""
    height, width, depth = (-(-side // factor) for side in shape)
    return height, width, depth


def to_working(case: str, volume: Volume, grid: GridSection, num_classes: int) -> WorkingCase:
    """Standardise, then average over blocks of ``downsample`` voxels a side; labels by majority of each block."""
    image = standardise(volume.image) if grid.standardise else volume.image
    label = volume.label
    if grid.downsample > 1:
        shape = coarse_shape(volume.shape, grid.downsample)
        image = _average(image, shape)
        label = None if label is None else majority(label, shape, num_classes)
    return WorkingCase(case, image.contiguous(), label, volume.shape, volume.spacing_mm)


def majority(label: Tensor, shape: Triple, num_classes: int) -> Tensor:
    """The class that fills most of each block of ``(H, W, D)``, as ``(h, w, d)`` uint8."""
    shares = torch.stack([_average((label == c).float(), shape) for c in range(num_classes)])
    return class_map(shares.unsqueeze(0))[0]


def _average(volume: Tensor, shape: Triple) -> Tensor:
    return F.interpolate(volume[None, None], size=shape, mode="area")[0, 0]


def to_stored(probabilities: Tensor, shape: Triple) -> Tensor:
    """Map working-grid probabilities ``(C, h, w, d)`` to a uint8 label map ``(H, W, D)`` on the stored grid."""
    if tuple(probabilities.shape[1:]) != tuple(shape):
        probabilities = F.interpolate(probabilities[None], size=shape, mode="trilinear", align_corners=False)[0]
    return class_map(probabilities.unsqueeze(0))[0]


@dataclass(frozen=True)
class Truth:
    """What a prediction is scored against: ``(H, W, D)`` uint8 on the stored grid, and the sides of its voxels."""

    label: Tensor
    spacing_mm: tuple[float, float, float]


#: bytes of stored labels that a process keeps, because every method is scored on the same cases: 200 of LA's crops
KEPT_TRUTHS = 512 * 2**20


@dataclass
class Library:
    """Working volumes and stored labels of one data source, each read once per process, labels up to a bound."""

    source: DataSource
    grid: GridSection
    _cases: dict[str, WorkingCase] = field(default_factory=dict)
    _truths: dict[str, Truth] = field(default_factory=dict)

    def __getitem__(self, case: str) -> WorkingCase:
        if case not in self._cases:
            volume = self.source.load(case)
            self._cases[case] = to_working(case, volume, self.grid, self.source.num_classes)
        return self._cases[case]

    def share(self, other: Library) -> None:
        """Take over volumes that another library of the same source and grid has decoded."""
        self._cases, self._truths = other._cases, other._truths

    def labelled(self, case: str) -> WorkingCase:
        """The case with its label; DataError if it has none."""
        found = self[case]
        if found.label is None:
            raise DataError(f"The case {case} of {self.source.title} has no label, but it is one of the labelled "
                            "training cases. Add its label or take it out of the first lines of the list.")  # fmt: skip
        return found

    def image(self, case: str) -> Tensor:
        """The working image alone: the only door to unlabelled cases that training has."""
        return self[case].image

    def truth(self, case: str) -> Truth:
        """The stored label for scoring; DataError without one. Evaluation only: training never calls this."""
        if case in self._truths:
            return self._truths[case]
        volume = self.source.load(case)
        if volume.label is None:
            raise DataError(f"The case {case} of {self.source.title} has no label to score against.")
        truth = Truth(volume.label, volume.spacing_mm)
        # Beyond the bound the first ones are kept, not the last: cases come in the same order every time.
        if sum(kept.label.nbytes for kept in self._truths.values()) + truth.label.nbytes <= KEPT_TRUTHS:
            self._truths[case] = truth
        return truth
