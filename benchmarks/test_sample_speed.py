"""One training sample from volumes in RAM against reading, standardising, turning and cropping the file each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.timing import compare
from cfrbench.config import Settings
from cfrbench.sampling import CropDraw, draw_crop, generator, padding, take_crop

pytestmark = pytest.mark.benchmark_only
Pair = tuple[NDArray[Any], NDArray[Any]]


def read(file: Path) -> Pair:
    """Image, standardised over all voxels, and label."""
    with h5py.File(file) as case:
        image, label = case["image"][:], case["label"][:]
    return (image - image.mean()) / image.std(), label


def official_crop(volume: NDArray[Any], draw: CropDraw) -> NDArray[Any]:
    """Rotate and flip the whole volume, pad it, cut the crop."""
    if draw.axis is not None:
        volume = np.flip(np.rot90(volume, draw.turns), draw.axis)
    height, width, depth = volume.shape
    ends = padding((height, width, depth), draw.patch)
    if any(ends):
        volume = np.pad(volume, [(end, end) for end in ends])
    corners = zip(draw.start, draw.patch, strict=True)
    return volume[tuple(slice(start, start + length) for start, length in corners)].copy()


def test_a_training_sample_of_la(data_folder: Path, benchmark: Any) -> None:
    file = next((data_folder / "la").rglob("*.h5"))
    image, label = (torch.from_numpy(volume) for volume in read(file))
    x, y, z = image.shape
    patch = Settings().training.patch

    def draw(step: int) -> CropDraw:
        return draw_crop((x, y, z), patch, True, generator(0, "crop", step))

    steps = iter(range(10**9))

    def ours() -> list[torch.Tensor]:
        crop = draw(next(steps))
        return [take_crop(volume, crop).contiguous() for volume in (image, label)]

    def plain() -> list[NDArray[Any]]:
        crop = draw(next(steps))
        return [official_crop(volume, crop) for volume in read(file)]

    for step in range(16):
        for volume in (image, label):
            assert np.array_equal(take_crop(volume, draw(step)), official_crop(volume.numpy(), draw(step)))
    result = compare(plain, ours, rounds=7, repeats=16)
    benchmark.extra_info["against reading each time"] = str(result)
    benchmark(ours)
    assert result.ratio >= 50.0, str(result)
