"""The four scores of a case against medpy's four calls, on real masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from medpy.metric import binary
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.timing import Comparison, compare, seconds
from cfrbench.metrics import Scores, score_case

Labels = NDArray[np.uint8]
pytestmark = pytest.mark.benchmark_only


def jittered(truth: Labels, seed: int, voxels: float) -> Labels:
    """``truth`` with its surface moved in and out by smooth noise of that many voxels (standard deviation)."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal(truth.shape), 4.0)
    inside = ndimage.distance_transform_edt(truth) - ndimage.distance_transform_edt(truth == 0)
    return np.asarray(inside + voxels * noise / noise.std() > 0, dtype=np.uint8)


def medpy_scores(prediction: Labels, truth: Labels) -> Scores:
    return Scores(
        dice=100.0 * float(binary.dc(prediction, truth)),
        jaccard=100.0 * float(binary.jc(prediction, truth)),
        asd=float(binary.asd(prediction, truth)),
        hd95=float(binary.hd95(prediction, truth)),
    )


def test_scores_of_left_atria(data_folder: Path, benchmark: Any) -> None:
    files = sorted((data_folder / "la").rglob("*.h5"))[:4]
    assert files
    truths = [np.asarray(h5py.File(file)["label"]) for file in files]
    pairs = [(jittered(truth, seed, 3.0), truth) for seed, truth in enumerate(truths)]
    for prediction, truth in pairs:
        ours, theirs = score_case(prediction, truth, 2)[1], medpy_scores(prediction, truth)
        assert vars(ours) == pytest.approx(vars(theirs), abs=1e-9)
    result = compare(
        lambda: [medpy_scores(*pair) for pair in pairs],
        lambda: [score_case(*pair, 2) for pair in pairs],
        repeats=1,
    )
    benchmark.extra_info["against medpy"] = str(result)
    benchmark(lambda: score_case(*pairs[0], 2))
    assert result.ratio >= 8.0, str(result)


def test_scores_of_thirteen_organs(benchmark: Any) -> None:
    """A made-up abdomen of CT size: smooth noise in thirteen boxes."""
    rng = np.random.default_rng(0)
    truth = np.zeros((240, 240, 160), dtype=np.uint8)
    for organ in range(1, 14):
        x, y, z = (int(rng.integers(0, side - 40)) for side in truth.shape)
        field = ndimage.gaussian_filter(rng.standard_normal((40, 40, 40)), 5.0)
        truth[x : x + 40, y : y + 40, z : z + 40][field > 0] = organ
    prediction = np.roll(truth, (1, 2, 1), axis=(0, 1, 2))
    theirs: dict[int, Scores] = {}

    def plain() -> None:
        theirs.update({organ: medpy_scores(prediction == organ, truth == organ) for organ in range(1, 14)})

    # Half a minute: once, and its results are those compared.
    result = Comparison(seconds(plain), seconds(lambda: score_case(prediction, truth, 14), 3))
    ours = score_case(prediction, truth, 14)
    assert all(vars(ours[organ]) == pytest.approx(vars(theirs[organ]), abs=1e-9) for organ in range(1, 14))
    benchmark.extra_info["against medpy"] = str(result)
    benchmark(lambda: score_case(prediction, truth, 14))
    assert result.ratio >= 60.0, str(result)
