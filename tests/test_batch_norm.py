"""Batch norm channels last: as accurate as torch's contiguous one, and the same layer in every other respect."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfrbench import batch_norm
from cfrbench.adversarial import frozen_statistics
from cfrbench.batch_norm import BatchNorm3d, is_exact_channels_last


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def crops(channels: int, sides: tuple[int, int, int], batch: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(channels)
    return channels_last(3 + 2 * torch.randn(batch, channels, *sides, generator=draw))


def both(channels: int, momentum: float | None = 0.1) -> tuple[BatchNorm3d, nn.BatchNorm3d]:
    """Our layer and torch's in double precision, with the same weights."""
    ours = BatchNorm3d(channels, momentum=momentum)
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(0.5, 2, channels))
        ours.bias.copy_(torch.linspace(-1, 1, channels))
    plain = nn.BatchNorm3d(channels, momentum=momentum)
    plain.load_state_dict(ours.state_dict())
    return ours, plain.double()


def test_statistics_of_large_crops_are_far_more_accurate_than_torchs() -> None:
    x = crops(16, (64, 64, 64), batch=4)
    exact = x.double().var((0, 2, 3, 4))
    ours, theirs = BatchNorm3d(16, momentum=1.0), nn.BatchNorm3d(16, momentum=1.0)
    for layer in (ours, theirs):
        layer(x)
    error, torchs = ((layer.running_var / exact - 1).abs().max() for layer in (ours, theirs))  # type: ignore[operator]
    assert error < 1e-6
    assert torchs > 20 * error  # or this module has lost its reason


@settings(deadline=None)
@given(st.integers(1, 9), st.tuples(*[st.integers(1, 7)] * 3), st.integers(2, 3), st.sampled_from([0.1, 0.7, None]))
def test_the_layer_is_torchs_in_double_precision(
    channels: int, sides: tuple[int, int, int], batch: int, momentum: float | None
) -> None:
    ours, plain = both(channels, momentum)
    for step in range(2):  # momentum None averages over steps
        x = (crops(channels, sides, batch) * (step + 1)).requires_grad_()
        exact = x.detach().double().requires_grad_()
        weights = torch.linspace(-1, 1, x.numel()).view(x.shape)
        y, wanted = ours(x), plain(exact)
        (y * weights).sum().backward()
        (wanted * weights).sum().backward()
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
        if x[:, 0].numel() > 8:  # of fewer values the deviation itself is rounded coarsely
            torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]
            torch.testing.assert_close(ours.weight.grad.double(), plain.weight.grad, rtol=1e-3, atol=1e-3)  # type: ignore[union-attr]
        torch.testing.assert_close(ours.bias.grad.double(), plain.bias.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].double(), value.double(), rtol=1e-4, atol=1e-5)


def in_half(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output after a ReLU in place, and the gradient of the input."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = nn.ReLU(inplace=True)(layer(x))
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape).to(torch.bfloat16)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("channels", [8, 16])
def test_of_few_channels_in_bf16_statistics_are_our_own_and_better(
    channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = crops(channels, (64, 64, 32), batch=4).bfloat16()
    exact = x.double()
    mean, deviation = exact.mean((0, 2, 3, 4)), exact.var((0, 2, 3, 4)).sqrt()
    monkeypatch.setattr(batch_norm, "MANY", 10**9)
    theirs = BatchNorm3d(channels, momentum=1.0)
    before = in_half(theirs, x)
    monkeypatch.undo()
    ours = BatchNorm3d(channels, momentum=1.0)
    found = in_half(ours, x)
    assert found[0].is_contiguous(memory_format=torch.channels_last_3d)
    for a, b in zip(found, before, strict=True):
        assert not torch.equal(a, b)  # or ours was not taken
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    errors = [float((layer.running_var.sqrt() / deviation - 1).abs().max()) for layer in (ours, theirs)]  # type: ignore[union-attr]
    assert errors[0] < 1e-5 < errors[1]
    torch.testing.assert_close(ours.running_mean.double(), mean, rtol=1e-6, atol=1e-6)  # type: ignore[union-attr]


def test_small_maps_in_bf16_are_torchs_bit_for_bit() -> None:
    x = crops(8, (16, 16, 16)).bfloat16()
    ours, plain = BatchNorm3d(8), nn.BatchNorm3d(8)
    assert all(map(torch.equal, in_half(ours, x), in_half(plain, x)))


def test_evaluation_and_other_layouts_are_torchs_bit_for_bit() -> None:
    ours, _ = both(4)
    plain = nn.BatchNorm3d(4)
    plain.load_state_dict(ours.state_dict())
    x = crops(4, (6, 6, 6))
    assert torch.equal(ours(x.contiguous()), plain(x.contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def test_frozen_statistics_stay() -> None:
    ours, _ = both(4)
    before = copy.deepcopy(ours.state_dict())
    with frozen_statistics(ours):
        found = ours(crops(4, (6, 6, 6)))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert found.mean((0, 2, 3, 4)).detach().numpy() == pytest.approx([-1, -1 / 3, 1 / 3, 1], abs=1e-5)


def test_one_value_is_refused_as_by_torch() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm3d(4)(torch.randn(1, 4, 1, 1, 1))


def test_another_number_of_channels_is_refused_as_by_torch() -> None:
    for layer in (BatchNorm3d(4), BatchNorm3d(4, track_running_stats=False)):
        with pytest.raises(RuntimeError):
            layer(crops(8, (4, 4, 4)))
        assert layer.running_mean is None or not layer.running_mean.any()


def test_gradients_may_come_in_any_layout_and_need_not_reach_the_weights() -> None:
    x = crops(4, (6, 6, 6)).requires_grad_()
    ours, plain = both(4)
    exact = x.detach().double().requires_grad_()
    plain(exact).square().sum().backward()
    for frozen in (False, True):
        ours.requires_grad_(not frozen)
        y = ours(x)
        (gradient,) = torch.autograd.grad(y, x, (2 * y.detach()).contiguous())
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-3, atol=1e-3)
    ours.requires_grad_()
    (bias,) = torch.autograd.grad(ours(x.detach()).sum(), ours.bias)  # a gradient of stride 0
    assert bias.tolist() == [432.0] * 4


def test_only_these_norms_are_exact_channels_last() -> None:
    ours = BatchNorm3d(2)
    assert is_exact_channels_last(nn.Sequential(nn.Conv3d(1, 2, 3), ours))
    assert is_exact_channels_last(nn.Sequential(ours, nn.Flatten(), nn.BatchNorm1d(2)))  # no volume passes it
    assert not is_exact_channels_last(nn.Sequential(nn.Conv3d(1, 2, 3)))  # it may normalise by hand
    for other in (nn.BatchNorm3d(2), nn.InstanceNorm3d(2), nn.GroupNorm(1, 2), BatchNorm3d(2, affine=False)):
        assert not is_exact_channels_last(nn.Sequential(ours, other))
