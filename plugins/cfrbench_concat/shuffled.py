"""The grid with its slices in random order (Section IV, Figure 4): what is lost without the order of slices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cfrbench.contracts import ConcatStrategy
from cfrbench.hookspecs import hookimpl
from cfrbench.sampling import generator
from cfrbench.tiling import GridLayout, Tiled


class Shuffled(Tiled):
    """Every slice on a random tile, a new order for each ``draw``; exact.

    ``shuffle_2d`` of ``Spread_bs_aug`` (ShumengLI/CFR code/utils/util.py) permutes exactly 64 slices, fails on fewer
    and drops the rest of more; here all slices are shuffled, however many there are. The official code has no such
    switch for prediction; here a prediction sees a shuffled canvas too, always that of draw 0.
    """

    name = "shuffled"

    def arrange(self, layout: GridLayout, draw: int) -> GridLayout:
        """A permutation that depends on ``draw`` and the number of slices."""
        return in_order(layout, generator(draw, "concat-shuffled", 0).permutation(layout.shape[2]).tolist())


def in_order(layout: GridLayout, order: Sequence[int]) -> GridLayout:
    """``layout`` with slice ``order[t]`` on its t-th tile."""
    return replace(layout, tiles=tuple((np.argsort(order) + layout.lead).tolist()))


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Shuffled]
