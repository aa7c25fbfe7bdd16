"""Layers of the V-Net in bf16 beside torch's own, forward and backward: steps up, and batch norm of few channels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.timing import compare
from cfrbench.backbone import UpConv3d
from cfrbench.batch_norm import BatchNorm3d
from cfrbench.compute import start
from cfrbench.config import ComputeSection
from cfrbench.heap import keep_freed_memory
from cfrbench.machine import computes_bf16

pytestmark = [pytest.mark.benchmark_only, pytest.mark.skipif(not computes_bf16(), reason="this CPU emulates bf16")]

LAST = torch.channels_last_3d
Record = Callable[[str, object], None]
#: crops of `quick` on the phantom and on LA, and those of the paper, with two threads as a single job has
SIDES = [(32, 32, 16), (64, 64, 32), (112, 112, 80)]


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    """One pass through the layer and back."""

    def take() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return torch.autograd.grad(y, [x, *layer.parameters()], gradient)

    return take


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("kind", "least"), [("step up", 1.2), ("batch norm", 1.1)])
def test_a_layer_at_full_resolution(
    sides: tuple[int, int, int], kind: str, least: float, record_property: Record
) -> None:
    keep_freed_memory()
    start(ComputeSection(device="cpu"))
    width = 16 if sides[0] > 64 else 8
    gradient = torch.randn(4, width, *sides).bfloat16().contiguous(memory_format=LAST)
    if kind == "step up":
        x = torch.randn(4, 2 * width, *(side // 2 for side in sides))
        ours, theirs = UpConv3d(2 * width, width), nn.ConvTranspose3d(2 * width, width, kernel_size=2, stride=2)
    else:
        x = torch.randn(4, width, *sides)
        ours, theirs = BatchNorm3d(width), nn.BatchNorm3d(width)
    x = x.bfloat16().contiguous(memory_format=LAST).requires_grad_()
    for layer in (ours, theirs):
        layer.to(memory_format=LAST)
    found = compare(step(theirs, x, gradient), step(ours, x, gradient), rounds=7, repeats=1)
    record_property(f"{kind} in bf16, 4 crops of {'x'.join(map(str, sides))}, {width} channels", str(found))
    assert found.ratio >= least
