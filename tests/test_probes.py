"""What `cfrbench doctor --bench` measures and forecasts, on the smallest sizes."""

from __future__ import annotations

import re

import pytest
import torch

from cfrbench import probes


def test_a_product_of_matrices_and_a_copy_are_timed() -> None:
    assert probes.matrix_gflops(torch.float32, rounds=1) > 0.1
    assert probes.copied_gbs(rounds=1) > 0.01


def test_a_step_takes_longer_than_a_window_of_the_same_crop() -> None:
    assert probes.step_seconds("fp32", (16, 16, 16), 1) > probes.window_seconds("fp32", (16, 16, 16), 1) > 0


def test_a_preset_is_forecast_from_a_chain_in_miniature() -> None:
    found = probes.preset("smoke")
    assert re.search(
        r"about \d+ (s|min) with 1 at a time.*learned from a probe.*a fine-tuning step \d\.\d\d s", found.detail
    )


def test_the_paper_preset_takes_less_time_on_a_faster_machine() -> None:
    slow, fast = (probes.paper_seconds(step, window, gflops) for step, window, gflops in ((6, 0.3, 100), (3, 0.1, 400)))
    assert set(slow) == set(fast)
    assert all(fast[part] < slow[part] for part in slow)
    assert slow["two trainings"] == pytest.approx(2 * 6000 * 6)
