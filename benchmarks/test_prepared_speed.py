"""Prepared volumes against the h5 files they were made from: making them, opening the set, a training sample."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.test_sample_speed import official_crop, read
from benchmarks.timing import compare, seconds
from cfrbench import registry
from cfrbench.config import Settings
from cfrbench.prepared.preparing import PrepareRequest, prepare_set
from cfrbench.prepared.reading import PreparedSet
from cfrbench.sampling import CropDraw, draw_crop, generator, take_crop

pytestmark = pytest.mark.benchmark_only
JOBS = 2


@pytest.fixture(scope="module")
def made(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """The 28 volumes, the folder they were prepared into, z-scored as CFR's loader does, and the seconds that took."""
    raw, folder = data_folder / "la", tmp_path_factory.mktemp("prepared") / "la"
    source = registry.load("data", "la")(root=raw)
    start = perf_counter()
    done = prepare_set(PrepareRequest(source, folder, steps={"normalise": "zscore"}, jobs=JOBS))
    took = perf_counter() - start
    assert len(done.prepared.record.cases) == 28
    return raw, folder, took


def test_preparing_28_volumes(made: tuple[Path, Path, float], benchmark: Any) -> None:
    raw, folder, took = made
    files = sorted(raw.rglob("*.h5"))
    once = seconds(lambda: [read(file) for file in files])
    again = seconds(partial(PreparedSet.open, folder))
    benchmark.extra_info["preparing"] = f"{took:.1f} s on {JOBS} processes; reading and standardising once {once:.1f} s"
    benchmark.extra_info["opening"] = f"{1e3 * again:.1f} ms"
    benchmark(PreparedSet.open, folder)
    assert took < 60, f"{took:.1f} s"
    assert again < 0.5, f"{again:.2f} s"


def test_a_training_sample_of_la(made: tuple[Path, Path, float], benchmark: Any) -> None:
    raw, folder, _ = made
    prepared = PreparedSet.open(folder)
    case = prepared.record.train[0]
    file = next(raw.rglob(f"{case}/*.h5"))
    shape, patch = prepared.case(case).shape, Settings().training.patch
    steps = iter(range(10**9))

    def draw(step: int) -> CropDraw:
        return draw_crop(shape, patch, True, generator(0, "crop", step))

    def mapped() -> tuple[torch.Tensor, torch.Tensor]:
        label = prepared.label(case)
        assert label is not None
        return torch.from_numpy(prepared.image(case)), torch.from_numpy(label)

    def ours() -> list[torch.Tensor]:
        crop = draw(next(steps))
        return [take_crop(volume, crop).contiguous() for volume in mapped()]

    def plain() -> list[NDArray[Any]]:
        crop = draw(next(steps))
        return [official_crop(volume, crop) for volume in read(file)]

    for step in range(8):
        for volume, expected in zip(mapped(), read(file), strict=True):
            np.testing.assert_allclose(take_crop(volume, draw(step)), official_crop(expected, draw(step)), atol=2e-5)
    result = compare(plain, ours, rounds=15, repeats=4)
    benchmark.extra_info["against reading the h5 each time"] = str(result)
    benchmark(ours)
    assert result.ratio >= 30.0, str(result)
