"""Overlapping boxes: they cover, they come back bit for bit, and their mean is the one of a plain loop."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.errors import UsageError
from cfrbench.windows import Windows, cover, cut, mean

sides = st.tuples(*[st.integers(1, 13)] * 3)
overlaps = st.sampled_from([0.0, 0.25, 0.5, 0.8])
dtypes = st.sampled_from([torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64])
quick = settings(deadline=None, max_examples=60)


def boxes(windows: Windows) -> list[tuple[slice, ...]]:
    corners = product(*windows.starts)
    return [tuple(slice(a, a + n) for a, n in zip(corner, windows.patch, strict=True)) for corner in corners]


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 251).to(dtype)


@quick
@given(sides, sides, overlaps, dtypes, st.sampled_from([(), (2,), (2, 3)]), st.integers(0, 9))
def test_volumes_come_back_bit_for_bit(
    shape: Triple, patch: Triple, overlap: float, dtype: torch.dtype, lead: tuple[int, ...], seed: int
) -> None:
    windows = cover(shape, patch, overlap)
    volumes = noise((*lead, *shape), dtype, seed)
    laid = cut(volumes, windows)
    assert laid.shape == (*lead, windows.count, *windows.patch)
    assert all(torch.equal(laid[..., i, :, :, :], volumes[..., *box]) for i, box in enumerate(boxes(windows)))
    back = mean(laid, windows)
    assert back.dtype == dtype
    assert torch.equal(back, volumes)


@quick
@given(sides, sides, overlaps, st.integers(0, 9))
def test_the_mean_is_that_of_a_plain_loop_and_labels_are_picked(
    shape: Triple, patch: Triple, overlap: float, seed: int
) -> None:
    windows = cover(shape, patch, overlap)
    said = noise((2, windows.count, *windows.patch), torch.float64, seed)
    total, visits = torch.zeros(2, *shape, dtype=torch.float64), torch.zeros(shape)
    first = torch.full((2, *shape), 255, dtype=torch.uint8)
    for i, box in reversed(list(enumerate(boxes(windows)))):
        total[:, *box] += said[:, i]
        visits[box] += 1
        first[:, *box] = said[:, i].to(torch.uint8)
    assert bool((visits > 0).all()), "a voxel is in no window"
    torch.testing.assert_close(mean(said, windows), total / visits, rtol=1e-12, atol=1e-9)
    assert torch.equal(mean(said.to(torch.uint8), windows), first)


@quick
@given(sides, sides, overlaps)
def test_neighbours_overlap_as_asked_and_none_is_superfluous(shape: Triple, patch: Triple, overlap: float) -> None:
    windows = cover(shape, patch, overlap)
    for starts, length, side in zip(windows.starts, windows.patch, shape, strict=True):
        assert (starts[0], starts[-1]) == (0, side - length)
        steps = [b - a for a, b in pairwise(starts)]
        assert all(0 < step <= max(1, length - length * overlap) for step in steps)
        assert len(starts) < 3 or starts[-1] - starts[-3] > max(1, int(length - length * overlap))


def test_some_boxes_are_those_of_all() -> None:
    windows = cover((5, 6, 7), (3, 3, 3), 0.5)
    volume = noise((2, 5, 6, 7), torch.float32, 0)
    assert torch.equal(cut(volume, windows, [3, 0]), cut(volume, windows)[:, [3, 0]])


def test_tensors_of_another_plan_are_refused() -> None:
    windows = cover((5, 6, 7), (3, 3, 3), 0.0)
    with pytest.raises(UsageError, match=r"volumes of shape \(..., 5, 6, 7\)"):
        cut(torch.zeros(6, 5, 7), windows)
    with pytest.raises(UsageError, match="boxes of shape"):
        mean(torch.zeros(3, 3, 3, 3), windows)
