"""Parity with the official variants of the concatenation: scaled, shuffled, every slice turned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cfrbench.config import Triple
from cfrbench.contracts import ConcatStrategy, Layout
from cfrbench.volume import IGNORE
from cfrbench_concat.rotated import Rotated
from cfrbench_concat.scaled import Scaled
from cfrbench_concat.shuffled import Shuffled, in_order
from tests.golden.formula import book, formula_image, formula_label, sha256, shape_at

SCALES = sorted({int(part) for key in book.keys("scale/") if (part := key.split("/")[1]).isdigit()})
SIDE = 1024  # stands in the description of the file
TOLERANCE = 1e-3  # as well


def scaled(n: int) -> tuple[Scaled, Layout]:
    """The strategy in its official form, and the layout of the one group that was recorded."""
    strategy, shape = Scaled(Scaled.Config(n=n, sampling="official")), shape_at("scale/shape")
    return strategy, strategy.starting_at([int(book.take(f"scale/{n}/start_index"))], shape, SIDE)


@pytest.mark.parametrize("n", SCALES)
def test_scaled_image(n: int) -> None:
    strategy, layout = scaled(n)
    image = strategy.forward(formula_image(layout.shape).float(), layout, 0)[0]
    step = SIDE // len(expected := book.take(f"scale/{n}/image_sub8"))
    np.testing.assert_allclose(image[::step, ::step], expected, rtol=0, atol=TOLERANCE)
    rows, cols = corner(n, expected := book.take(f"scale/{n}/tile0_last_cols"))
    np.testing.assert_allclose(image[rows, cols], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("n", SCALES)
def test_scaled_label(n: int) -> None:
    strategy, layout = scaled(n)
    label = strategy.forward(formula_label(layout.shape).to(torch.uint8), layout, IGNORE)[0]
    assert sha256(label) == book.take(f"scale/{n}/label_sha256")
    step = SIDE // len(expected := book.take(f"scale/{n}/label_sub4"))
    assert np.array_equal(label[::step, ::step], expected)
    rows, cols = corner(n, expected := book.take(f"scale/{n}/tile0_last_cols_label"))
    assert np.array_equal(label[rows, cols], expected)


def corner(n: int, part: NDArray[Any]) -> tuple[slice, slice]:
    """Where the file's piece of the first tile lies: rows from 4 on, the last columns."""
    height, width = part.shape
    return slice(4, 4 + height), slice(SIDE // n - width, SIDE // n)


@pytest.mark.parametrize("n", SCALES)
def test_scaled_parameters_and_start(n: int) -> None:
    strategy, layout = scaled(n)
    grid = strategy.plan(layout.shape, SIDE, overflow="official").grid
    values = {
        "n_row": grid.rows.count, "n_col": grid.cols.count, "pw": grid.rows.pad, "ph": grid.cols.pad, "ps": grid.lead,
        "pww": grid.rows.margin, "phh": grid.cols.margin, "s_l": grid.rows.tile, "s_w": grid.cols.tile,
    }  # fmt: skip
    assert [values[str(name)] for name in book.take("param_names")] == book.take(f"scale/{n}/params").tolist()
    # The starts among which training draws are those among which the original drew.
    starts = strategy.plan_training(layout.shape, SIDE).groups.starts[2]
    drawn = np.random.RandomState(int(book.take(f"scale/{n}/seed"))).randint(len(starts))
    assert starts[drawn] == book.take(f"scale/{n}/start_index")


def recorded(strategy: ConcatStrategy, layout: Layout, variant: str) -> None:
    """Image and label equal the file's, and both come back."""
    for name, fill in (("image", 0), ("label", IGNORE)):
        volume = torch.from_numpy(book.take("aug/vol" if name == "image" else "aug/lab"))
        canvas = strategy.forward(volume, layout, fill)
        assert np.array_equal(canvas[0], book.take(f"aug/{variant}/{name}"))
        assert torch.equal(strategy.inverse(canvas, layout), volume)


def augmented() -> tuple[Triple, int]:
    """Shape and canvas of the recorded variants."""
    height, width, depth = book.take("aug/vol").shape
    return (height, width, depth), int(book.take("aug/input_size"))


def test_shuffled() -> None:
    shape, side = augmented()
    order = np.random.RandomState(int(book.take("aug/shuffle/seed"))).permutation(shape[2])
    assert np.array_equal(order, book.take("aug/shuffle/perm"))
    strategy = Shuffled()
    recorded(strategy, in_order(strategy.plan(shape, side), order.tolist()), "shuffle")


def test_rotated() -> None:
    shape, side = augmented()
    source = np.random.RandomState(int(book.take("aug/rotflip/seed")))
    turns = tuple((int(source.randint(4)), int(source.randint(2))) for _ in range(shape[2]))
    assert np.array_equal(turns, book.take("aug/rotflip/k_axis"))
    strategy = Rotated()
    recorded(strategy, replace(strategy.plan(shape, side), turns=turns), "rotflip")
