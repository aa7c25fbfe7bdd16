"""Scaled canvases: what comes back and how exactly, every slice covered, labels picked, the official form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrbench.canvas import resample
from cfrbench.config import Triple
from cfrbench.errors import UsageError
from cfrbench.testing import check_concat
from cfrbench_concat.scaled import Scaled
from tests.concat.laws import dtypes, leads, numbered
from tests.concat.plain import plain_scaled

shapes = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))


def scaled(n: int, sampling: str = "centred", rim: int = 4) -> Scaled:
    return Scaled(Scaled.Config.model_validate({"n": n, "sampling": sampling, "rim": rim}))


def fitting(depth: int, n: int) -> int:
    """The nearest n that suits a depth."""
    while n > 1 and (n - 1) ** 2 >= depth:
        n -= 1
    return n


def ramp(shape: Triple) -> torch.Tensor:
    """Rises evenly by 1 along every axis, in all by 3."""
    x, y, z = (torch.linspace(0, 1, side) for side in shape)
    return x[:, None, None] + y[:, None] + z


@pytest.mark.parametrize("sampling", ["centred", "official"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_contract_in_other_forms(n: int, sampling: str) -> None:
    check_concat(Scaled, Scaled.Config.model_validate({"n": n, "sampling": sampling, "rim": 2}))


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 9), st.integers(100, 300), st.sampled_from(["centred", "official"]))
def test_ramps_come_back_within_a_pixel(shape: Triple, n: int, canvas: int, sampling: str) -> None:
    strategy = scaled(fitting(shape[2], n), sampling)
    layout = strategy.plan(shape, canvas)
    volume = ramp(shape)
    error = (strategy.inverse(strategy.forward(volume, layout, 0), layout) - volume).abs().max()
    # Pixels of the coarser of slice and tile along both axes of the plane, most of it at the rims; float32.
    pixels = 0.75 if sampling == "centred" else 1.0
    plane = zip(shape[:2], layout.grid.shape[:2], strict=True)
    limit = sum(pixels * max(1.0, side / tile) / (side - 1) for side, tile in plane if side > 1)
    assert error <= limit + 1e-5
    constant = torch.full(shape, 0.7)
    laid = strategy.forward(constant, layout, 0.7)
    if sampling == "centred":
        assert torch.allclose(laid, torch.tensor(0.7), atol=1e-6)
        assert torch.allclose(strategy.inverse(laid, layout), constant, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 9), st.integers(100, 300), dtypes, leads)
def test_labels_are_picked_and_come_back_where_slices_are_not_shrunk(
    shape: Triple, n: int, canvas: int, dtype: torch.dtype, lead: tuple[int, ...]
) -> None:
    strategy = scaled(fitting(shape[2], n))
    layout = strategy.plan(shape, canvas)
    label = numbered((*lead, *shape), dtype)
    laid = strategy.forward(label, layout, 255)
    back = strategy.inverse(laid, layout)
    assert (laid.shape, laid.dtype) == ((*lead, layout.count, canvas, canvas), dtype)
    assert (back.shape, back.dtype) == (label.shape, dtype)
    if not dtype.is_floating_point:
        assert set(laid.flatten().tolist()) <= {*label.flatten().tolist(), 255}
        assert set(back.flatten().tolist()) <= set(label.flatten().tolist())
        if all(tile >= side for side, tile in zip(shape[:2], layout.grid.shape[:2], strict=True)):
            assert torch.equal(back, label)


@settings(deadline=None, max_examples=30)
@given(shapes, st.integers(1, 6), st.integers(80, 200), st.integers(0, 4))
def test_it_equals_a_plain_loop_over_slices(shape: Triple, n: int, canvas: int, rim: int) -> None:
    strategy = scaled(fitting(shape[2], n), rim=rim)
    volume = ramp(shape)
    for layout in (strategy.plan(shape, canvas), strategy.plan_training(shape, canvas)):
        starts = layout.groups.starts[2]
        chosen = sorted({0, len(starts) // 2, len(starts) - 1})
        laid = strategy.forward_some(volume, layout, 9, chosen)
        for canvas_laid, index in zip(laid, chosen, strict=True):
            plain = plain_scaled(volume, canvas, 9, strategy.config.n, starts[index], rim)
            assert torch.allclose(canvas_laid, plain, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 130), st.integers(1, 12))
def test_every_slice_is_covered_and_only_the_last_group_overlaps(depth: int, n: int) -> None:
    n = fitting(depth, n)
    layout = scaled(n).plan((8, 8, depth), 256)
    starts, size = layout.groups.starts[2], layout.groups.patch[2]
    assert {start + k for start in starts for k in range(size)} == set(range(depth))
    assert starts[:-1] == tuple(range(0, n * n * (len(starts) - 1), n * n))
    assert layout.count == -(-depth // (n * n))


def test_what_two_groups_say_is_averaged() -> None:
    strategy = scaled(2)
    layout = strategy.plan((8, 8, 6), 32)  # slices 0-3 and 2-5
    said = torch.stack([torch.full((32, 32), 1.0), torch.full((32, 32), 3.0)])
    assert strategy.inverse(said, layout)[4, 4].tolist() == [1, 1, 2, 2, 3, 3]
    assert strategy.inverse(said.long(), layout)[4, 4].tolist() == [1, 1, 1, 1, 3, 3]


def test_training_draws_from_every_start_there_is() -> None:
    layout = scaled(2).plan_training((8, 8, 11), 64)
    assert layout.groups.starts[2] == tuple(range(8))
    assert scaled(3).plan_training((8, 8, 7), 64).groups.starts[2] == (0,)


def test_nine_by_nine_holds_the_paper_s_volume_unshrunk_and_the_official_form_shrinks_it() -> None:
    assert scaled(9).plan((112, 112, 80), 1024).grid.shape == (112, 112, 80)
    assert scaled(9, "official").plan((112, 112, 80), 1024).grid.shape == (105, 105, 80)
    volume = torch.rand(112, 112, 80)
    layout = scaled(9).plan((112, 112, 80), 1024)
    assert torch.equal(scaled(9).inverse(scaled(9).forward(volume, layout, 0), layout), volume)


def test_the_official_overflow_drops_the_slices_after_the_last_whole_group() -> None:
    strategy, volume = scaled(2, "official"), torch.ones(8, 8, 10)
    layout = strategy.plan((8, 8, 10), 64, overflow="official")
    back = strategy.inverse(strategy.forward(volume, layout, 0), layout)
    assert layout.count == 2
    assert back[4, 4].tolist() == [1] * 8 + [0] * 2


def test_the_official_sampling_shows_zeros_beyond_the_last_half_voxel_also_in_labels() -> None:
    strategy = scaled(1, "official")
    layout = strategy.plan((4, 4, 1), 28)  # tiles of 20: five pixels a voxel
    row = strategy.forward(torch.full((4, 4, 1), 7, dtype=torch.uint8), layout, 255)[0, 4]
    assert row.tolist() == [255] * 4 + [7] * 18 + [0] * 2 + [255] * 4


# ---------------------------------------------------------------------------------------------------------------------
# wrong use


@pytest.mark.parametrize(
    ("n", "shape", "canvas", "words"),
    [
        (4, (8, 8, 9), 64, r"n=4 lays 16 slices .* has 9, .* n from 1 to 3"),
        (2, (8, 8, 1), 64, r"n=2 lays 4 slices .* has 1, .* n from 1 to 1"),
        (8, (20, 12, 60), 64, r"n=8 leaves tiles of 8 pixels .* 64x64, .* slice of 20x12 .* tuning.canvas=72"),
        (2, (0, 8, 9), 64, r"at least one voxel a side"),
    ],
)
def test_an_n_that_does_not_fit_is_refused(n: int, shape: Triple, canvas: int, words: str) -> None:
    for plan in (scaled(n).plan, scaled(n).plan_training):
        with pytest.raises(UsageError, match=words):
            plan(shape, canvas)


def test_tensors_of_another_plan_are_refused() -> None:
    strategy = scaled(2)
    layout = strategy.plan((5, 4, 7), 32)
    with pytest.raises(UsageError, match="volumes of shape"):
        strategy.forward(torch.zeros(4, 5, 7), layout, 0)
    with pytest.raises(UsageError, match="canvases of shape"):
        strategy.inverse(torch.zeros(1, 32, 32), layout)


def test_resampling_picks_labels_and_keeps_constants() -> None:
    label = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8)
    assert resample(label, (4, 2)).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert resample(label, (1, 1)).tolist() == [[4]]
    assert resample(label, (2, 2)) is label
    for dtype in (torch.float32, torch.bfloat16):
        half = resample(torch.full((3, 5, 7), 0.5, dtype=dtype), (9, 4))
        assert (half.dtype, half.shape) == (dtype, (3, 9, 4))
        assert torch.allclose(half.float(), torch.tensor(0.5))


@settings(deadline=None, max_examples=40)
@given(*[st.integers(1, 9)] * 4)
def test_resampling_one_axis_after_the_other_is_resampling_both(h: int, w: int, new_h: int, new_w: int) -> None:
    slices = torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(h + 10 * w))
    # Rows of two equal pixels, to keep away from the images one pixel wide that torch resizes wrongly.
    rows = resample(slices.repeat_interleave(2, -1), (new_h, 2 * w))[..., ::2]
    both = resample(rows.mT.repeat_interleave(2, -1), (new_w, 2 * new_h))[..., ::2].mT
    assert torch.allclose(resample(slices, (new_h, new_w)), both, atol=1e-5)
