"""Prediction of a whole LA volume by sliding windows: the official loop, MONAI's, and ours in fp32 and bf16.

The V-Net of 16 filters is trained for 400 small steps first: scores of a fresh network lie so near 0.5 that rounding
decides labels. Each variant has a process of its own, ours with the memory settings of the command line, the others
with the system's, as users run them. ``CFRBENCH_WINDOWS=15`` cuts the volume so that it has about so many windows.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.apart import Row, beside, measured
from benchmarks.timing import compare
from cfrbench import registry
from cfrbench.config import Triple
from cfrbench.folding import folded
from cfrbench.machine import computes_bf16

pytestmark = [pytest.mark.benchmark_only, pytest.mark.timeout(3600)]

WINDOWS = int(os.environ.get("CFRBENCH_WINDOWS", "9999"))
#: how many times faster than the official loop
FASTER = {"fp32": 2.0, "bf16": 4.5}
FASTER_THAN_MONAI = 1.8
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def official(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Row]:
    """The volume's file, where masks go, and what the official loop took."""
    file, folder = next((data_folder / "la").rglob("*.h5")), tmp_path_factory.mktemp("masks")
    measured("predict_volume", "train", (file, folder, WINDOWS), settings=True)
    return file, folder, measured("predict_volume", "official", (file, folder, WINDOWS), settings=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_volume(official: tuple[Path, Path, Row], precision: str, record_property: Record) -> None:
    file, folder, plain = official
    row = measured("predict_volume", precision, (file, folder, WINDOWS), settings=True)
    faster = plain["seconds"] / row["seconds"]
    labels = f"{row['differ']:.1e} of the labels differ, Dice {plain['dice']:.3f} and {row['dice']:.3f}"
    record_property(f"one LA volume of {row['windows']:.0f} windows, {precision}, against the official loop",
                    f"{beside(plain, row)}; {labels}")  # fmt: skip
    if precision == "fp32":
        assert row["differ"] == 0.0
    assert row["dice"] == pytest.approx(plain["dice"], abs=0.05)
    if precision != "bf16" or computes_bf16():
        assert faster >= FASTER[precision]


@pytest.mark.parametrize("sides", [(32, 32, 16), (64, 64, 32)])
def test_a_small_window_of_one_thread(sides: Triple, record_property: Record) -> None:
    """As `quick` predicts in fp32: torch computes a small batch of one without oneDNN, the folded copy does not."""
    segmenter = registry.load("net", "vnet")
    network = segmenter(segmenter.Config(width=8, depth=3)).build(1, 2).eval()
    fast, window = folded(network), torch.randn(1, 1, *sides)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            found = compare(lambda: network(window), lambda: fast(window), rounds=10)
            torch.testing.assert_close(fast(window), network(window), rtol=0, atol=1e-5)
    finally:
        torch.set_num_threads(threads)
    record_property(f"one window of {'x'.join(map(str, sides))}, V-Net of 8 filters, fp32, one thread", str(found))
    assert found.ratio >= 1.4


@pytest.mark.skipif(importlib.util.find_spec("monai") is None, reason="MONAI is not installed (extra `bench`)")
def test_against_monai(official: tuple[Path, Path, Row], record_property: Record) -> None:
    file, folder, _ = official
    theirs, ours = (measured("predict_volume", v, (file, folder, WINDOWS), settings=v == "fp32")
                    for v in ("monai", "fp32"))  # fmt: skip
    faster = theirs["seconds"] / ours["seconds"]
    record_property("one LA volume, fp32, against MONAI's sliding window", beside(theirs, ours))
    assert theirs["differ"] < 1e-5
    assert faster >= FASTER_THAN_MONAI
