"""A Mean Teacher step of the V-Net of 16 filters on 2 + 2 crops of 112 x 112 x 80, beside the official step.

Every variant runs in a process of its own. The official one and ours in bf16 run with the system's memory settings and
with those of the command line, so that what code and what settings gain and cost stay apart. The first few steps are
slower, while memory is taken. ``CFRBENCH_STEP_SIDES=64,64,48`` makes crops smaller, ``CFRBENCH_STEPS`` times more of
them.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from benchmarks import retrain_step
from benchmarks.apart import beside, measured
from cfrbench.batch_norm import BatchNorm3d
from cfrbench.compute import Compute
from cfrbench.losses import ce_dice
from cfrbench.machine import computes_bf16
from cfrbench.probes import matrix_gflops
from cfrbench.training import sgd

pytestmark = [pytest.mark.benchmark_only, pytest.mark.timeout(3600)]

CPU = torch.device("cpu")
FULL = "112,112,80"
SIDES = os.environ.get("CFRBENCH_STEP_SIDES", FULL)
STEPS = int(os.environ.get("CFRBENCH_STEPS", "7"))
#: how many times faster than officially, and the largest share of the official memory
FASTER, MEMORY = {"fp32": 1.8, "fp32-fast": 2.2, "bf16": 4.5}, {"bf16": 0.8, "bf16-system": 0.8}
#: largest relative difference of the first loss and of the norm of its gradient, of which single precision knows three
#: digits in any memory order (the last test here)
EQUAL = {"official-settings": (1e-6, 1e-6), "fp32": (1e-5, 1e-3), "fp32-fast": (1e-5, 1e-3), "bf16": (1e-2, 0.2),
         "bf16-system": (1e-2, 0.2)}  # fmt: skip


def test_a_step_in_less_time_and_memory(record_property: Callable[[str, object], None]) -> None:
    print()
    gain = matrix_gflops(torch.bfloat16) / matrix_gflops(torch.float32)
    arguments = (*SIDES.split(","), STEPS)
    plain = measured("retrain_step", "official", arguments, settings=False)
    failures = []
    for variant, (loss, gradient) in EQUAL.items():
        row = measured("retrain_step", variant, arguments, settings=not variant.endswith("-system"))
        assert row["loss"] == pytest.approx(plain["loss"], rel=loss)
        assert row["gradient"] == pytest.approx(plain["gradient"], rel=gradient)
        faster, memory = plain["seconds"] / row["seconds"], row["peak_mib"] / plain["peak_mib"]
        peaks = f"{plain['peak_mib'] / 1024:.1f} / {row['peak_mib'] / 1024:.1f} GiB = {memory:.2f}"
        figures = f"{beside(plain, row)}; {peaks}"
        record_property(f"Mean Teacher step {SIDES}, {variant} against official", figures)
        print(f"{variant}: {figures}")
        # Without instructions for bf16 a CPU computes it through single precision, slower than that.
        if SIDES == FULL and faster < FASTER.get(variant, 0.0) and (variant != "bf16" or computes_bf16()):
            failures.append(f"{variant} is {faster:.2f} times as fast, not {FASTER[variant]}")
        if SIDES == FULL and memory > MEMORY.get(variant, 9.0):
            failures.append(f"{variant} needs {memory:.2f} of the memory, not {MEMORY[variant]}")
    print(f"a product of matrices is {gain:.1f} times as fast in bf16 as in fp32 here")
    assert not failures, "; ".join(failures)


def test_gradients_are_as_accurate_as_those_of_the_official_memory_order(
    record_property: Callable[[str, object], None],
) -> None:
    """Error of V-Net gradients against double precision, at several points of a training: contiguous, ours, torch's.

    One point says little: at the next one the order may be another.
    """
    sides = (64, 64, 48)
    image, label = retrain_step.crops(sides)
    torch.manual_seed(0)
    network = retrain_step.vnet().train()
    network.dropout = 0.0
    optimiser = sgd(list(network.parameters()), 0.01, 0.9, 1e-4)
    errors: dict[str, list[float]] = {"contiguous": [], "ours": [], "torch's channels last": []}
    for step in range(31):
        if step % 5 == 0:
            exact = gradient(copy.deepcopy(network).double(), image.double(), label)
            ways = copy.deepcopy(network), Compute(CPU, "fp32").place(copy.deepcopy(network)), torchs(network)
            for found, way in zip(errors.values(), ways, strict=True):
                found.append(float((gradient(way, image, label) - exact).norm() / exact.norm()))
        optimiser.zero_grad()
        ce_dice(network(image)[:2], label).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    typical = {name: math.sqrt(fmean(error**2 for error in found)) for name, found in errors.items()}
    words = ", ".join(f"{name} {error:.1e}" for name, error in typical.items())
    record_property("error of V-Net gradients in fp32, root mean square of 7 points", words)
    print("\n" + words)
    assert typical["ours"] < 2 * typical["contiguous"]  # 0.7 to 1.6 times with other weights
    assert typical["torch's channels last"] > 2 * typical["ours"]


def gradient(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """All gradients but those of biases before a norm, which are zero but for rounding."""
    network.zero_grad()
    ce_dice(network(image)[:2], label).backward()  # type: ignore[no-untyped-call]
    zero = {f"{name}.bias" for name, layer in network.named_modules() if name != "out_conv"
            and isinstance(layer, nn.Conv3d | nn.ConvTranspose3d)}  # fmt: skip
    return torch.cat([p.grad.double().flatten() for name, p in network.named_parameters()
                      if p.grad is not None and name not in zero])  # fmt: skip


def torchs(network: nn.Module) -> nn.Module:
    """A copy channels last, with torch's own batch norms."""
    copied = Compute(CPU, "fp32").place(copy.deepcopy(network))
    for module in copied.modules():
        if isinstance(module, BatchNorm3d):
            module.__class__ = nn.BatchNorm3d  # type: ignore[assignment]
    return copied
