"""Laws of the grid for any shape: what is accepted comes back voxel for voxel, what is refused would lose voxels."""

from __future__ import annotations

from math import ceil, sqrt

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfrbench import registry
from cfrbench.config import Triple
from cfrbench.contracts import Layout
from cfrbench.errors import UsageError
from cfrbench.tiling import GridLayout
from cfrbench_concat.grid import Grid
from tests.concat.laws import dtypes, leads, numbered, shapes
from tests.concat.plain import plain_forward, plain_inverse, what_is_lost

toy_shapes = st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 30))
geometries = st.sampled_from(["official", "paper"])
relaxed = settings(deadline=None, max_examples=40)


def grid_of(geometry: str) -> Grid:
    return Grid(Grid.Config.model_validate({"geometry": geometry}))


# ---------------------------------------------------------------------------------------------------------------------
# laws


def test_it_is_the_registered_strategy() -> None:
    assert registry.load("concat", "grid") is Grid


@relaxed
@given(shapes, st.integers(0, 30), dtypes, leads, geometries, st.sampled_from([0, 255]))
def test_what_is_accepted_comes_back_voxel_for_voxel(
    shape: Triple, extra: int, dtype: torch.dtype, lead: tuple[int, ...], geometry: str, fill: int
) -> None:
    grid = grid_of(geometry)
    canvas = grid.smallest_canvas(shape) + extra
    try:
        layout = grid.plan(shape, canvas)
    except UsageError:
        assume(False)  # a larger canvas may cut rims; those refusals are proven right below
    volumes = numbered((*lead, *shape) if canvas < 600 else shape, dtype)
    before = volumes.clone()
    canvases = grid.forward(volumes, layout, fill)
    back = grid.inverse(canvases, layout)
    assert canvases.shape == (*volumes.shape[:-3], 1, canvas, canvas)
    assert (back.dtype, canvases.dtype) == (dtype, dtype)
    assert torch.equal(back, volumes)
    assert torch.equal(volumes, before)
    # Nothing but the voxels and the fill is on the canvas.
    assert int((canvases != fill).sum()) == int((volumes != fill).sum())


@settings(deadline=None, max_examples=300)
@given(shapes, st.integers(1, 1300))
def test_each_refusal_is_right_and_each_acceptance_too(shape: Triple, canvas: int) -> None:
    reason = what_is_lost(shape, canvas)
    if not reason:
        assert Grid().plan(shape, canvas).lossless
        return
    with pytest.raises(UsageError, match=reason) as caught:
        Grid().plan(shape, canvas)
    message = str(caught.value)
    assert "x".join(map(str, shape)) in message
    assert f"{canvas}x{canvas} pixels" in message
    assert f"tuning.canvas={Grid().smallest_canvas(shape)}" in message


@settings(deadline=None, max_examples=150)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)))
def test_the_smallest_canvas_is_the_smallest_that_loses_nothing(shape: Triple) -> None:
    smallest = Grid().smallest_canvas(shape)
    assert what_is_lost(shape, smallest) == ""
    assert all(what_is_lost(shape, canvas) for canvas in range(1, smallest))
    assert Grid().smallest_canvas(shape) == smallest


@settings(deadline=None, max_examples=200)
@given(toy_shapes, st.integers(14, 80), st.sampled_from([0, 255]))
def test_it_equals_a_plain_loop_over_tiles_even_where_voxels_are_lost(shape: Triple, canvas: int, fill: int) -> None:
    grid = Grid()
    layout = grid.plan(shape, canvas, overflow="official")
    volume = numbered(shape, torch.int64)
    laid = grid.forward(volume, layout, fill)
    assert torch.equal(laid[0], plain_forward(volume, canvas, fill))
    back = grid.inverse(laid, layout)
    assert torch.equal(back, plain_inverse(laid[0], shape))
    assert layout.lossless == torch.equal(back, volume)


@relaxed
@given(toy_shapes, dtypes, leads, st.permutations([-3, -2, -1]), st.integers(0, 3), st.integers(1, 2))
def test_how_memory_holds_a_volume_changes_nothing(
    shape: Triple, dtype: torch.dtype, lead: tuple[int, ...], order: list[int], offset: int, step: int
) -> None:
    grid = Grid()
    layout = grid.plan(shape, grid.smallest_canvas(shape))
    # A view that starts somewhere in memory, passes over voxels and has its axes in any order.
    held = [shape[axis] for axis in order]
    memory = numbered((*lead, held[0], held[1], offset + step * held[2]), dtype)[..., offset::step]
    volumes = memory.permute(*range(len(lead)), *(len(lead) + order.index(axis) for axis in (-3, -2, -1)))
    assert volumes.shape == (*lead, *shape)
    canvases = grid.forward(volumes, layout, 255)
    assert torch.equal(canvases, grid.forward(volumes.clone(memory_format=torch.contiguous_format), layout, 255))
    assert torch.equal(grid.inverse(canvases, layout), volumes)
    for volume, canvas in zip(volumes.reshape(-1, *shape), canvases.flatten(0, -3), strict=True):
        assert torch.equal(canvas, plain_forward(volume, layout.canvas, 255))


