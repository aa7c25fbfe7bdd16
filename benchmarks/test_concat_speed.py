"""Concatenation and intensity curves against plain code, in one process on the same inputs.

Run with ``pytest benchmarks/test_concat_speed.py -m benchmark_only -s``. Figures are the best of 15 rounds in
milliseconds on LA's crop (4, 112, 112, 80) at canvas 1024; the sides of a ratio are timed in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import comb

import numpy as np
import pytest
import torch
from torch import Tensor

from cfrbench.intensity import Floats, bend_slices, bezier_map, bezier_points
from cfrbench_concat.grid import Grid
from tests.concat.plain import plain_forward, plain_inverse

pytestmark = pytest.mark.benchmark_only

SHAPE, SIDE, BATCH, ROUNDS = (112, 112, 80), 1024, 4, 15


def in_turns(**sides: Callable[[], object]) -> dict[str, float]:
    """Best milliseconds of each side, called in turns after one warm-up: other processes only ever add time."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - begin))
    figures = {name: min(values) for name, values in times.items()}
    print("\n  " + ", ".join(f"{name} {figure:.2f} ms" for name, figure in figures.items()), end=" ")
    return figures


@pytest.fixture
def volumes() -> Tensor:
    return torch.randn(BATCH, *SHAPE, generator=torch.Generator().manual_seed(0))


def slices_first(volumes: Tensor) -> Tensor:
    """Equal volumes whose memory holds slice after slice, as `Grid.inverse` returns them."""
    return volumes.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)


def test_forward(volumes: Tensor) -> None:
    grid = Grid()
    layout = grid.plan(SHAPE, SIDE)
    held = slices_first(volumes)
    labels = (volumes > 0).to(torch.uint8)
    figures = in_turns(
        forward=lambda: grid.forward(volumes, layout, 0),
        loop=lambda: torch.stack([plain_forward(volume, SIDE, 0) for volume in volumes]),
        turned_copy=lambda: volumes.permute(0, 3, 2, 1).contiguous(),
        forward_slices_first=lambda: grid.forward(held, layout, 0),
        copy=lambda: held.clone(),
        forward_uint8=lambda: grid.forward(labels, layout, 255),
    )
    assert figures["loop"] / figures["forward"] > 1.2
    assert figures["forward"] / figures["turned_copy"] < 2.5
    assert figures["forward_slices_first"] / figures["copy"] < 4


def test_inverse(volumes: Tensor) -> None:
    grid = Grid()
    layout = grid.plan(SHAPE, SIDE)
    canvases = grid.forward(volumes, layout, 0)
    figures = in_turns(
        inverse=lambda: grid.inverse(canvases, layout),
        loop=lambda: torch.stack([plain_inverse(canvas[0], SHAPE) for canvas in canvases]),
        copy=lambda: canvases.clone(),
    )
    assert figures["loop"] / figures["inverse"] > 3
    assert figures["inverse"] / figures["copy"] < 3


def naive_map(values: Floats, points: Floats) -> Floats:
    """The curve with its polynomials made anew for each slice and ordinary sorting."""
    t = np.linspace(0.0, 1.0, 100_000)
    table = np.array([comb(3, i) * t ** (3 - i) * (1 - t) ** i for i in range(4)])
    mapped: Floats = np.interp(values, np.sort(points[:, 0] @ table), np.sort(points[:, 1] @ table))
    return mapped


def test_bezier(volumes: Tensor) -> None:
    crops = volumes[:1]
    rng = np.random.default_rng(0)
    chosen = rng.random((1, SHAPE[2])) < 0.25
    points = bezier_points(rng.random((int(chosen.sum()), 4)))
    figures = in_turns(
        exact=lambda: bend_slices(crops, chosen, points),
        naive=lambda: bend_slices(crops, chosen, points, naive_map),
        nodes_2000=lambda: bend_slices(crops, chosen, points, lambda v, p: bezier_map(v, p, nodes=2000)),
    )
    assert torch.equal(bend_slices(crops, chosen, points), bend_slices(crops, chosen, points, naive_map))
    assert figures["naive"] / figures["exact"] > 1.7


def test_one_batch_of_curves_is_slower_than_slice_by_slice(volumes: Tensor) -> None:
    """Why `bend_slices` runs over the chosen slices: sorting and searching them as tensors takes longer."""
    values = volumes[0].movedim(-1, 0)[:20].double().flatten(1).contiguous()
    points = bezier_points(np.random.default_rng(0).random((20, 4)))

    def batched() -> Tensor:
        t = torch.linspace(0, 1, 100_000, dtype=torch.float64)
        table = torch.stack([comb(3, i) * t ** (3 - i) * (1 - t) ** i for i in range(4)])
        x, y = (torch.from_numpy(points[..., axis]) @ table for axis in (0, 1))
        x, y = x.sort(dim=1).values, y.sort(dim=1).values
        right = torch.searchsorted(x, values).clamp(1, x.shape[1] - 1)
        x0, x1, y0, y1 = x.gather(1, right - 1), x.gather(1, right), y.gather(1, right - 1), y.gather(1, right)
        return (y0 + (y1 - y0) / (x1 - x0) * (values - x0)).clamp(0, 1)

    def one_by_one() -> Floats:
        return np.stack([bezier_map(v, p) for v, p in zip(values.numpy(), points, strict=True)])

    np.testing.assert_allclose(batched().numpy(), one_by_one(), atol=1e-9)
    figures = in_turns(batched=batched, one_by_one=one_by_one)
    assert figures["batched"] / figures["one_by_one"] > 1.3
