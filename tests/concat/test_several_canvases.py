"""Strategies that show a voxel on several canvases, patches and three planes: exact there and back, means between."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfrbench import registry
from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import UsageError
from cfrbench.testing import check_concat
from cfrbench.tiling import grid_layout, lay_out
from cfrbench_concat.patches import Patches
from cfrbench_concat.tri_planar import TriPlanar

sides = st.integers(1, 70)
shapes = st.tuples(sides, sides, sides)
deep_shapes = st.tuples(*[st.integers(2, 50)] * 3)
dtypes = st.sampled_from([torch.uint8, torch.int64, torch.bfloat16, torch.float32])
leads = st.sampled_from([(), (2,), (2, 2)])
quick = settings(deadline=None, max_examples=40)


def patches(**options: Any) -> Patches:
    return Patches(Patches.Config(**options))


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that differ between neighbours and are exact in every dtype."""
    return (torch.arange(torch.Size(shape).numel()) * 7 % 251).reshape(shape).to(dtype)


def visits(strategy: ConcatStrategy, layout: Layout) -> Tensor:
    """How often each voxel stands on the canvases."""
    voxels = torch.Size(layout.shape).numel()
    places = strategy.forward(torch.arange(voxels).view(layout.shape), layout, -1)
    return places[places >= 0].bincount(minlength=voxels).view(layout.shape)


