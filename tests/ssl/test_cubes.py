"""Cubes: what is cut or exchanged comes back, places are told apart, every crop that can be cut is cut."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrbench.config import Triple
from cfrbench.contracts import Progress
from cfrbench.cubes import (
    blend,
    choose_grid,
    class_weights,
    cut,
    draw_exchange,
    exchange,
    join,
    join_transposed,
    location_labels,
    recover,
)
from cfrbench.errors import ConfigError
from cfrbench.losses import class_map

SIDES: Triple = (8, 4, 4)
SELF_TRAINING = Progress(100, 200, 1, 50, 100)

few = st.integers(1, 4)
triples = st.tuples(few, few, few)
seeds = st.integers(0, 99)
quick = settings(deadline=None, max_examples=40)


# ---------------------------------------------------------------------------------------------------------------------
# cubes


@quick
@given(triples, triples, few, few, seeds)
def test_exchanged_cubes_come_back(grid: Triple, cube: Triple, crops: int, channels: int, seed: int) -> None:
    torch.manual_seed(seed)
    volume = torch.randn(crops, channels, *(n * side for n, side in zip(grid, cube, strict=True)))
    source = draw_exchange(crops, grid)
    mixed = exchange(volume, source)
    assert torch.equal(recover(mixed, source), volume)
    assert torch.equal(mixed.sort(dim=0).values, volume.sort(dim=0).values)  # every voxel stays at its place


@quick
@given(triples, triples, seeds)
def test_crop_b_gets_the_cube_that_its_source_has_at_that_place(grid: Triple, cube: Triple, seed: int) -> None:
    torch.manual_seed(seed)
    volume = torch.randn(3, 2, *(n * side for n, side in zip(grid, cube, strict=True)))
    source = draw_exchange(3, grid)
    mixed = exchange(volume, source)
    for place in itertools.product(*map(range, grid)):
        box = (slice(None), *(slice(q * side, (q + 1) * side) for q, side in zip(place, cube, strict=True)))
        for crop in range(3):
            assert torch.equal(mixed[crop][box], volume[source[crop][place]][box])


@quick
@given(triples, triples)
def test_cubes_are_listed_with_the_last_axis_fastest_and_joined_again(grid: Triple, cube: Triple) -> None:
    sides = [n * side for n, side in zip(grid, cube, strict=True)]
    volume = torch.arange(2 * math.prod(sides)).view(1, 2, *sides)
    cubes = cut(volume, grid)
    for number, place in enumerate(itertools.product(*map(range, grid))):
        x, y, z = (slice(q * side, (q + 1) * side) for q, side in zip(place, cube, strict=True))
        assert torch.equal(cubes[0, number], volume[0, :, x, y, z])
    assert torch.equal(join(cubes, grid), volume)


@quick
@given(triples)
def test_places_are_told_apart_with_the_first_axis_fastest(grid: Triple) -> None:
    nx, ny, _ = grid
    expected = [x + nx * y + nx * ny * z for x, y, z in itertools.product(*map(range, grid))]
    assert location_labels(grid).tolist() == expected
    assert sorted(expected) == list(range(math.prod(grid)))


@quick
@given(few, few)
def test_the_official_order_exchanges_first_and_last_axis_of_a_cubic_grid(number: int, side: int) -> None:
    grid = (number,) * 3
    volume = torch.arange((number * side) ** 3).view(1, 1, *(number * side,) * 3)
    once = join_transposed(cut(volume, grid), grid)
    assert torch.equal(join_transposed(cut(once, grid), grid), volume)
    for x, y, z in itertools.product(*[range(number)] * 3):
        taken = [slice(q * side, (q + 1) * side) for q in (x, y, z)]
        assert torch.equal(once[0, 0][*taken], volume[0, 0][taken[2], taken[1], taken[0]])


@quick
@given(triples, st.sampled_from([2, 4, 16]))
def test_a_crop_is_cut_wherever_it_can_be(units: Triple, divisor: int) -> None:
    """A legal grid is found whenever there is one; it is of 3 if it can be, and whole axes only where they must be."""
    crop = (units[0] * divisor, units[1] * divisor, units[2] * divisor)
    if units == (1, 1, 1):
        with pytest.raises(ConfigError, match=f"{2 * divisor}x{2 * divisor}x{2 * divisor}"):
            choose_grid(crop, divisor)
        return
    grid = choose_grid(crop, divisor)
    for side, unit, number in zip(crop, units, grid, strict=True):
        assert side % (number * divisor) == 0
        assert (number == 1) == (unit == 1)
        assert number == 3 or unit % 3


@pytest.mark.parametrize(("crop", "divisor", "grid"), [
    ((96, 96, 96), 16, (3, 3, 3)), ((80, 64, 32), 16, (5, 2, 2)), ((112, 112, 80), 16, (7, 7, 5)),
    ((32, 32, 16), 8, (2, 2, 2)), ((16, 16, 16), 4, (2, 2, 2)),
])  # fmt: skip
def test_grids_of_known_patches(crop: Triple, divisor: int, grid: Triple) -> None:
    assert choose_grid(crop, divisor) == grid


@quick
@given(st.tuples(*[st.integers(1, 40)] * 3), triples, st.sampled_from([1, 4, 8]))
def test_cubes_that_are_asked_for_are_given_or_refused_with_a_patch_that_fits(
    crop: Triple, cubes: Triple, divisor: int
) -> None:
    fits = all(side % (number * divisor) == 0 for side, number in zip(crop, cubes, strict=True))
    if fits and cubes != (1, 1, 1):
        assert choose_grid(crop, divisor, cubes) == cubes
        return
    with pytest.raises(ConfigError) as refusal:
        choose_grid(crop, divisor, cubes)
    x, y, z = map(int, str(refusal.value).split("training.patch to ")[1].split(",")[0].split("x"))
    if cubes != (1, 1, 1):
        assert choose_grid((x, y, z), divisor, cubes) == cubes


# ---------------------------------------------------------------------------------------------------------------------
# blending


def test_frequent_classes_come_from_the_cubes_and_absent_ones_from_the_teacher() -> None:
    teacher, cubes = torch.randn(1, 3, 6, 6, 6), torch.randn(1, 3, 6, 6, 6)
    blended, seen = blend(teacher, cubes, class_weights(torch.tensor([50, 0, 5]))), class_map(teacher).unsqueeze(1)
    for kept, share in ((0, 1.0), (1, 0.0), (2, 0.1)):
        where = (seen == kept).expand_as(blended)
        assert where.any()
        torch.testing.assert_close(blended[where], ((1.0 - share) * teacher + share * cubes)[where])


def test_before_anything_is_counted_labels_are_the_teachers() -> None:
    weights = class_weights(torch.zeros(4, dtype=torch.int64))
    assert weights.tolist() == [0.0] * 4
