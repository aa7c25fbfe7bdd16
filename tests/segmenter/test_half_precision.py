"""Gradients in bf16 stay those of single precision where crops or cubes have been halved to a first side of 2."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.backbone import Conv3d


def weight_gradient(layer: nn.Module, image: Tensor, half: bool) -> Tensor:
    layer = copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        layer(image).float().square().mean().backward()
    found = [p.grad for p in layer.parameters() if p.ndim == 5]
    assert all(gradient is not None for gradient in found)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [8, 64])
def test_a_convolution(side: int, channels: int) -> None:
    torch.manual_seed(side)
    layer, image = Conv3d(channels, channels, 3, padding=1), torch.randn(4, channels, side, 2, 2)
    single, half = weight_gradient(layer, image, half=False), weight_gradient(layer, image, half=True)
    assert float((half - single).norm() / single.norm()) < 0.05


def test_only_the_side_of_two_is_computed_in_single_precision() -> None:
    layer = Conv3d(4, 4, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 4, 2, 4, 4)).dtype == torch.float32
        assert layer(torch.randn(1, 4, 4, 2, 4)).dtype == torch.bfloat16
    assert layer(torch.randn(1, 4, 2, 4, 4)).dtype == torch.float32


@pytest.mark.parametrize("name", registry.names("net"))
def test_every_built_in_network_has_them(name: str) -> None:
    segmenter = registry.load("net", name)
    network = segmenter(segmenter.Config()).build(1, 2)
    wide = [m for m in network.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    assert wide
    assert all(isinstance(module, Conv3d) for module in wide)
