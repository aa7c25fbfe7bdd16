"""Sliding windows: where they stand, what they average."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfrbench.config import Triple
from cfrbench.errors import ConfigError
from cfrbench.inference import pad_to, predict_probabilities, window_starts

SIDES = st.tuples(*[st.integers(1, 12)] * 3)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20))
def test_windows_cover_an_axis_and_end_with_it(patch: int, extra: int, stride: int) -> None:
    size = patch + extra - 1
    stride = min(stride, patch)
    starts = window_starts(size, patch, stride)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    assert all(0 < b - a <= stride for a, b in pairwise(starts))
    assert len(starts) == -(-(size - patch) // stride) + 1


def test_a_stride_that_leaves_voxels_out_is_refused() -> None:
    assert window_starts(12, 8, 64) == [0, 4]
    with pytest.raises(ConfigError, match=r"stride of 5 .*windows of 4 .*axis of 10.*inference\.stride_xy"):
        window_starts(10, 4, 5)


@given(SIDES, SIDES)
def test_padding_is_symmetric_and_can_be_undone(shape: Triple, patch: Triple) -> None:
    volume = torch.rand(shape) + 1.0
    wide, inside = pad_to(volume, patch)
    assert wide.shape == tuple(map(max, shape, patch))
    assert torch.equal(wide[inside], volume)
    assert float(wide.sum()) == pytest.approx(float(volume.sum()), rel=1e-5)
    for before, side, length in zip(inside, shape, patch, strict=True):
        assert before.start == max(length - side, 0) // 2


def test_padding_takes_a_value() -> None:
    wide, _ = pad_to(torch.zeros(1, 1, 1), (3, 1, 1), value=7.0)
    assert wide.flatten().tolist() == [7.0, 0.0, 7.0]


def position_dependent(classes: int) -> Callable[[Tensor], Tensor]:
    """A network whose answer at a voxel depends on the window it is seen in, as real ones' do."""
    torch.manual_seed(0)
    net = nn.Conv3d(1, classes, 3, padding=1)
    return lambda window: net(window - window.mean())


def plain_windows(forward: Callable[[Tensor], Tensor], image: Tensor, patch: Triple, strides: Triple) -> Tensor:
    """Every window into a list, every voxel averaged over the windows that hold it."""
    wide, inside = pad_to(image, patch)
    answers = []
    for x in window_starts(wide.shape[0], patch[0], strides[0]):
        for y in window_starts(wide.shape[1], patch[1], strides[1]):
            for z in window_starts(wide.shape[2], patch[2], strides[2]):
                window = wide[x : x + patch[0], y : y + patch[1], z : z + patch[2]]
                probabilities = forward(window[None, None]).detach().softmax(1)[0]
                answer = torch.full((len(probabilities), *wide.shape), torch.nan)
                answer[:, x : x + patch[0], y : y + patch[1], z : z + patch[2]] = probabilities
                answers.append(answer)
    return torch.stack(answers).nanmean(0)[:, *inside]


@given(SIDES, st.tuples(*[st.integers(4, 6)] * 3), st.integers(2, 4), st.integers(2, 4), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_probabilities_are_means_over_the_windows(
    shape: Triple, patch: Triple, stride_xy: int, stride_z: int, classes: int
) -> None:
    torch.manual_seed(1)
    image, forward = torch.randn(shape), position_dependent(classes)
    result = predict_probabilities(forward, image, patch, stride_xy, stride_z, classes)
    expected = plain_windows(forward, image, patch, (stride_xy, stride_xy, stride_z))
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(result.sum(0), torch.ones(shape))


def test_no_gradient_is_kept_and_half_precision_is_widened() -> None:
    net = nn.Conv3d(1, 2, 1)
    result = predict_probabilities(lambda window: net(window).bfloat16(), torch.randn(6, 6, 6), (4, 4, 4), 2, 2, 2)
    assert result.dtype == torch.float32
    assert not result.requires_grad


def test_progress_is_told_window_by_window() -> None:
    seen: list[tuple[int, int]] = []
    predict_probabilities(
        position_dependent(2), torch.zeros(6, 5, 4), (4, 4, 4), 1, 1, 2, on_window=lambda *args: seen.append(args)
    )
    assert seen == [(i, 6) for i in range(1, 7)]
