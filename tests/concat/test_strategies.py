"""The exact strategies beside the grid: nothing is lost, every refusal is right, each is what its name says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfrbench.config import Triple, validate
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.errors import ConfigError, UsageError
from cfrbench_concat.boustrophedon import Boustrophedon
from cfrbench_concat.grid import Grid
from cfrbench_concat.rotated import Rotated, RotatedLayout
from cfrbench_concat.shuffled import Shuffled, in_order
from cfrbench_concat.small_size import SmallSize
from cfrbench_concat.upsampled import Upsampled
from tests.concat.laws import Reason, canvas_for, dtypes, fills, leads, numbered, rooms, shapes, there_and_back
from tests.concat.plain import (
    plain_forward,
    plain_inverse,
    plain_spiral,
    plain_turned,
    plain_winding,
    what_is_lost,
)

toy_shapes = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 30))
draws = st.integers(0, 2**62 - 1)
Path = Callable[[int, int], list[int]]
PATHS: dict[str, Path] = {"rows": plain_winding, "spiral": plain_spiral}


def along(path: Path) -> Reason:
    """Why the tiles along a path cannot hold a volume."""

    def reason(shape: Triple, canvas: int) -> str:
        height, width, _ = shape
        return what_is_lost(shape, canvas, path(canvas // width, canvas // height))

    return reason


def as_square(shape: Triple, canvas: int) -> str:
    """Why a grid of square tiles cannot hold a volume."""
    return what_is_lost(squared(shape), canvas)


def squared(shape: Triple) -> Triple:
    """A volume with square slices around another one."""
    return (max(shape[:2]), max(shape[:2]), shape[2])


def never(shape: Triple, canvas: int) -> str:
    """Nothing is ever refused."""
    return ""


def boustrophedon(path: str) -> Boustrophedon:
    return Boustrophedon(Boustrophedon.Config.model_validate({"path": path}))


EXACT: dict[str, tuple[ConcatStrategy, Reason]] = {
    "grid": (Grid(), what_is_lost),
    "shuffled": (Shuffled(), what_is_lost),
    "rotated": (Rotated(), as_square),
    "boustrophedon": (boustrophedon("rows"), along(plain_winding)),
    "spiral": (boustrophedon("spiral"), along(plain_spiral)),
    "upsampled": (Upsampled(), never),
    "small-size": (SmallSize(), never),
    "small-size, reduced": (SmallSize(SmallSize.Config(side=64)), never),
}


def accepted(name: str, volumes: int) -> int:
    """How many of so many drawn volumes a strategy accepts; all laws are asserted on the way."""
    strategy, reason = EXACT[name]
    count = 0

    @settings(deadline=None, max_examples=volumes, database=None)
    @given(shapes, rooms, dtypes, leads, fills, draws)
    def law(shape: Triple, room: float, dtype: torch.dtype, lead: tuple[int, ...], fill: int, draw: int) -> None:
        nonlocal count
        canvas = canvas_for(squared(shape) if name == "rotated" else shape, room)
        count += there_and_back(strategy, reason, shape, canvas, dtype, lead, fill, draw)

    law()
    return count


@pytest.mark.parametrize("name", EXACT)
def test_what_is_accepted_comes_back_and_what_is_refused_would_be_lost(name: str) -> None:
    assert accepted(name, 25) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_five_hundred_volumes_of_which_most_are_accepted(name: str) -> None:
    assert accepted(name, 500) >= 300


# ---------------------------------------------------------------------------------------------------------------------
# each is what its name says


@settings(deadline=None, max_examples=60)
@given(toy_shapes, st.integers(14, 80), st.sampled_from(["rows", "spiral"]))
def test_a_path_equals_a_plain_loop_along_it(shape: Triple, canvas: int, path: str) -> None:
    strategy, volume = boustrophedon(path), numbered(shape, torch.int64)
    layout = strategy.plan(shape, canvas, overflow="official")
    tiles = PATHS[path](layout.rows.count, layout.cols.count)
    laid = strategy.forward(volume, layout, 255)
    assert torch.equal(laid[0], plain_forward(volume, canvas, 255, tiles))
    if layout.lossless:
        assert torch.equal(strategy.inverse(laid, layout), volume)


@pytest.mark.parametrize("path", ["rows", "spiral"])
def test_neighbouring_slices_share_an_edge(path: str) -> None:
    layout = boustrophedon(path).plan((7, 5, 60), 60)
    row, col = np.divmod(layout.tiles, layout.cols.count)
    assert (np.abs(np.diff(row)) + np.abs(np.diff(col)) == 1).all()
    grid = Grid().plan((7, 5, 60), 60)
    row, col = np.divmod(np.arange(grid.lead, grid.lead + 60), grid.cols.count)
    assert (np.abs(np.diff(row)) + np.abs(np.diff(col)) > 1).any()


@settings(deadline=None, max_examples=60)
@given(toy_shapes, st.integers(14, 80), draws)
def test_shuffled_is_the_grid_of_the_slices_in_another_order(shape: Triple, canvas: int, draw: int) -> None:
    strategy, volume = Shuffled(), numbered(shape, torch.int64)
    order = np.random.default_rng(draw).permutation(shape[2]).tolist()
    layout = in_order(strategy.plan(shape, canvas, overflow="official"), order)
    laid = strategy.forward(volume, layout, 255)
    assert torch.equal(laid[0], plain_forward(volume[..., order], canvas, 255))
    back = strategy.inverse(laid, layout)
    assert torch.equal(back[..., order], plain_inverse(laid[0], shape))


def test_shuffled_has_another_order_for_each_draw_and_every_slice_in_it() -> None:
    orders = {Shuffled().plan((4, 4, 50), 40, draw=draw).tiles for draw in range(20)}
    assert len(orders) == 20
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(25, 75))}


@settings(deadline=None, max_examples=60)
@given(toy_shapes, st.integers(14, 80), draws)
def test_rotated_is_the_grid_of_turned_squares(shape: Triple, canvas: int, draw: int) -> None:
    strategy, volume = Rotated(), numbered(shape, torch.int64)
    layout = strategy.plan(shape, canvas, overflow="official", draw=draw)
    laid = strategy.forward(volume, layout, 255)
    assert torch.equal(laid[0], plain_forward(plain_turned(volume, layout.turns, 255), canvas, 255))


def test_rotated_never_leaves_a_slice_as_it_is() -> None:
    shape = (4, 4, 60)
    layout = Rotated().plan(shape, 40)
    assert {k for k, _ in layout.turns} == {0, 1, 2, 3}
    assert {axis for _, axis in layout.turns} == {0, 1}
    unlike = torch.arange(16).reshape(4, 4, 1).expand(shape)
    laid, plain = (s.forward(unlike, s.plan(shape, 40), 0) for s in (Rotated(), Grid()))
    tiles = Grid().inverse(laid, Grid().plan(shape, 40)) == Grid().inverse(plain, Grid().plan(shape, 40))
    assert not tiles.all(dim=0).all(dim=0).any()


def test_slice_by_slice_makes_a_canvas_of_every_slice() -> None:
    volume = numbered((3, 5, 4), torch.uint8)
    layout = Upsampled().plan((3, 5, 4), 1024)
    canvases = Upsampled().forward(volume, layout, 9)
    assert (layout.count, layout.canvas) == (4, 5)
    assert torch.equal(canvases[2, :, :3], volume[:, :, 2].T)
    assert (canvases[..., 3:] == 9).all()


def test_small_size_asks_for_a_model_as_small_as_its_slices() -> None:
    own, reduced = SmallSize(), SmallSize(SmallSize.Config(side=64))
    assert (own.canvas_side((100, 112, 9), 1024), own.input_side((100, 112, 9), 1024)) == (112, 112)
    assert (own.canvas_side((100, 97, 9), 1024), own.input_side((5, 7, 9), 1024)) == (112, 32)
    assert (reduced.canvas_side((100, 112, 9), 1024), reduced.input_side((100, 112, 9), 1024)) == (112, 64)
    assert Upsampled().input_side((100, 112, 9), 1024) == Grid().input_side((100, 112, 9), 1024) == 1024


# ---------------------------------------------------------------------------------------------------------------------
# wrong use


@pytest.mark.parametrize("name", EXACT)
def test_tensors_and_layouts_of_another_plan_are_refused(name: str) -> None:
    strategy, _ = EXACT[name]
    layout = strategy.plan((5, 4, 7), 20)
    with pytest.raises(UsageError, match="volumes of shape"):
        strategy.forward(torch.zeros(4, 5, 7), layout, 0)
    with pytest.raises(UsageError, match="canvases of shape"):
        strategy.inverse(torch.zeros(layout.count, layout.canvas + 1, layout.canvas + 1), layout)
    with pytest.raises(UsageError, match="at least one voxel a side"):
        strategy.plan((5, 0, 7), 20)


@pytest.mark.parametrize("strategy", [Shuffled(), Rotated(), Boustrophedon()])
def test_layouts_of_another_strategy_are_refused(strategy: ConcatStrategy) -> None:
    with pytest.raises(UsageError, match="own `plan` returned"):
        strategy.forward(torch.zeros(5, 4, 7), Layout((5, 4, 7), 20), 0)


@pytest.mark.parametrize("strategy", [Shuffled(), Rotated(), Boustrophedon()])
def test_a_refusal_names_the_smallest_canvas(strategy: ConcatStrategy) -> None:
    with pytest.raises(UsageError, match=r"volume of 5x4x9 voxels .* canvas of 12x12 pixels .*tuning\.canvas=15"):
        strategy.plan((5, 4, 9), 12)


@pytest.mark.parametrize("side", [0, 16, 40])
def test_a_reduced_size_that_no_model_takes_is_refused(side: int) -> None:
    with pytest.raises(ConfigError, match="side"):
        validate(SmallSize.Config, {"side": side}, "the options of concat.small-size")


def test_a_layout_with_other_turns_is_another_layout() -> None:
    layout = Rotated().plan((4, 4, 3), 40)
    other = replace(layout, turns=((0, 0),) * 3)
    assert isinstance(other, RotatedLayout)
    assert other != layout
    assert hash(layout) == hash(Rotated().plan((4, 4, 3), 40))
