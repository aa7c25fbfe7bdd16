"""A Mean Teacher step of the V-Net of 16 filters on 2 + 2 crops of 112 x 112 x 80, beside the official step.

Every variant runs in a process of its own, the official one once with the system's memory settings and once with those
of the command line, so that the gain of code and the gain of settings stay apart. ``CFRBENCH_STEP_SIDES=64,64,48``
makes the crops smaller, ``CFRBENCH_STEPS`` times more or fewer steps. The first few are slower, while memory is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from benchmarks.apart import beside, measured
from cfrbench.machine import computes_bf16
from cfrbench.probes import matrix_gflops

pytestmark = [pytest.mark.benchmark_only, pytest.mark.timeout(3600)]

FULL = "112,112,80"
SIDES = os.environ.get("CFRBENCH_STEP_SIDES", FULL)
STEPS = int(os.environ.get("CFRBENCH_STEPS", "7"))
#: how many times faster than officially, and the largest share of the official memory
FASTER, MEMORY = {"fp32": 1.8, "fp32-fast": 2.2, "bf16": 4.5}, {"bf16": 0.8}
#: largest relative difference of the first loss and of the norm of its gradient
EQUAL = {"official-settings": (1e-6, 1e-6), "fp32": (1e-5, 1e-4), "fp32-fast": (1e-4, 1e-2), "bf16": (1e-2, 0.2)}


def test_a_step_in_less_time_and_memory(record_property: Callable[[str, object], None]) -> None:
    print()
    gain = matrix_gflops(torch.bfloat16) / matrix_gflops(torch.float32)
    arguments = (*SIDES.split(","), STEPS)
    plain = measured("retrain_step", "official", arguments, settings=False)
    failures = []
    for variant, (loss, gradient) in EQUAL.items():
        row = measured("retrain_step", variant, arguments, settings=True)
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
