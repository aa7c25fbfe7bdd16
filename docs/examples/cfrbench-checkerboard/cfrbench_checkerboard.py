"""A checkerboard of two volumes: the lower and the upper half of the slices, each on fields of its own colour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import GridLayout, Tiled


class Checkerboard(Tiled):
    """The lower half of the slices on the black fields, the upper half on the white ones, each in order; exact."""

    name = "checkerboard"

    def arrange(self, layout: GridLayout, draw: int) -> GridLayout:
        tiles = np.arange(layout.places)
        white = (tiles // layout.cols.count + tiles % layout.cols.count) % 2 == 1
        # A number beyond the last tile says that a slice has none; the volume is then refused, with what would fit.
        beyond = np.arange(layout.places, layout.places + layout.shape[2])
        lower, upper = np.append(tiles[~white], beyond), np.append(tiles[white], beyond)
        half = (layout.shape[2] + 1) // 2
        return replace(layout, tiles=(*lower[:half].tolist(), *upper[: layout.shape[2] - half].tolist()))


@hookimpl
def concat_strategies():
    return [Checkerboard]
