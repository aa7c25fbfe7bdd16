"""Which precision a machine gets, and that the fast single precision computes what the plain one does."""

from __future__ import annotations

import copy

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


def gradients(precision: str, network: nn.Module) -> tuple[float, list[torch.Tensor], bool]:
    place = Compute(torch.device("cpu"), precision)
    network = place.place(copy.deepcopy(network))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, 16, 16, 16, generator=generator)
    label = torch.randint(0, 2, (2, 16, 16, 16), dtype=torch.uint8, generator=generator)
    with place.autocast():
        loss = ce_dice(network(place.batch(image)), label)
    loss.backward()  # type: ignore[no-untyped-call]
    first = next(m for m in network.modules() if isinstance(m, nn.Conv3d) and m.in_channels > 1)
    last = first.weight.is_contiguous(memory_format=torch.channels_last_3d)
    return float(loss.detach()), [p.grad for p in network.parameters() if p.grad is not None], last


def test_single_precision_keeps_channels_last_only_where_norms_stay_accurate() -> None:
    torch.manual_seed(0)
    ours = VNet(1, 2, 4, 2, 0.0)
    guest = copy.deepcopy(ours)
    for name, module in ours.named_modules():
        if isinstance(module, nn.BatchNorm3d):
            guest.set_submodule(name, nn.BatchNorm3d(module.num_features))
    rows = {(precision, net): gradients(precision, net) for precision in ("fp32", "fp32-fast") for net in (ours, guest)}
    assert [row[2] for row in rows.values()] == [True, False, True, True]
    plain = rows["fp32", guest]
    for row in rows.values():
        assert row[0] == pytest.approx(plain[0], abs=1e-5)
        assert all(gradient.dtype == torch.float32 for gradient in row[1])
        for one, other in zip(plain[1], row[1], strict=True):
            assert (one - other).norm() <= 2e-3 * one.norm() + 1e-5
