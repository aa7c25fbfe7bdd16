"""One LoRA step of SAM ViT-B at canvas 1024, batch 1, on the CPU, and one forward pass, beside the official ones.

Every variant runs in a process of its own, the official one in its default environment, ours in that of the command
line. ``CFRBENCH_VIT_SIZE`` makes the canvas smaller, ``CFRBENCH_VIT_STEPS`` times more steps.
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

FULL = 1024
SIZE = int(os.environ.get("CFRBENCH_VIT_SIZE", str(FULL)))
STEPS = int(os.environ.get("CFRBENCH_VIT_STEPS", "3"))
#: how many times faster than officially a step and a forward pass are, and the largest share of the official memory
FASTER, FORWARD = {"fp32": 1.4, "bf16": 4.0}, {"bf16": 3.5}
MEMORY = {"fp32": 0.55, "bf16": 0.45, "recompute": 0.45}
#: largest relative difference of the first gradient's norm; a tenth of it for the loss
EQUAL = {"fp32": 1e-4, "recompute": 1e-4, "bf16": 0.1}


def test_a_step_in_less_time_and_memory(record_property: Callable[[str, object], None]) -> None:
    print()
    gain = matrix_gflops(torch.bfloat16) / matrix_gflops(torch.float32)
    plain = measured("vit_step", "official", (SIZE, STEPS), settings=False)
    failures = []
    for variant, precise in EQUAL.items():
        row = measured("vit_step", variant, (SIZE, STEPS), settings=True)
        assert row["loss"] == pytest.approx(plain["loss"], rel=0.1 * precise)
        assert row["gradient"] == pytest.approx(plain["gradient"], rel=precise)
        memory = row["peak_mib"] / plain["peak_mib"]
        peaks = f"{plain['peak_mib'] / 1024:.1f} / {row['peak_mib'] / 1024:.1f} GiB = {memory:.2f}"
        figures = {"step": f"{beside(plain, row)}; {peaks}", "forward pass": beside(plain, row, "forward_")}
        for what, text in figures.items():
            record_property(f"ViT-B {what} at canvas {SIZE}, {variant} against official", text)
            print(f"{variant} {what}: {text}")
        # Without instructions for bf16 a CPU computes it through single precision, slower than that.
        if SIZE == FULL and (variant != "bf16" or computes_bf16()):
            for what, name, bounds in (("step", "seconds", FASTER), ("forward pass", "forward_seconds", FORWARD)):
                if (faster := plain[name] / row[name]) < bounds.get(variant, 0.0):
                    failures.append(f"the {what} in {variant} is {faster:.2f} times as fast, not {bounds[variant]}")
        if SIZE == FULL and memory > MEMORY[variant]:
            failures.append(f"{variant} needs {memory:.2f} of the memory, not {MEMORY[variant]}")
    print(f"a product of matrices is {gain:.1f} times as fast in bf16 as in fp32 here")
    assert not failures, "; ".join(failures)
