"""Both synthetic data sets: pure functions of their settings, every class in every case, real variety, quick."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from cfrbench import registry
from cfrbench.config import PRESETS, PresetName, RunConfig
from cfrbench.datasets import check_source, refuse_duplicates
from cfrbench.errors import DataError
from cfrbench_data.phantom import Phantom
from cfrbench_data.phantom_organs import PhantomOrgans
from cfrbench_data.synthesis import SyntheticSource, ellipsoid, smooth_field, tube, voxel_centres

SOURCES: list[type[SyntheticSource]] = [Phantom, PhantomOrgans]
SMALL = {"shape": (40, 40, 16), "train": 4, "test": 2}
both = pytest.mark.parametrize("cls", SOURCES, ids=lambda cls: cls.name)


def make(cls: type[SyntheticSource], **values: object) -> SyntheticSource:
    return cls(cls.Config.model_validate({**SMALL, **values}))


@both
def test_registry_finds_it_and_marks_it_synthetic(cls: type[SyntheticSource]) -> None:
    assert registry.load("data", cls.name) is cls
    assert cls.synthetic


@both
def test_defaults_leave_unlabelled_cases_at_the_largest_budget(cls: type[SyntheticSource]) -> None:
    split = cls().split()
    assert len(split.unlabelled(16)) >= 1
    assert len(split.test) >= 6
    assert max(cls.budgets.values()) < len(split.train)


@both
def test_a_case_depends_on_seed_role_and_number_alone(cls: type[SyntheticSource]) -> None:
    one, more, other = make(cls), make(cls, train=7, test=3), make(cls, seed=1)
    for case in ("train-01", "test-01"):
        first, again = one.load(case), more.load(case)
        assert torch.equal(first.image, again.image)
        assert first.label is not None
        assert again.label is not None
        assert torch.equal(first.label, again.label)
        assert one.fingerprint()[case] == more.fingerprint()[case]
        assert not torch.equal(first.image, other.load(case).image)
        assert one.fingerprint()[case] != other.fingerprint()[case]
    assert not torch.equal(one.load("train-01").image, one.load("test-01").image)


@both
def test_another_process_draws_the_same_voxels(cls: type[SyntheticSource]) -> None:
    code = (
        f"from {cls.__module__} import {cls.__name__} as S; import hashlib\n"
        f"v = S(S.Config.model_validate({SMALL!r})).load('train-02')\n"
        "print(hashlib.sha256(v.image.numpy().tobytes() + v.label.numpy().tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    volume = make(cls).load("train-02")
    assert volume.label is not None
    here = hashlib.sha256(volume.image.numpy().tobytes() + volume.label.numpy().tobytes()).hexdigest()
    assert run.stdout.strip() == here


@both
@pytest.mark.parametrize(
    ("knob", "value"), [("seed", 3), ("noise", 0.0), ("bias", 0.0), ("lookalikes", 0.0), ("contrast_jitter", 0.0),
                        ("shape_jitter", 0.0), ("shape", (32, 40, 16))]
)  # fmt: skip
def test_every_knob_changes_voxels_and_fingerprint(cls: type[SyntheticSource], knob: str, value: object) -> None:
    plain, turned = make(cls), make(cls, **{knob: value})
    assert plain.fingerprint()["test-00"] != turned.fingerprint()["test-00"]
    before, after = plain.load("test-00").image, turned.load("test-00").image
    assert before.shape != after.shape or not torch.equal(before, after)


@both
@pytest.mark.parametrize("seed", [0, 1])
def test_every_class_is_in_every_case(cls: type[SyntheticSource], seed: int) -> None:
    source = make(cls, seed=seed, shape=(80, 80, 32), train=5, test=3)
    split = source.split()
    for case in (*split.train, *split.test):
        label = source.load(case).label
        assert label is not None
        counts = torch.bincount(label.flatten().long(), minlength=source.num_classes)
        assert int(counts.min()) >= 100, (case, counts.tolist())
        assert counts[0] > 0.6 * counts.sum()


@both
def test_contrast_of_each_class_varies_between_cases_but_never_vanishes(cls: type[SyntheticSource]) -> None:
    varied, still = _contrasts(make(cls, train=10)), _contrasts(make(cls, train=10, contrast_jitter=0.0))
    assert (varied.std(0) > 1.1 * still.std(0)).mean() > 0.8
    assert varied.std(0).min() > 0.1
    assert (varied.mean(1) > 0.2).all()


def _contrasts(source: SyntheticSource) -> np.ndarray:
    """Case by class: mean z-scored brightness of the class above the background's middle value."""
    rows = []
    for case in source.split().train:
        volume = source.load(case)
        assert volume.label is not None
        scored = (volume.image - volume.image.mean()) / volume.image.std()
        middle = scored[volume.label == 0].median()
        rows.append([float(scored[volume.label == c].mean() - middle) for c in range(1, source.num_classes)])
    return np.array(rows)


