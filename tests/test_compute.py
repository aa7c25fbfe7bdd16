"""Which precision a machine gets, and that the fast single precision computes what the plain one does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cfrbench import compute
from cfrbench.compute import Compute, settled
from cfrbench.config import ComputeSection
from cfrbench.losses import ce_dice
from cfrbench.machine import computes_bf16
from cfrbench_segmenter.vnet import VNet


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32-fast")])
def test_auto_is_bf16_only_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch, native: bool, expected: str) -> None:
    monkeypatch.setattr(compute, "computes_bf16", lambda: native)
    assert settled(ComputeSection(device="cpu", precision="auto")).precision == expected


def test_a_precision_asked_for_is_kept() -> None:
    for precision in ("fp32", "fp32-fast", "bf16"):
        section = ComputeSection(device="cpu", precision=precision)
        assert settled(section) is section


def test_this_processor_is_asked_about_bf16() -> None:
    assert computes_bf16() == bool(getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", computes_bf16()))


def gradients(precision: str) -> tuple[float, list[torch.Tensor], bool]:
    torch.manual_seed(0)
    place = Compute(torch.device("cpu"), precision)
    network = place.place(VNet(1, 2, 4, 2, 0.0))
    image, label = torch.randn(2, 1, 16, 16, 16), torch.randint(0, 2, (2, 16, 16, 16), dtype=torch.uint8)
    with place.autocast():
        loss = ce_dice(network(place.batch(image)), label)
    loss.backward()  # type: ignore[no-untyped-call]
    first = next(m for m in network.modules() if isinstance(m, nn.Conv3d) and m.in_channels > 1)
    last = first.weight.is_contiguous(memory_format=torch.channels_last_3d)
    return float(loss.detach()), [p.grad for p in network.parameters() if p.grad is not None], last


def test_fast_single_precision_keeps_channels_last_and_single_precision() -> None:
    plain, fast = gradients("fp32"), gradients("fp32-fast")
    assert (plain[2], fast[2]) == (False, True)
    assert fast[0] == pytest.approx(plain[0], abs=1e-5)
    assert all(gradient.dtype == torch.float32 for gradient in fast[1])
    for one, other in zip(plain[1], fast[1], strict=True):
        assert (one - other).norm() <= 2e-3 * one.norm() + 1e-5