def check_round_trip(strategy: ConcatStrategy, layout: Layout, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    volumes = numbered((*lead, *layout.shape), dtype)
    before = volumes.clone()
    canvases = strategy.forward(volumes, layout, 5)
    assert canvases.shape == (*lead, layout.count, layout.canvas, layout.canvas)
    assert canvases.dtype == dtype
    back = strategy.inverse(canvases, layout)
    assert back.dtype == dtype
    assert torch.equal(back, volumes)
    assert torch.equal(volumes, before)


def check_mean(strategy: ConcatStrategy, layout: Layout) -> None:
    """Two classes of noise come back as the mean over the places of each voxel, in both classes."""
    voxels = torch.Size(layout.shape).numel()
    places = strategy.forward(torch.arange(voxels).view(layout.shape), layout, -1)
    noise = torch.rand(2, *places.shape, dtype=torch.float64)
    for canvases, mean in zip(noise, strategy.inverse(noise, layout), strict=True):
        total = torch.zeros(voxels, dtype=torch.float64).index_add(0, places[places >= 0], canvases[places >= 0])
        wanted = total.view(layout.shape) / visits(strategy, layout)
        torch.testing.assert_close(mean, wanted, rtol=0, atol=1e-12)
    # Labels are picked: nothing comes back that does not stand in one of the voxel's places.
    classes = torch.randint(0, 5, places.shape, dtype=torch.uint8) * 50
    picked = strategy.inverse(classes, layout).flatten()
    stands = torch.zeros(voxels, dtype=torch.bool)
    stands[places[places >= 0][classes[places >= 0] == picked[places[places >= 0]]]] = True
    assert bool(stands.all())


def check_parts(strategy: ConcatStrategy, layout: Layout, chosen: list[int]) -> None:
    volumes = numbered((2, *layout.shape), torch.float32)
    whole = strategy.forward(volumes, layout, 0.0)
    assert torch.equal(strategy.forward_some(volumes, layout, 0.0, chosen), whole[:, chosen])


# ---------------------------------------------------------------------------------------------------------------------
# patches


@quick
@given(shapes, st.integers(12, 90), st.sampled_from([0.0, 0.25, 0.5]), dtypes, leads)
def test_patches_hold_every_volume_and_give_it_back(
    shape: Triple, canvas: int, overlap: float, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    strategy = patches(overlap=overlap)
    layout = strategy.plan(shape, canvas)
    assume(layout.count * canvas**2 < 2_000_000)  # a few hundred canvases say as much as thousands
    check_round_trip(strategy, layout, dtype, lead)


@quick
@given(shapes, st.integers(12, 90))
def test_a_patch_is_the_largest_cube_that_fits(shape: Triple, canvas: int) -> None:
    layout = patches().plan(shape, canvas)
    longest = max(layout.windows.patch)
    assert layout.windows.patch == tuple(min(side, longest) for side in shape)
    for side in range(longest + 1, max(shape) + 1):
        larger = grid_layout((min(shape[0], side), min(shape[1], side), min(shape[2], side)), canvas)
        assert larger is None or not larger.lossless
    whole = grid_layout(shape, canvas)
    if whole is not None and whole.lossless:  # a volume that fits is laid out as the grid lays it out
        volume = numbered(shape, torch.uint8)
        assert layout.count == 1
        assert torch.equal(patches().forward(volume, layout, 0)[0], lay_out(volume, whole, 0))


@settings(deadline=None, max_examples=15)
@given(st.tuples(*[st.integers(1, 16)] * 3), st.sampled_from([0.0, 0.25, 0.6]), st.randoms(use_true_random=False))
def test_patches_average_and_some_of_them_are_those_of_all(shape: Triple, overlap: float, random: Any) -> None:
    strategy = patches(overlap=overlap, patch=(9, 7, 6))
    layout = strategy.plan(shape, 32)
    check_mean(strategy, layout)
    check_parts(strategy, layout, random.sample(range(layout.count), min(3, layout.count)))


def test_patches_of_the_papers_size_overlap_by_their_share() -> None:
    layout = patches(patch=(96, 96, 96)).plan((200, 180, 96), 1024)
    assert [len(starts) for starts in layout.windows.starts] == [3, 3, 1]
    for starts, side in zip(layout.windows.starts, (200, 180, 96), strict=True):
        assert starts[-1] + 96 == side
        assert all(96 - (b - a) >= 24 for a, b in pairwise(starts))


def test_a_patch_that_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(UsageError, match=r"patch of 64x64x40 .*128x128 .* smaller concat\.patches\.patch") as caught:
        patches(patch=(64, 64, 64)).plan((100, 90, 40), 128)
    fits = int(str(caught.value).rpartition("tuning.canvas=")[2].rstrip("."))
    patches(patch=(64, 64, 64)).plan((100, 90, 40), fits)
    with pytest.raises(UsageError, match="patch of 64x64x40"):
        patches(patch=(64, 64, 64)).plan((100, 90, 40), fits - 1)
    with pytest.raises(UsageError, match="at least one voxel"):
        patches(patch=(0, 4, 4)).plan((8, 8, 8), 64)


# ---------------------------------------------------------------------------------------------------------------------
# three planes


@quick
@given(deep_shapes, st.integers(0, 60), dtypes, leads)
@example((2, 12, 45), 60, torch.uint8, ())  # no number of official tiles loses nothing
@example((7, 25, 16), 16, torch.float32, (1,))
def test_three_planes_hold_every_volume_whose_sides_fit(
    shape: Triple, extra: int, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    canvas = max(shape) + extra
    strategy = TriPlanar()
    layout = strategy.plan(shape, canvas)
    assume(layout.count * canvas**2 < 2_000_000)
    check_round_trip(strategy, layout, dtype, lead)
    assert bool((visits(strategy, layout) == 3).all())


@settings(deadline=None, max_examples=15)
@given(st.tuples(*[st.integers(2, 16)] * 3), st.integers(0, 20), st.randoms(use_true_random=False))
def test_planes_average_and_some_canvases_are_those_of_all(shape: Triple, extra: int, random: Any) -> None:
    layout = TriPlanar().plan(shape, max(shape) + extra)
    check_mean(TriPlanar(), layout)
    check_parts(TriPlanar(), layout, random.sample(range(layout.count), min(4, layout.count)))
    check_parts(TriPlanar(), layout, [layout.count - 1, 0, layout.count - 1])


def test_the_planes_are_axial_coronal_and_sagittal() -> None:
    shape = (10, 8, 6)
    layout = TriPlanar().plan(shape, 40)
    volume = numbered(shape, torch.int64)
    along_w, along_h = volume.permute(0, 2, 1), volume.permute(1, 2, 0)
    planes = [grid_layout((*plane.shape[:2], plane.shape[2]), 40) for plane in (volume, along_w, along_h)]
    wanted = [lay_out(v, grid, -1) for v, grid in zip((volume, along_w, along_h), planes, strict=True) if grid]
    assert torch.equal(TriPlanar().forward(volume, layout, -1), torch.stack(wanted))
    assert layout.ranges == [range(1), range(1, 2), range(2, 3)]


def test_a_plane_with_more_slices_than_tiles_gets_more_canvases() -> None:
    layout = TriPlanar().plan((112, 112, 80), 1024)  # LA: 12 x 9 tiles for 112 coronal slices of 112 x 80
    assert [plane.count for plane in layout.planes] == [1, 2, 2]
    assert [plane.grid.shape for plane in layout.planes] == [(112, 112, 80), (112, 80, 56), (112, 80, 56)]
    assert layout.count == 5


def test_a_single_slice_and_a_slice_larger_than_the_canvas_are_refused() -> None:
    for shape in ((8, 8, 1), (1, 8, 8), (8, 1, 8)):
        with pytest.raises(UsageError, match=rf"{'x'.join(map(str, shape))} voxels are a single slice.*--concat grid"):
            TriPlanar().plan(shape, 64)
    with pytest.raises(UsageError, match=r"20x8x8 voxels has slices that are larger.* 16x16 pixels.*canvas=20"):
        TriPlanar().plan((20, 8, 8), 16)
    assert TriPlanar().plan((20, 8, 8), 20).count > 3


# ---------------------------------------------------------------------------------------------------------------------
# both


@pytest.mark.parametrize(("name", "strategy"), [("patches", Patches), ("tri-planar", TriPlanar)])
def test_they_are_registered_and_say_that_they_average(name: str, strategy: type[ConcatStrategy]) -> None:
    assert registry.load("concat", name) is strategy
    assert strategy.averages
    assert strategy.exact


def test_other_overlaps_keep_the_contract_too() -> None:
    check_concat(Patches, Patches.Config(patch=(16, 16, 8), overlap=0.5))


@pytest.mark.parametrize("make", [patches, TriPlanar])
def test_tensors_and_layouts_of_another_plan_are_refused(make: Callable[[], ConcatStrategy]) -> None:
    strategy = make()
    layout = strategy.plan((8, 9, 10), 30)
    with pytest.raises(UsageError, match="volumes of shape"):
        strategy.forward(torch.zeros(9, 8, 10), layout, 0)
    with pytest.raises(UsageError, match="canvases of shape"):
        strategy.inverse(torch.zeros(layout.count + 1, 30, 30), layout)
    with pytest.raises(UsageError, match="own `plan`"):
        strategy.forward(torch.zeros(8, 9, 10), Layout((8, 9, 10), 30), 0)


def test_equal_volumes_give_equal_canvases_in_and_out_of_a_batch() -> None:
    for strategy in (patches(), TriPlanar()):
        layout = strategy.plan((9, 8, 20), 24)
        volumes = torch.rand(3, 2, 9, 8, 20)
        laid = strategy.forward(volumes, layout, 0.0)
        for i, j in combinations(range(2), 2):
            assert torch.equal(laid[i, j], strategy.forward(volumes[i, j], layout, 0.0))
