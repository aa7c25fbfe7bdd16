"""What is done to a scan before a network sees it, as one frozen value, and the way back for its label map.

Data sets record their steps, so that a scan which was never part of the set goes through the same ones. The order is
fixed: crop to what is not empty, resample, clip, normalise. Orientation is settled before (`DataSource.axcodes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cfrbench.config import Frozen, Triple
from cfrbench.errors import DataError

Spacing = tuple[float, float, float]


class Placement(Frozen):
    """Where a prepared array lies on the grid it came from: enough to put a label map back.

    shape: sides before any step. start, stop: the box that was cut out. sides: of the prepared array.
    """

    shape: Triple
    start: Triple
    stop: Triple
    sides: Triple

    @property
    def box(self) -> tuple[slice, slice, slice]:
        """The cut as an index."""
        x, y, z = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return x, y, z

    @property
    def untouched(self) -> bool:
        """Whether the prepared grid is the original one."""
        return self.sides == self.shape

    def restored(self, label: NDArray[Any]) -> NDArray[Any]:
        """The label ``(h, w, d)`` of the prepared grid on the original one: nearest voxel, background outside."""
        if tuple(label.shape) != self.sides:
            raise DataError(f"A label map of shape {tuple(label.shape)} does not belong to a case that was prepared "
                            f"as {self.sides}. Pass the map that was predicted for this case.")  # fmt: skip
        if self.untouched:
            return label
        x, y, z = (b - a for a, b in zip(self.start, self.stop, strict=True))
        whole = np.zeros(self.shape, label.dtype)
        whole[self.box] = nearest(label, (x, y, z))
        return whole


@dataclass(frozen=True)
class Placed:
    """A prepared image ``(h, w, d)`` with its voxel size and its place on the original grid."""

    image: NDArray[Any]
    spacing_mm: Spacing
    placement: Placement


class ScanSteps(Frozen):
    """Everything is off by default: the array stays as it is stored."""

    crop: Literal["none", "nonzero", "nonzero-open", "above-minimum"] = Field(
        "none",
        description="to the box of what is not 0; 'nonzero-open' loses one slice at each far side (SSL4MIS); "
        "'above-minimum': of what is brighter than the darkest voxel, where background is not 0",
    )
    spacing_mm: Spacing | None = Field(None, description="resample to this voxel size: image linear, label nearest")
    window: tuple[float, float] | None = Field(None, description="clip to these intensities, e.g. Hounsfield units")
    clip_above: float | None = Field(None, gt=0, le=1, description="clip at this share of the cumulative histogram")
    normalise: Literal["none", "zscore", "zscore-positive", "zscore-above-minimum"] = Field(
        "none",
        description="'zscore-positive': mean and deviation of voxels above 0, applied to all (SSL4MIS); "
        "'zscore-above-minimum': of voxels brighter than the darkest",
    )

    @property
    def none(self) -> bool:
        """Whether nothing is done."""
        return self == ScanSteps()

    def words(self) -> tuple[str, ...]:
        """The steps in words, in order."""
        return tuple(f"{name.replace('_', ' ')} {value}" for name, value in self
                     if value is not None and value != "none")  # fmt: skip

    def place(self, image: NDArray[Any], spacing_mm: Spacing) -> Placed:
        """Prepare an image ``(H, W, D)``; DataError if it is empty where it must not be."""
        start, stop = _box(image, self.crop)
        cut = image[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
        sides = _sides(cut.shape)
        if self.spacing_mm is not None:
            sides = _sides(tuple(max(1, round(n * a / b))
                                 for n, a, b in zip(cut.shape, spacing_mm, self.spacing_mm, strict=True)))  # fmt: skip
            # What the voxels are after rounding the sides, so that lengths in mm stay true.
            x, y, z = (n * a / m for n, a, m in zip(cut.shape, spacing_mm, sides, strict=True))
            spacing_mm = (x, y, z)
        placed = linear(cut, sides)
        return Placed(self._intensities(placed), spacing_mm,
                      Placement(shape=_sides(image.shape), start=start, stop=stop, sides=sides))  # fmt: skip

    def _intensities(self, image: NDArray[Any]) -> NDArray[Any]:
        if self.window is not None:
            image = np.clip(image, *self.window)
        if self.clip_above is not None:
            image = np.minimum(image, _cumulative(image, self.clip_above))
        if self.normalise == "none":
            return image
        floor = {"zscore-positive": 0, "zscore-above-minimum": image.min()}.get(self.normalise)
        seen = image if floor is None else image[image > floor]
        deviation = float(seen.std(dtype=np.float64)) if seen.size else 0.0
        if not deviation > 0:
            raise DataError("its intensities do not vary, so they cannot be normalised. Leave the case out.")
        scaled: NDArray[Any] = ((image - seen.mean(dtype=np.float64)) / deviation).astype(np.float32)
        return scaled


def placed_label(label: NDArray[Any], placement: Placement) -> NDArray[Any]:
    """A label ``(H, W, D)`` through the same crop and resampling as its image, by the nearest voxel."""
    return nearest(label[placement.box], placement.sides)


def linear(image: NDArray[Any], sides: Triple) -> NDArray[Any]:
    """Resample ``(H, W, D)`` to other sides: linear between voxel centres, constant beyond the outer ones."""
    if tuple(image.shape) == sides:
        return image
    from scipy import ndimage

    factors = [new / old for new, old in zip(sides, image.shape, strict=True)]
    source = np.ascontiguousarray(image, dtype=np.float32)
    resampled: NDArray[Any] = ndimage.zoom(source, factors, order=1, mode="nearest", grid_mode=True)
    return resampled


def nearest(label: NDArray[Any], sides: Triple) -> NDArray[Any]:
    """Resample ``(H, W, D)`` to other sides by picking the voxel under each new centre; no new value comes up."""
    if tuple(label.shape) == sides:
        return label
    # floor((i + 0.5) * old / new) without rounding
    picks = [(2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(sides, label.shape, strict=True)]
    return label[np.ix_(*picks)]


def _box(image: NDArray[Any], crop: str) -> tuple[Triple, Triple]:
    if crop == "none":
        return (0, 0, 0), _sides(image.shape)
    full = image > image.min() if crop == "above-minimum" else image != 0
    found = [np.flatnonzero(full.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    if not found[0].size:
        raise DataError("it is 0 everywhere, so there is nothing to crop to. The file may be damaged.")
    far = 0 if crop == "nonzero-open" else 1
    start = _sides(tuple(int(f[0]) for f in found))
    return start, _sides(tuple(max(int(f[-1]) + far, a + 1) for f, a in zip(found, start, strict=True)))


def _cumulative(image: NDArray[Any], share: float) -> float:
    """The first intensity at which the cumulative histogram (256 bins, one a value for integers) reaches ``share``."""
    from skimage import exposure

    reached, centres = exposure.cumulative_distribution(image)  # type: ignore[no-untyped-call]
    return float(centres[reached >= share][0])


def _sides(shape: tuple[int, ...]) -> Triple:
    height, width, depth = shape
    return height, width, depth
