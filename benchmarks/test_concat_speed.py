"""Concatenation and intensity curves against plain code, in one process on the same inputs.

Run with ``pytest benchmarks/test_concat_speed.py -n 0 -m benchmark_only --benchmark-enable -s``. Figures are the best
of 15 rounds in milliseconds on LA's crop (4, 112, 112, 80) at canvas 1024; the sides of a ratio are timed in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import comb
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cfrbench import registry
from cfrbench.compute import Compute
from cfrbench.config import Triple, TuningSection
from cfrbench.contracts import ConcatStrategy
from cfrbench.intensity import Floats, bend_slices, bezier_map, bezier_points
from cfrbench.losses import class_map
from cfrbench.tuning import Labeller
from cfrbench_concat.boustrophedon import Boustrophedon
from cfrbench_concat.grid import Grid
from cfrbench_concat.rotated import Rotated
from cfrbench_concat.shuffled import Shuffled
from cfrbench_concat.upsampled import Upsampled
from tests.concat.plain import plain_axis, plain_forward, plain_inverse

Doubles = NDArray[np.float64]

pytestmark = pytest.mark.benchmark_only

SHAPE: Triple = (112, 112, 80)
SIDE, BATCH, ROUNDS = 1024, 4, 15


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
    assert figures["forward_slices_first"] / figures["copy"] < 2.5


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


def looped_forward(volumes: Tensor, fill: float) -> Doubles:
    """``(B, S, S)`` as the official function makes it: volume by volume, slice by slice, in double precision."""
    canvases = []
    for stack in volumes.numpy().swapaxes(1, 3):
        (rows, pad_y, tile_y, top), (cols, pad_x, tile_x, left) = (plain_axis(side, SIDE) for side in stack.shape[1:])
        blank = np.full((tile_y, tile_x), fill, np.float64)
        tiles = [blank] * max((rows * cols - len(stack)) // 2, 0)
        for image in stack:
            tiles.append(np.pad(image.astype(np.float64), ((pad_y, pad_y), (pad_x, pad_x)), constant_values=fill))
        tiles += [blank] * (rows * cols - len(tiles))
        grow, top, left = max(0, -top), max(top, 0), max(left, 0)
        canvas = np.full((SIDE + 2 * grow, SIDE + 2 * grow), fill, np.float64)
        for number, tile in enumerate(tiles):
            y, x = top + number // cols * tile_y, left + number % cols * tile_x
            canvas[y : y + tile_y, x : x + tile_x] = tile
        canvases.append(canvas[grow : grow + SIDE, grow : grow + SIDE])
    return np.stack(canvases)


def looped_inverse(canvases: Doubles, shape: Triple) -> Doubles:
    """``(B, H, W, D)`` as the official function cuts it out: canvas by canvas, tile by tile."""
    volumes = []
    for canvas in canvases:
        (rows, pad_y, tile_y, top), (cols, pad_x, tile_x, left) = (plain_axis(side, SIDE) for side in shape[1::-1])
        blank = max((rows * cols - shape[2]) // 2, 0)
        padded = np.pad(canvas, max(0, -top), constant_values=255)
        stack = np.zeros((shape[2] + 2 * blank, tile_y, tile_x))
        for number in range(len(stack)):
            y, x = max(top, 0) + number // cols * tile_y, max(left, 0) + number % cols * tile_x
            stack[number] = padded[y : y + tile_y, x : x + tile_x]
        inner = stack[blank : blank + shape[2], pad_y : tile_y - pad_y, pad_x : tile_x - pad_x]
        volumes.append(np.ascontiguousarray(inner.swapaxes(0, 2)))
    return np.stack(volumes)


@pytest.mark.parametrize("held", ["as a file holds them", "slices first"])
def test_there_and_back(volumes: Tensor, held: str, record_property: Callable[[str, object], None]) -> None:
    """Forward and inverse of a batch, and of a batch with its labels; fine-tuning lays out volumes slices first."""
    grid = Grid()
    layout = grid.plan(SHAPE, SIDE)
    labels = (volumes > 0).to(torch.uint8)
    if held == "slices first":
        volumes, labels = slices_first(volumes), slices_first(labels)
    canvases, label_canvases = grid.forward(volumes, layout, 0), grid.forward(labels, layout, 255)
    assert np.array_equal(looped_forward(volumes, 0), canvases[:, 0])
    assert np.array_equal(looped_inverse(looped_forward(labels, 255), SHAPE), labels)
    figures = in_turns(
        both=lambda: grid.inverse(grid.forward(volumes, layout, 0), layout),
        both_of_labels=lambda: grid.inverse(grid.forward(labels, layout, 255), layout),
        two_copies=lambda: (canvases.clone(), canvases.clone()),
        two_copies_of_labels=lambda: (label_canvases.clone(), label_canvases.clone()),
        loop=lambda: looped_inverse(looped_forward(volumes, 0), SHAPE),
        loop_of_labels=lambda: looped_inverse(looped_forward(labels, 255), SHAPE),
    )
    copies, loop = figures["both"] / figures["two_copies"], figures["loop"] / figures["both"]
    with_labels = (figures["loop"] + figures["loop_of_labels"]) / (figures["both"] + figures["both_of_labels"])
    words = f"{copies:.1f} times two copies; loop {loop:.1f}x, with labels {with_labels:.1f}x"
    record_property(f"layout and inverse, {held}", words)
    print(f"\n  {held}: {words}", end=" ")
    assert copies < 3
    # Two copies alone are about 11 times faster than the loop, so no layout can be 20 times faster in one thread.
    assert loop > 4
    assert with_labels > 6


class Answers(nn.Module):
    """In the place of a network: canvases ``(B, S, S)`` to logits ``(B, C, S, S)`` that are there already."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.model = SimpleNamespace(prompting=None)

    def forward(self, canvases: Tensor) -> Tensor:
        assert len(canvases) == len(self.logits)
        return self.logits


