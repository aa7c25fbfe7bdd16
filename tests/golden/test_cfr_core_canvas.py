"""Parity with the official concatenation, its inverse, its canvas turns and its intensity curves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfrbench.canvas import rotflip_canvas, undo_rotflip_canvas
from cfrbench.config import Triple
from cfrbench.errors import UsageError
from cfrbench.intensity import bend_slices, bezier_curve, bezier_map, bezier_points
from cfrbench.tiling import GridLayout
from cfrbench.volume import IGNORE
from cfrbench_concat.grid import Grid
from tests.golden.formula import book, formula_image, formula_label, sha256, shape_at
from tests.golden.official_draws import Bend, draw_either, draw_fixed, draw_points, draw_rising

CASES = sorted({key.split("/")[1] for key in book.keys("cat/")})
INVERTED = sorted({key.split("/")[1] for key in book.keys("inv/")})
KINDS = ("np", "torch")
RATE = 0.5  # of every recorded intensity mode unless its name says otherwise
EXACT = 1e-12


def shape_of(case: str) -> Triple:
    return shape_at(f"cat/{case}/shape")


def side_of(case: str) -> int:
    return int(book.take(f"cat/{case}/input_size"))


def usable(case: str) -> bool:
    """Whether the official code returned a whole image."""
    arrays = book.arrays
    shapes = [arrays.get(f"cat/{case}/{kind}/out_shape", np.zeros(1)) for kind in KINDS]
    return all(0 not in shape for shape in shapes)


def parameters(layout: GridLayout) -> list[int]:
    """The layout as the official nine numbers, in the order the file names them."""
    rows, cols = layout.rows, layout.cols
    values = {
        "n_row": rows.count, "n_col": cols.count, "pw": rows.pad, "ph": cols.pad, "ps": layout.lead,
        "pww": rows.margin, "phh": cols.margin, "s_l": rows.tile, "s_w": cols.tile,
    }  # fmt: skip
    return [values[str(name)] for name in book.take("param_names")]


@pytest.mark.parametrize("case", [case for case in CASES if usable(case)])
def test_concatenation(case: str) -> None:
    shape, side, grid = shape_of(case), side_of(case), Grid()
    layout = grid.plan(shape, side, overflow="official")
    image = grid.forward(formula_image(shape).float(), layout, 0)
    label = grid.forward(formula_label(shape), layout, IGNORE)
    for kind in KINDS:
        assert book.take(f"cat/{case}/{kind}/status") == "ok"
        assert parameters(layout) == book.take(f"cat/{case}/{kind}/params").tolist()
        assert list(image.shape) == book.take(f"cat/{case}/{kind}/out_shape").tolist()
        assert sha256(image) == book.take(f"cat/{case}/{kind}/image_sha256")
        assert sha256(label) == book.take(f"cat/{case}/{kind}/label_sha256")
    stored = stored_parts(case)
    assert stored
    for name, part in stored.items():
        assert np.array_equal(part(image[0], label[0]), book.take(f"cat/{case}/{name}")), name


def stored_parts(case: str) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """How to get each part of the canvases that the file stores for ``case``."""

    def corner(name: str) -> tuple[int, int]:
        height, width = book.arrays[f"cat/{case}/{name}"].shape
        return height, width

    def top_left(canvas: Tensor, name: str) -> Tensor:
        height, width = corner(name)
        return canvas[:height, :width]

    def bottom_right(canvas: Tensor, name: str) -> Tensor:
        height, width = corner(name)
        return canvas[-height:, -width:]

    parts: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "vol": lambda image, label: formula_image(shape_of(case)),
        "lab": lambda image, label: formula_label(shape_of(case)),
        "image": lambda image, label: image,
        "label": lambda image, label: label,
        "image_tl": lambda image, label: top_left(image, "image_tl"),
        "label_tl": lambda image, label: top_left(label, "label_tl"),
        "image_br": lambda image, label: bottom_right(image, "image_br"),
        "label_br": lambda image, label: bottom_right(label, "label_br"),
        "image_rowsum": lambda image, label: image.long().sum(1),
        "image_colsum": lambda image, label: image.long().sum(0),
        "n_label255": lambda image, label: (label == IGNORE).sum(),
    }
    return {name: part for name, part in parts.items() if book.has(f"cat/{case}/{name}")}


def test_where_the_official_code_crashes_or_returns_nothing_ours_is_lossless_or_refuses() -> None:
    for case in CASES:  # not parametrised: a file without such cases is right as well, and nothing is to be skipped
        if not usable(case):
            check_defective(case)


def check_defective(case: str) -> None:
    shape, side, grid = shape_of(case), side_of(case), Grid()
    image = formula_image(shape)
    for name, part in stored_parts(case).items():
        assert name in ("vol", "lab"), "a defective case has no canvas"
        assert np.array_equal(part(image, image), book.take(f"cat/{case}/{name}"))
    for kind in KINDS:
        crashed = book.take(f"cat/{case}/{kind}/status") != "ok"
        empty = book.has(f"cat/{case}/{kind}/out_shape") and 0 in book.take(f"cat/{case}/{kind}/out_shape")
        assert crashed or empty
    if max(shape[:2]) > side:
        with pytest.raises(UsageError, match="not a single tile fits"):
            grid.plan(shape, side, overflow="official")
        return
    layout = grid.plan(shape, side, overflow="official")
    assert (layout.rows.margin < 0) != (layout.cols.margin < 0), "the known cause is margins of mixed signs"
    for kind in KINDS:
        if book.has(f"cat/{case}/{kind}/params"):
            assert parameters(layout) == book.take(f"cat/{case}/{kind}/params").tolist()
    if layout.lossless:
        assert grid.plan(shape, side) == layout
        assert torch.equal(grid.inverse(grid.forward(image, layout, 0), layout), image)
    else:
        with pytest.raises(UsageError, match="smallest canvas"):
            grid.plan(shape, side)


@pytest.mark.parametrize("case", INVERTED)
def test_inverse(case: str) -> None:
    shape, grid = shape_of(case), Grid()
    layout = grid.plan(shape, side_of(case), overflow="official")
    image = formula_image(shape).float()
    threshold = float(book.take(f"inv/{case}/thr"))
    assert threshold == np.floor(np.median(image.numpy())) + 0.5

    canvas = grid.forward(image, layout, 0)
    logits = torch.stack([torch.zeros_like(canvas), canvas - threshold])  # (C, 1, S, S), the recorded fake network
    soft = grid.inverse(logits.softmax(0), layout)
    predicted = grid.inverse(logits.argmax(0).float(), layout)

    wrong = predicted != (image > threshold)
    assert sha256(predicted) == book.take(f"inv/{case}/pred_sha256")
    assert np.array_equal(np.unique(predicted), book.take(f"inv/{case}/pred_unique"))
    assert int(wrong.sum()) == book.take(f"inv/{case}/n_mismatch")
    assert np.array_equal(wrong.sum((0, 1)), book.take(f"inv/{case}/slices_mismatch"))
    assert list(soft.shape) == book.take(f"inv/{case}/soft_shape").tolist()
    np.testing.assert_allclose(soft.double().sum((1, 2, 3)), book.take(f"inv/{case}/soft_sum"), rtol=1e-6)
    if book.has(f"inv/{case}/pred"):
        assert np.array_equal(predicted, book.take(f"inv/{case}/pred"))


# ---------------------------------------------------------------------------------------------------------------------
# turns of a canvas


@pytest.mark.parametrize("key", [key for key in book.keys("rf2d/") if key != "rf2d/in"])
def test_rotflip_canvas(key: str) -> None:
    k, axis = (int(n) for n in key.removeprefix("rf2d/").split("_"))
    canvas = torch.from_numpy(book.take("rf2d/in"))
    turned = rotflip_canvas(canvas, k, axis)
    assert np.array_equal(turned, book.take(key))
    assert torch.equal(undo_rotflip_canvas(turned, k, axis), canvas)


# ---------------------------------------------------------------------------------------------------------------------
# intensity curves


def bent(values: NDArray[Any], bend: Bend | None) -> NDArray[Any]:
    return values if bend is None else bezier_map(values, bend.points, bend.monotone)


BEZIER_SEEDS = sorted(int(key.split("/")[1].removeprefix("s")) for key in book.keys("bez/s") if key.endswith("points"))


@pytest.mark.parametrize("seed", BEZIER_SEEDS)
def test_curve(seed: int) -> None:
    points = draw_points(random.Random(seed))
    assert np.array_equal(points, book.take(f"bez/s{seed}/points"))
    curve = book.take(f"bez/s{seed}/curve100")
    np.testing.assert_allclose(bezier_curve(points, nodes=curve.shape[1]), curve, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", BEZIER_SEEDS)
@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("r2_t", lambda source: Bend(draw_points(source), "both")),
        ("r1_prob1", lambda source: draw_either(source, 1.0)),
        ("r2_prob1", lambda source: draw_rising(source, 1.0)),
        ("r1_prob05", lambda source: draw_either(source, RATE)),
        ("r2_prob05", lambda source: draw_rising(source, RATE)),
        # The file's description names these points; only the choice of what is sorted is drawn.
        ("r3", lambda source: Bend(bezier_points([0.2, 0.9, 0.7, 0.3]), "x" if source.random() < 0.5 else "both")),
        ("r4", lambda source: draw_fixed(source, RATE)),
    ],
)
def test_map(seed: int, name: str, draw: Callable[[random.Random], Bend | None]) -> None:
    expected = book.take(f"bez/s{seed}/{name}")
    np.testing.assert_allclose(bent(book.take("bez/x"), draw(random.Random(seed))), expected, rtol=0, atol=EXACT)


def augmented_input() -> Tensor:
    """The recorded input of the intensity modes: v / 100 - 1 in float32."""
    return torch.from_numpy(book.take("aug/vol")).float() / 100 - 1


def laid_out(volume: Tensor) -> Tensor:
    shape: Triple = (volume.shape[0], volume.shape[1], volume.shape[2])
    layout = Grid().plan(shape, int(book.take("aug/input_size")), overflow="official")
    return Grid().forward(volume, layout, 0)[0]


def test_input_of_the_modes() -> None:
    volume, label = book.take("aug/vol"), book.take("aug/lab")
    assert np.array_equal(formula_image(volume.shape), volume)
    assert np.array_equal(formula_label(label.shape), label)


@pytest.mark.parametrize(("mode", "draw"), [("nt1", draw_either), ("nt2", draw_rising)])
def test_clamping_modes(mode: str, draw: Callable[[random.Random, float], Bend | None]) -> None:
    volume = augmented_input()
    before = volume.clone()
    source = random.Random(int(book.take("aug/nt_seed")))
    bends = [draw(source, RATE) for _ in range(volume.shape[-1])]
    result = volume[None]
    for monotone in ("both", "x"):  # disjoint sets of slices, each in one call of the library
        chosen = np.array([[bend is not None and bend.monotone == monotone for bend in bends]])
        points = np.array([bend.points for bend in bends if bend is not None and bend.monotone == monotone])
        result = bend_slices(result, chosen, points, lambda values, p, m=monotone: bezier_map(values, p, m))  # type: ignore[misc]
    assert np.array_equal(laid_out(result[0]), book.take(f"aug/{mode}/image"))
    assert torch.equal(volume, before)


def test_input_is_left_alone_where_the_original_writes_into_it() -> None:
    assert book.take("aug/nt2/input_was_modified_in_place"), "the trap is documented in the file"
    volume = augmented_input()[None]
    before = volume.clone()
    everything = np.ones((1, volume.shape[-1]), dtype=bool)
    result = bend_slices(volume, everything, bezier_points(np.full((volume.shape[-1], 4), 0.5)))
    assert torch.equal(volume, before)
    assert not torch.equal(result, before)


@pytest.mark.parametrize(
    ("mode", "top", "draw"), [("nt4", 1.0, draw_either), ("nt5", 1.0, draw_rising), ("nt6", 2.0, draw_fixed)]
)
def test_scaling_modes(mode: str, top: float, draw: Callable[[random.Random, float], Bend | None]) -> None:
    volume = augmented_input().numpy()
    source = random.Random(int(book.take("aug/nt_seed")))
    low, high = volume.min((0, 1)), volume.max((0, 1))
    scaled = (volume - low) / (high - low) * np.float32(top)  # every slice, bent or not
    slices = [bent(scaled[..., z], draw(source, RATE)) for z in range(volume.shape[-1])]
    canvas = laid_out(torch.from_numpy(np.stack(slices, axis=-1)).float()).numpy()
    standardised = (canvas - canvas.mean()) / canvas.std()
    # Means and deviations over the canvas were taken in float32.
    np.testing.assert_allclose(standardised, book.take(f"aug/{mode}/image"), rtol=0, atol=2e-6)
