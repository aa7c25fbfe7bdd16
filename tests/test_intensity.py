"""What each intensity change may do to a crop, and that the fast curve is the plain one."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfrbench.errors import ConfigError, UsageError
from cfrbench.intensity import (
    Floats,
    augment_intensity,
    bend_slices,
    bezier_curve,
    bezier_map,
    bezier_map_rescaled,
    bezier_points,
)

MODES = ("none", "bezier", "bezier-rescaled", "gamma")
units = st.floats(0, 1, exclude_max=True)
draws = st.tuples(units, units, units, units)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def crops_for(mode: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Crops (B, H, W, D): standardised ones, or in [0, 1] for gamma."""
    values = torch.from_numpy(rng(1).normal(size=(2, 6, 5, 20)))
    return (values.sigmoid() if mode == "gamma" else values).to(dtype)


def plain_map(values: Floats, points: Floats) -> Floats:
    """The curve as one would write it down: polynomials made anew for each slice, ordinary sorting."""
    t = np.linspace(0.0, 1.0, 100_000)
    table = np.array([comb(3, i) * t ** (3 - i) * (1 - t) ** i for i in range(4)])
    mapped: Floats = np.interp(values, np.sort(points[:, 0] @ table), np.sort(points[:, 1] @ table))
    return mapped


# ---------------------------------------------------------------------------------------------------------------------
# curves