def test_other_things_are_as_bright_as_the_chamber() -> None:
    source = make(Phantom, shape=(80, 80, 32), train=6)
    for case in source.split().train:
        volume = source.load(case)
        assert volume.label is not None
        level = volume.image[volume.label > 0].median()
        bright = (volume.image > 0.9 * level + 0.1 * volume.image.median()) & (volume.label == 0)
        assert int(bright.sum()) > 0.25 * int((volume.label > 0).sum())


@both
def test_anatomy_keeps_its_size_on_another_grid(cls: type[SyntheticSource]) -> None:
    fine, coarse = make(cls, shape=(80, 80, 32)), make(cls, shape=(40, 40, 32))
    assert np.allclose(np.multiply(fine.spacing_mm, (80, 80, 32)), cls.field_of_view_mm)

    def volume_mm3(source: SyntheticSource) -> float:
        label = source.load("train-00").label
        assert label is not None
        return float((label > 0).sum()) * float(np.prod(source.spacing_mm))

    assert volume_mm3(coarse) == pytest.approx(volume_mm3(fine), rel=0.05)


@both
def test_a_case_takes_well_under_a_second(cls: type[SyntheticSource]) -> None:
    source = cls()
    source.load("train-00")
    seconds = []
    for number in range(3):
        start = time.process_time()
        source.load(f"train-{number:02d}")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5


@both
def test_the_source_passes_its_own_check(cls: type[SyntheticSource]) -> None:
    source = make(cls, shape=(80, 80, 32))
    refuse_duplicates(source.fingerprint())
    assert check_source(source) == []


@both
@pytest.mark.parametrize("case", ["train", "train-x", "val-00", "../x", "train--1", ""])
def test_unknown_cases_are_refused(cls: type[SyntheticSource], case: str) -> None:
    with pytest.raises(DataError, match="has no case"):
        make(cls).load(case)


@both
@pytest.mark.parametrize("preset", PRESETS)
def test_protocols_are_valid_settings(cls: type[SyntheticSource], preset: PresetName) -> None:
    settings = RunConfig(dataset=cls.name, preset=preset).settings(cls().protocol(preset))
    shape = [side // settings.grid.downsample for side in cls().config.shape]
    assert all(side <= room for side, room in zip(settings.training.patch, shape, strict=True)), (preset, shape)


# ---------------------------------------------------------------------------------------------------------------------
# shapes


def test_ellipsoid_and_tube_are_distances() -> None:
    points = voxel_centres((41, 41, 41), (1.0, 1.0, 1.0))
    radius = np.sqrt((points**2).sum(0))
    away = radius > 2
    assert np.allclose(ellipsoid(points, (0, 0, 0), (9, 9, 9))[away], (radius - 9)[away], atol=1e-3)
    across = np.sqrt((points[:2] ** 2).sum(0))
    straight = tube(points, ((0, 0, -90), (0, 0, 0), (0, 0, 90)), 4.0)
    assert np.allclose(straight, across - 4, atol=1e-3)


def test_smooth_field_passes_through_its_knots() -> None:
    knots = np.random.Generator(np.random.Philox(3)).standard_normal((4, 3, 3), dtype=np.float32)
    field = smooth_field(np.random.Generator(np.random.Philox(3)), (31, 21, 11), (4, 3, 3))
    assert field.shape == (31, 21, 11)
    assert field.dtype == np.float32
    assert np.allclose(field[::10, ::10, ::5], knots, atol=1e-4)
