"""Scores against medpy on masks of every awkward kind, and what happens where medpy stops."""

from __future__ import annotations

import builtins
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from medpy.metric import binary
from scipy import ndimage

from cfrbench.errors import ConfigError, DataError
from cfrbench.metrics import EmptyPolicy, Mask, Scores, largest_component, score_case, score_case_medpy, score_class

SHAPE = (15, 12, 9)
SPACINGS = ((1.0, 1.0, 1.0), (0.625, 0.625, 1.25), (0.3, 2.0, 5.0))


def blob(rng: np.random.Generator, smoothness: float, share: float) -> Mask:
    field = ndimage.gaussian_filter(rng.standard_normal(SHAPE), smoothness, mode="wrap")
    return np.asarray(field > np.quantile(field, 1.0 - share))


def mask(rng: np.random.Generator) -> Mask:
    """One of: a smooth blob (often cut by the volume's border), specks, a box on the border, one voxel, all of it."""
    kind = rng.integers(5)
    if kind == 0:
        return blob(rng, 2.0, rng.uniform(0.02, 0.6))
    if kind == 1:
        return blob(rng, 0.5, rng.uniform(0.002, 0.2))
    result = np.zeros(SHAPE, dtype=bool)
    if kind == 2:
        result[: rng.integers(1, 16), rng.integers(0, 12) :, : rng.integers(1, 10)] = True
    elif kind == 3:
        result[tuple(rng.integers(SHAPE))] = True
    else:
        result[:] = True
    return result


def medpy_scores(prediction: Mask, truth: Mask, spacing: Sequence[float]) -> list[float]:
    return [
        100.0 * float(binary.dc(prediction, truth)),
        100.0 * float(binary.jc(prediction, truth)),
        float(binary.asd(prediction, truth, voxelspacing=spacing)),
        float(binary.hd95(prediction, truth, voxelspacing=spacing)),
    ]


def values(scores: Scores) -> list[float]:
    return [scores.dice, scores.jaccard, scores.asd, scores.hd95]


@pytest.mark.parametrize("seed", range(200))
def test_scores_equal_medpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, truth = mask(rng), mask(rng)
    spacing = SPACINGS[seed % len(SPACINGS)]
    scores = score_class(prediction, truth, spacing)
    assert values(scores) == pytest.approx(medpy_scores(prediction, truth, spacing), rel=1e-9, abs=1e-9)
    assert scores.empty == ""


def test_scores_of_thin_volumes_equal_medpy() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 9, 8), (9, 1, 8), (9, 8, 1), (2, 2, 2)):
        prediction, truth = rng.random(shape) > 0.5, rng.random(shape) > 0.5
        assert values(score_class(prediction, truth)) == pytest.approx(medpy_scores(prediction, truth, (1, 1, 1)))


def label_maps(classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    field = ndimage.gaussian_filter(rng.standard_normal((2, classes, *SHAPE)), (0, 0, 1, 1, 1))
    prediction, truth = field.argmax(1).astype(np.uint8)
    return prediction, truth


def test_each_class_is_scored_for_itself() -> None:
    prediction, truth = label_maps(5)
    scores = score_case(prediction, truth, 5, SPACINGS[1])
    assert list(scores) == [1, 2, 3, 4]
    for name, own in scores.items():
        expected = medpy_scores(prediction == name, truth == name, SPACINGS[1])
        assert values(own) == pytest.approx(expected, rel=1e-9)
        assert own == score_class(prediction == name, truth == name, SPACINGS[1])


def test_tensors_and_arrays_of_any_integer_type_are_scored() -> None:
    prediction, truth = label_maps(3)
    expected = score_case(prediction, truth, 3)
    assert score_case(torch.from_numpy(prediction), torch.from_numpy(truth), 3) == expected
    assert score_case(prediction.astype(np.int64), truth.astype(np.int16), 3) == expected


def test_the_medpy_backend_gives_the_same_numbers() -> None:
    prediction, truth = label_maps(4)
    truth[truth == 3] = 0
    native, oracle = (score(prediction, truth, 4, SPACINGS[2]) for score in (score_case, score_case_medpy))
    assert {name: values(s) for name, s in native.items()} == {
        name: pytest.approx(values(s), rel=1e-9) for name, s in oracle.items()
    }
    assert native[3] == oracle[3]
    assert native[3].empty == "truth"


def test_a_missing_medpy_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name.startswith("medpy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"cfrbench\[medpy\].*scoring\.backend=native"):
        score_case_medpy(*label_maps(2), 2)


SOMETHING = np.pad(np.ones((2, 2, 2), dtype=bool), 2)
NOTHING = np.zeros_like(SOMETHING)
DIAGONAL = math.sqrt(6.0**2 + 12.0**2 + 18.0**2)
NAN = math.nan
EMPTY: Mapping[tuple[str, EmptyPolicy], tuple[float, float]] = {
    ("prediction", "penalty"): (0.0, DIAGONAL),
    ("truth", "penalty"): (0.0, DIAGONAL),
    ("both", "penalty"): (100.0, 0.0),
    ("prediction", "paper"): (0.0, 0.0),
    ("truth", "paper"): (0.0, 0.0),
    ("both", "paper"): (0.0, 0.0),
    ("prediction", "nan"): (0.0, NAN),
    ("truth", "nan"): (0.0, NAN),
    ("both", "nan"): (NAN, NAN),
}


@pytest.mark.parametrize(("which", "policy"), EMPTY)
def test_empty_masks_have_the_scores_of_the_policy(which: str, policy: EmptyPolicy) -> None:
    prediction = SOMETHING if which == "truth" else NOTHING
    truth = SOMETHING if which == "prediction" else NOTHING
    scores = score_class(prediction, truth, (1.0, 2.0, 3.0), policy)
    overlap, distance = EMPTY[which, policy]
    assert values(scores) == pytest.approx([overlap, overlap, distance, distance], nan_ok=True)
    assert scores.empty == which


def test_volumes_of_different_shape_are_refused() -> None:
    with pytest.raises(DataError, match=r"\(6, 6, 6\).*\(5, 6, 6\)"):
        score_class(SOMETHING, SOMETHING[1:])


def test_the_largest_component_is_kept_and_corners_connect() -> None:
    volume = np.zeros((8, 8, 8), dtype=bool)
    volume[0, 0, 0] = volume[1, 1, 1] = volume[2, 2, 2] = True
    volume[6:, 6, 6] = True
    kept = largest_component(volume)
    assert np.argwhere(kept).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert np.array_equal(largest_component(kept), kept)
    assert not largest_component(np.zeros((3, 3, 3), dtype=bool)).any()


def test_of_two_equal_components_the_first_is_kept() -> None:
    volume = np.zeros((7, 3, 3), dtype=bool)
    volume[1], volume[5] = True, True
    assert np.flatnonzero(largest_component(volume).any(axis=(1, 2))).tolist() == [1]
