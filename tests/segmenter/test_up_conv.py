"""The V-Net's steps up: torch's transposed convolution, with gradients by products of matrices in bf16."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cfrbench import backbone
from cfrbench.backbone import UpConv3d

LAST = torch.channels_last_3d
Sides = tuple[int, int, int]


def both(inputs: int, outputs: int) -> tuple[UpConv3d, nn.ConvTranspose3d]:
    """Our layer and torch's with the same weights."""
    torch.manual_seed(inputs + outputs)
    ours = UpConv3d(inputs, outputs)
    theirs = nn.ConvTranspose3d(inputs, outputs, kernel_size=2, stride=2)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(memory_format=LAST), theirs.to(memory_format=LAST)


def taken(layer: nn.Module, x: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The output, after a ReLU in place, and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = nn.ReLU(inplace=True)(layer(x))
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    found = [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]
    layer.zero_grad(set_to_none=True)
    assert all(each is not None for each in found)
    return found


def passed(layer: nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weight and bias, for this gradient of the output."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], gradient.to(y.dtype))]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 10), st.tuples(*[st.integers(1, 5)] * 3), st.booleans())
def test_output_and_gradients_are_torchs(batch: int, inputs: int, outputs: int, sides: Sides, large: bool) -> None:
    ours, theirs = both(inputs, outputs)
    x = torch.randn(batch, inputs, *sides).contiguous(memory_format=LAST)
    gradient = torch.randn(batch, outputs, *(2 * side for side in sides)).contiguous(memory_format=LAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "SMALL", 0 if large else 10**9)
        found = passed(ours, x, gradient)
    wanted = passed(theirs, x, gradient)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.abs_()
    sizes = passed(theirs, x.abs(), gradient.abs())  # sums of the sizes of what is added up, which may cancel
    for a, b, size in zip(found, wanted, sizes, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert bool(((a.double() - b.double()).abs() <= 2**-6 * size.double()).all())
    assert found[0].is_contiguous(memory_format=LAST)


def test_gradients_are_as_exact_as_torchs() -> None:
    ours, theirs = both(16, 8)
    x = torch.randn(4, 16, 16, 16, 8).contiguous(memory_format=LAST).bfloat16().float()
    exact = taken(theirs.double(), x.double(), torch.float64)
    found, torchs = taken(ours, x), taken(theirs.float(), x)
    assert torch.equal(found[0], torchs[0])
    # The sums for the bias are rounded once for each place in the block before they are added.
    for mine, other, wanted, factor in zip(found[1:], torchs[1:], exact[1:], (1.1, 1.1, 2.0), strict=True):
        error, usual = (float((each.double() - wanted).norm() / wanted.norm()) for each in (mine, other))
        assert error < factor * usual < 0.1


def test_products_are_taken_in_bf16_and_channels_last_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = both(4, 2)
    x = torch.randn(2, 4, 6, 6, 6)
    last = x.contiguous(memory_format=LAST)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(last).grad_fn.name() == "_BlocksBackward"
        assert ours(x).grad_fn.name() == theirs(x).grad_fn.name()
    for each in (x, last):
        assert all(map(torch.equal, taken(ours, each, torch.float32), taken(theirs, each, torch.float32)))
    assert ours(last, [13, 13, 13]).shape == (2, 2, 13, 13, 13)


def test_gradients_may_come_in_any_layout_and_need_not_reach_everything() -> None:
    ours, theirs = both(4, 2)
    x = torch.randn(2, 4, 6, 6, 6).contiguous(memory_format=LAST).requires_grad_()
    for gradient in (torch.randn(2, 2, 12, 12, 12).bfloat16(), torch.ones(()).bfloat16().expand(2, 2, 12, 12, 12)):
        found = []
        for layer in (ours, theirs):
            with torch.autocast("cpu", torch.bfloat16):
                found.append(torch.autograd.grad(layer(x), [layer.weight, x], gradient))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    ours.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        (alone,) = torch.autograd.grad(ours(x), x, gradient)
    assert torch.equal(alone, found[0][1])
