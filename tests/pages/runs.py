"""A small finished run for the tests of pages."""

from __future__ import annotations

from pathlib import Path

import cfrbench

SMALL = {"data.phantom.train": 4, "data.phantom.test": 3, "data.phantom.shape": (32, 32, 16)}


def small_run(store: Path) -> None:
    """MT at one label with its twin, bounds and pseudo-labels, on a phantom of 32 x 32 x 16 voxels."""
    result = cfrbench.run(ssl=("mt",), labels=(1,), preset="smoke", set=SMALL, store=store)
    assert result.failures == {}