@relaxed
@given(toy_shapes, leads)
def test_the_inverse_is_the_gradient_of_the_layout_and_the_other_way_round(
    shape: Triple, lead: tuple[int, ...]
) -> None:
    grid = Grid()
    layout = grid.plan(shape, Grid().smallest_canvas(shape) + 3, overflow="official")
    assume(layout.lossless)
    volumes = torch.randn(*lead, *shape, dtype=torch.float64, requires_grad=True)
    canvases = grid.forward(volumes, layout, 0)
    weights = torch.randn_like(canvases)
    (gradient,) = torch.autograd.grad((canvases * weights).sum(), volumes)
    assert torch.equal(gradient, grid.inverse(weights, layout))

    canvases = torch.randn_like(canvases, requires_grad=True)
    loads = torch.randn(*lead, *shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((grid.inverse(canvases, layout) * loads).sum(), canvases)
    assert torch.equal(gradient, grid.forward(loads, layout, 0))


def test_class_axes_before_the_canvas_axis_are_kept() -> None:
    grid, shape = Grid(), (5, 4, 7)
    layout = grid.plan(shape, 20)
    logits = torch.randn(2, 3, 1, 20, 20)
    volumes = grid.inverse(logits, layout)
    assert volumes.shape == (2, 3, *shape)
    assert torch.equal(volumes[1, 2], grid.inverse(logits[1, 2], layout))


@pytest.mark.parametrize("shape", [(6, 4, 5), (9, 9, 3)])
def test_volumes_held_slices_first_give_the_same_canvas(shape: Triple) -> None:
    grid = Grid()
    layout = grid.plan(shape, Grid().smallest_canvas(shape))
    volume = numbered((2, *shape), torch.float32)
    slices_first = volume.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    assert torch.equal(grid.forward(slices_first, layout, 0), grid.forward(volume, layout, 0))


def test_it_stays_on_the_device_of_its_input() -> None:
    grid, shape = Grid(), (5, 4, 7)
    layout = grid.plan(shape, 20)
    canvases = grid.forward(torch.empty(2, *shape, device="meta"), layout, 0)
    assert canvases.device.type == grid.inverse(canvases, layout).device.type == "meta"


@relaxed
@given(shapes)
def test_the_papers_grid_has_the_ceiling_of_the_root_on_each_side_and_blanks_at_the_end(shape: Triple) -> None:
    grid = grid_of("paper")
    per_side = ceil(sqrt(shape[2]))
    smallest = grid.smallest_canvas(shape)
    assert smallest == per_side * max(shape[:2])
    layout = grid.plan(shape, smallest)
    assert (layout.rows.count, layout.cols.count, layout.lead) == (per_side, per_side, 0)
    with pytest.raises(UsageError, match=f"tuning.canvas={smallest}"):
        grid.plan(shape, smallest - 1)


def test_both_geometries_differ_in_blank_slices_only_on_the_cubes_of_the_paper() -> None:
    volume = numbered((96, 96, 96), torch.float32)
    official, paper = (g.forward(volume, g.plan((96, 96, 96), 960), -1) for g in (Grid(), grid_of("paper")))
    assert torch.equal(official[0, :96, : 2 * 96], torch.full((96, 192), -1.0))
    assert torch.equal(paper[0, :96, :96], official[0, :96, 192:288])


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 4), (4, 4, -1)])
def test_shapes_that_are_no_volumes_are_refused(shape: Triple) -> None:
    with pytest.raises(UsageError, match="at least one voxel a side"):
        Grid().plan(shape, 64)


def test_tensors_and_layouts_of_another_plan_are_refused() -> None:
    grid = Grid()
    layout = grid.plan((5, 4, 7), 20)
    with pytest.raises(UsageError, match="volumes of shape"):
        grid.forward(torch.zeros(4, 5, 7), layout, 0)
    with pytest.raises(UsageError, match="canvases of shape"):
        grid.inverse(torch.zeros(1, 21, 21), layout)
    with pytest.raises(UsageError, match="own `plan` returned"):
        grid.forward(torch.zeros(5, 4, 7), Layout((5, 4, 7), 20), 0)


def test_a_layout_is_a_value() -> None:
    first, second = Grid().plan((5, 4, 7), 20), Grid().plan((5, 4, 7), 20, draw=3)
    assert first == second
    assert hash(first) == hash(second)
    assert isinstance(first, GridLayout)
