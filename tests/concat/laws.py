"""Laws of every exact strategy, asserted on one drawn volume."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, sqrt

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy
from cfrbench.errors import UsageError

sides = st.integers(1, 200)
shapes = st.tuples(sides, sides, st.integers(1, 130))
dtypes = st.sampled_from([torch.uint8, torch.int64, torch.bfloat16, torch.float32])
leads = st.sampled_from([(), (1,), (2,), (2, 3)])
fills = st.sampled_from([0, 255])
#: canvases from somewhat too small for all voxels to four times their area, so that most volumes fit and some do not
rooms = st.floats(0.9, 2.0)

Reason = Callable[[Triple, int], str]  # shape and canvas -> the words that a refusal must have; empty: no refusal


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values that differ between neighbours and are exact in every dtype."""
    count = int(torch.tensor(shape).prod())
    return (torch.arange(count) * 7 % 251).reshape(shape).to(dtype)


def canvas_for(shape: Triple, room: float) -> int:
    """A canvas of ``room`` times the side that the voxels of ``shape`` would fill."""
    return ceil(room * max(sqrt(shape[0] * shape[1] * shape[2]), max(shape[:2])))


def there_and_back(strategy: ConcatStrategy, reason: Reason, shape: Triple, canvas: int, dtype: torch.dtype,
                   lead: tuple[int, ...], fill: int, draw: int = 0) -> bool:  # fmt: skip
    """Whether the layout accepts: then nothing is lost or made up; else it must be right to refuse."""
    why = reason(shape, canvas)
    if why:
        with pytest.raises(UsageError, match=why):
            strategy.plan(shape, canvas, draw=draw)
        return False
    layout = strategy.plan(shape, canvas, draw=draw)
    volumes = numbered((*lead, *shape) if canvas < 600 else shape, dtype)
    before = volumes.clone()
    canvases = strategy.forward(volumes, layout, fill)
    back = strategy.inverse(canvases, layout)
    assert canvases.shape == (*volumes.shape[:-3], layout.count, layout.canvas, layout.canvas)
    assert (back.dtype, canvases.dtype) == (dtype, dtype)
    assert torch.equal(back, volumes)
    assert torch.equal(volumes, before)
    # Nothing but the voxels and the fill is on the canvas.
    assert int((canvases != fill).sum()) == int((volumes != fill).sum())
    return True
