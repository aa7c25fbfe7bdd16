"""Sliding windows: where they stand, what they average."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfrbench import inference, registry
from cfrbench.config import Triple
from cfrbench.errors import ConfigError
from cfrbench.inference import NARROW, Folded, folded, pad_to, predict_probabilities, window_starts

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


def used(name: str, width: int = 2) -> nn.Module:
    """A small registered network whose batch norms have seen data."""
    torch.manual_seed(0)
    segmenter = registry.load("net", name)
    network: nn.Module = segmenter(segmenter.Config(width=width)).build(1, 3)
    for _ in range(3):
        network.train()(3.0 * torch.randn(2, 1, 32, 32, 32) + 1.0)
    return network.eval()


@pytest.mark.parametrize("name", registry.names("net"))
def test_a_folded_network_answers_as_before(name: str) -> None:
    network = used(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    volume = torch.randn(32, 32, 40)
    with torch.inference_mode():
        plain, fast = (predict_probabilities(net, volume, (32, 32, 32), 8, 8, 3) for net in (network, folded(network)))
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-6)
    best = plain.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(fast.argmax(0)[clear], plain.argmax(0)[clear])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["vnet", "resvnet"])
def test_folding_adds_no_error_in_half_precision(name: str) -> None:
    network = used(name, NARROW)
    window = torch.randn(1, 1, 48, 48, 32)
    with torch.inference_mode():
        exact = network(window)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, fast = network(window).float(), folded(network, torch.bfloat16)(window).float()
    assert (fast - exact).norm() < 1.1 * (rounded - exact).norm()
    assert (fast - exact).norm() < 0.02 * exact.norm()
    assert not torch.equal(fast, folded(network)(window))  # it did round


@pytest.mark.skipif(not inference._onednn_computes(torch.float32), reason="this torch was built without oneDNN")
@pytest.mark.parametrize("name", ["vnet", "resvnet"])  # the U-Net's norm measures its input
def test_every_convolution_calls_onednn_and_rectifies_in_the_same_call(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = used(name)
    found = folded(network)
    monkeypatch.setattr(inference, "_onednn_computes", lambda dtype: False)
    plain = folded(network)
    assert not any(isinstance(module, nn.Conv3d) for module in found.modules())
    kinds = [sum(isinstance(module, nn.ReLU) for module in each.modules()) for each in (found, plain)]
    assert kinds[0] < kinds[1]
    window = torch.randn(1, 1, 32, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(found(window), plain(window), rtol=0, atol=1e-5)


def test_a_convolution_that_pads_otherwise_is_left_to_torch() -> None:
    layers = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular"), nn.Conv3d(2, 2, 3, padding="same"))
    window = torch.randn(1, 1, 8, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(folded(layers)(window), layers(window))


def test_the_v_net_has_no_norm_left_and_a_network_that_measures_its_input_is_left_alone() -> None:
    found = folded(used("vnet"))
    assert isinstance(found, Folded)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in found.modules())
    measuring = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.InstanceNorm3d(2)).eval()
    assert folded(measuring) is measuring
    without_memory = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2, track_running_stats=False)).eval()
    assert folded(without_memory) is without_memory
