"""The paper's concatenation (Section III-B): slices side by side, row by row, on one square canvas."""

from __future__ import annotations

from cfrbench.config import Frozen
from cfrbench.contracts import ConcatStrategy
from cfrbench.hookspecs import hookimpl
from cfrbench.tiling import Geometry, Tiled


class Grid(Tiled):
    """Rows of slices on one canvas; exact. Geometry: `cfrbench.tiling`."""

    name = "grid"

    class Config(Frozen):
        """geometry: ``official`` fits as many tiles as the canvas takes, ``paper`` exactly ceil(sqrt(D)) a side."""

        geometry: Geometry = "official"

    config: Config

    @property
    def geometry(self) -> Geometry:
        """As the option says."""
        return self.config.geometry


@hookimpl
def concat_strategies() -> list[type[ConcatStrategy]]:
    """The hook of this kind."""
    return [Grid]