def test_points_come_from_four_draws_each() -> None:
    points = bezier_points([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    assert points.shape == (2, 4, 2)
    assert points[0].tolist() == [[0, 0], [0.1, 0.2], [0.3, 0.4], [1, 1]]


@settings(deadline=None, max_examples=20)
@given(draws)
def test_the_fast_map_equals_the_plain_one(four: tuple[float, ...]) -> None:
    values, points = rng().normal(size=(8, 9)), bezier_points(four)
    np.testing.assert_allclose(bezier_map(values, points), plain_map(values, points), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(draws)
def test_a_map_rises_clamps_and_stays_in_range(four: tuple[float, ...]) -> None:
    values = np.linspace(-1, 2, 301)
    mapped = bezier_map(values, bezier_points(four))
    assert np.all(np.diff(mapped) >= 0)
    assert np.all(mapped[values <= 0] == 0)
    assert np.all(mapped[values >= 1] == 1)


def test_sorting_only_x_may_invert_the_contrast() -> None:
    points = bezier_points([0.3, 0.4, 0.6, 0.7])  # both coordinates fall along the curve's own direction
    mapped = bezier_map(np.linspace(0, 1, 50), points, "x")
    assert np.all(np.diff(mapped) <= 0)
    assert (mapped[0], mapped[-1]) == (1, 0)


def test_fewer_nodes_stay_close() -> None:
    values = np.linspace(0, 1, 500)
    points = bezier_points([0.2, 0.8, 0.7, 0.3])
    np.testing.assert_allclose(bezier_map(values, points, nodes=2000), bezier_map(values, points), atol=1e-5)


def test_a_curve_runs_from_its_last_point_to_its_first() -> None:
    x, y = bezier_curve(bezier_points([0.2, 0.8, 0.7, 0.3]), nodes=11)
    assert (x[0], y[0], x[-1], y[-1]) == (1, 1, 0, 0)


@settings(deadline=None, max_examples=20)
@given(draws)
def test_the_rescaled_map_keeps_ends_and_order(four: tuple[float, ...]) -> None:
    values = rng().normal(size=200) * 3 - 1
    mapped = bezier_map_rescaled(values, bezier_points(four))
    np.testing.assert_allclose([mapped.min(), mapped.max()], [values.min(), values.max()], rtol=0, atol=1e-12)
    assert np.all(np.diff(mapped[np.argsort(values)]) >= 0)


def test_the_rescaled_map_loses_no_voxel_to_clamping() -> None:
    values = rng().normal(size=2000)
    points = bezier_points([0.3, 0.5, 0.6, 0.5])
    assert len(np.unique(bezier_map(values, points))) < 0.5 * len(values)
    assert len(np.unique(bezier_map_rescaled(values, points))) == len(values)


def test_a_constant_slice_has_no_range_to_bend() -> None:
    values = np.full((3, 3), 7.5)
    assert np.array_equal(bezier_map_rescaled(values, bezier_points([0.1, 0.9, 0.2, 0.8])), values)


def test_bending_touches_the_marked_slices_with_their_own_points() -> None:
    crops = crops_for("bezier")
    chosen = rng(2).random((2, 20)) < 0.5
    points = bezier_points(rng(3).random((int(chosen.sum()), 4)))
    bent = bend_slices(crops, chosen, points)
    expected = crops.clone()
    for (b, z), control in zip(np.argwhere(chosen), points, strict=True):
        expected[b, :, :, z] = torch.from_numpy(plain_map(crops[b, :, :, z].double().numpy(), control))
    assert torch.equal(bent, expected)
    assert torch.equal(bend_slices(crops, np.zeros_like(chosen), points[:0]), crops)


# ---------------------------------------------------------------------------------------------------------------------
# the front door


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_the_input_is_never_modified_and_the_same_draws_give_the_same_crops(mode: str, dtype: torch.dtype) -> None:
    crops = crops_for(mode, dtype)
    before = crops.clone()
    first, second = (augment_intensity(crops, mode, 1.0, rng(4)) for _ in range(2))
    assert torch.equal(crops, before)
    assert torch.equal(first, second)
    assert (first.shape, first.dtype) == (crops.shape, dtype)
    assert torch.equal(first, crops) == (mode == "none")


@pytest.mark.parametrize("mode", MODES)
def test_a_rate_of_zero_changes_nothing(mode: str) -> None:
    crops = crops_for(mode)
    assert torch.equal(augment_intensity(crops, mode, 0.0, rng()), crops)


@pytest.mark.parametrize("mode", ["bezier", "bezier-rescaled"])
def test_slices_are_chosen_and_bent_independently(mode: str) -> None:
    crops = crops_for(mode)
    other = crops.clone()
    other[1, :, :, 7] += 1
    first, second = augment_intensity(crops, mode, 1.0, rng()), augment_intensity(other, mode, 1.0, rng())
    differs = (first != second).any(dim=1).any(dim=1)
    assert differs.nonzero().tolist() == [[1, 7]]
    half = (augment_intensity(crops, mode, 0.5, rng()) != crops).any(dim=1).any(dim=1)
    assert 0 < int(half.sum()) < half.numel()
    assert bool(half.any(dim=1).all())


def test_the_official_mode_clamps_standardised_slices_and_the_rescaled_one_does_not() -> None:
    crops = crops_for("bezier")
    clamped = augment_intensity(crops, "bezier", 1.0, rng())
    assert (float(clamped.min()), float(clamped.max())) == (0.0, 1.0)
    kept = augment_intensity(crops, "bezier-rescaled", 1.0, rng())
    torch.testing.assert_close(kept.amin(dim=(1, 2)), crops.amin(dim=(1, 2)))
    torch.testing.assert_close(kept.amax(dim=(1, 2)), crops.amax(dim=(1, 2)))


def test_gamma_changes_whole_crops_and_keeps_their_order_and_range() -> None:
    crops = crops_for("gamma")[:1].expand(40, -1, -1, -1)
    bent = augment_intensity(crops, "gamma", 0.5, rng(5))
    changed = (bent != crops).flatten(1).any(dim=1)
    assert 8 < int(changed.sum()) < 32
    assert float(bent.min()) >= 0
    assert float(bent.max()) <= 1
    order = crops[0].flatten().argsort()
    assert bool((bent.flatten(1)[:, order].diff(dim=1) >= 0).all())
    middle = bent[changed].flatten(1)[:, order[len(order) // 2]]
    assert float(middle.std()) > 0.02


def test_gamma_spans_half_to_double_and_small_shifts() -> None:
    crops = torch.full((4000, 1, 1, 1), 0.25)
    bent = augment_intensity(crops, "gamma", 1.0, rng(6)).flatten()
    # Ends by hand: 0.25 ** 2 and 0.25 ** 0.5, contrast about 0.5 by a tenth, brightness by a twentieth.
    assert 0 <= float(bent.min()) < 0.04
    assert 0.52 < float(bent.max()) <= 0.55 + 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_the_number_of_draws_does_not_depend_on_the_crops(mode: str) -> None:
    first, second = rng(), rng()
    augment_intensity(crops_for(mode), mode, 0.5, first)
    augment_intensity(torch.zeros(2, 3, 3, 20), mode, 0.1, second)
    assert first.random() == second.random()


def test_gamma_refuses_crops_of_another_scale() -> None:
    with pytest.raises(UsageError, match=r"\[0, 1\].*bezier-rescaled"):
        augment_intensity(crops_for("bezier"), "gamma", 0.5, rng())


def test_unknown_modes_and_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'bezier'"):
        augment_intensity(crops_for("bezier"), "bezir", 0.5, rng())
    with pytest.raises(UsageError, match=r"\(B, H, W, D\)"):
        augment_intensity(torch.zeros(4, 4, 4), "bezier", 0.5, rng())