def test_all_of_pseudo_labelling_but_the_network(
    volumes: Tensor, record_property: Callable[[str, object], None]
) -> None:
    """Layout, network, class map, inverse, as an online labelling does it for each batch.

    Beside ShumengLI/CFR code/utils/util.py ``sam_test_tensor`` in other words: a soft-max and an arg-max of canvases,
    and tile by tile back. Its map of probabilities, which nobody reads, is left out of its time.
    """
    logits = torch.randn(BATCH, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    foundation, section = registry.load("model", "sam-vit-b")(), TuningSection(canvas=SIDE)
    labeller = Labeller(Answers(logits), foundation, Grid(), section, Compute(torch.device("cpu"), "fp32"))  # type: ignore[arg-type]

    def official() -> Tensor:
        laid = torch.stack([plain_forward(volume, SIDE, 0) for volume in volumes])
        assert laid.shape[1:] == logits.shape[2:]
        labels = torch.argmax(torch.softmax(logits, dim=1), dim=1).float()
        return torch.stack([plain_inverse(label, SHAPE) for label in labels]).long()

    assert torch.equal(class_map(labeller(volumes.unsqueeze(1))), official())
    figures = in_turns(ours=lambda: class_map(labeller(volumes.unsqueeze(1))), official=official)
    words = f"{figures['official']:.1f} / {figures['ours']:.2f} ms = {figures['official'] / figures['ours']:.1f}x"
    record_property("all of pseudo-labelling 4 crops but the network, against official", words)
    assert figures["official"] / figures["ours"] > 20


@pytest.mark.parametrize("strategy", [Shuffled(), Rotated(), Boustrophedon(), Upsampled()], ids=lambda s: s.name)
def test_the_other_exact_layouts(volumes: Tensor, strategy: ConcatStrategy) -> None:
    layout = strategy.plan(SHAPE, SIDE)
    canvases = strategy.forward(volumes, layout, 0)
    figures = in_turns(
        both=lambda: strategy.inverse(strategy.forward(volumes, layout, 0), layout),
        two_copies=lambda: (canvases.clone(), canvases.clone()),
        loop=lambda: looped_inverse(looped_forward(volumes, 0), SHAPE),
    )
    assert figures["both"] / figures["two_copies"] < 15
    assert figures["loop"] > figures["both"]


def naive_map(values: Floats, points: Floats) -> Floats:
    """The curve with its polynomials made anew for each slice and ordinary sorting."""
    t = np.linspace(0.0, 1.0, 100_000)
    table = np.array([comb(3, i) * t ** (3 - i) * (1 - t) ** i for i in range(4)])
    mapped: Floats = np.interp(values, np.sort(points[:, 0] @ table), np.sort(points[:, 1] @ table))
    return mapped


def test_bezier(volumes: Tensor, record_property: Callable[[str, object], None]) -> None:
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
    for way in ("exact", "nodes_2000"):
        words = f"{figures['naive']:.0f} / {figures[way]:.1f} ms = {figures['naive'] / figures[way]:.1f}x"
        record_property(f"intensity curves of a quarter of the slices, {way}, against plain code", words)
    assert figures["naive"] / figures["exact"] > 1.7
    assert figures["naive"] / figures["nodes_2000"] > 6


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
