"""The grid along a path without jumps: consecutive slices always stand side by side. Not in the paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Frozen
from cfrbench.contracts import ConcatStrategy
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import GridLayout, Tiled

Numbers = NDArray[np.int64]


class Boustrophedon(Tiled):
    """Rows read in turn from left and from right, as an ox ploughs, or a spiral; exact.

    In the paper's grid the last slice of a row and the first of the next are a canvas apart. Here they share an edge,
    so that whatever a model gains from neighbouring slices it gains everywhere.
    """

    name = "boustrophedon"

    class Config(Frozen):
        """path: ``rows`` turns at the end of each row, ``spiral`` runs clockwise from the rim to the middle."""

        path: Literal["rows", "spiral"] = "rows"

    config: Config

    def arrange(self, layout: GridLayout, draw: int) -> GridLayout:
        """The tiles along the path, as many blank ones in front as the grid has."""
        numbers = np.arange(layout.places).reshape(layout.rows.count, layout.cols.count)
        path = spiral(numbers) if self.config.path == "spiral" else winding(numbers)
        # Slices that have no tile, which only `overflow="official"` allows, go on counting beyond the last.
        path = np.append(path, np.arange(layout.places, layout.lead + layout.shape[2]))
        return replace(layout, tiles=tuple(path[layout.lead : layout.lead + layout.shape[2]].tolist()))


def winding(numbers: Numbers) -> Numbers:
    """Rows of ``numbers`` one after the other, every second one backwards."""
    turned = numbers.copy()
    turned[1::2] = turned[1::2, ::-1]
    return turned.ravel()


def spiral(numbers: Numbers) -> Numbers:
    """``numbers`` clockwise from the upper left corner to the middle."""
    sides = []
    while numbers.size:
        sides.append(numbers[0])
        numbers = np.rot90(numbers[1:])
    return np.concatenate(sides)


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Boustrophedon]
