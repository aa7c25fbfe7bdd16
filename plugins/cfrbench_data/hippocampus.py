"""Task04 of the Medical Segmentation Decathlon: hippocampus in MR, small enough for a laptop.

With the task's ``dataset.json``, or without it: a folder ``images`` and one of ``labels``, as some copies of it are
passed around. Intensities differ by a factor of 1000 between cases, so each volume is normalised on its own
(`grid.standardise`). Three cases of the whole folder are left out: one has no label, and the images of two are no crops
as the others are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from cfrbench.contracts import DataSource
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.label_maps import LabelMap, of_names
from cfrbench.prepared.places import Layout
from cfrbench_data.msd import Decathlon

CLASSES = ("background", "anterior", "posterior")


class Hippocampus(Decathlon):
    """260 usable pairs."""

    name = "hippocampus"
    title = "Hippocampus"
    modality = "MR"
    origin = "http://medicaldecathlon.com, Task04"
    class_names = CLASSES
    budgets: ClassVar = {"scarce": 1, "moderate": 4}

    def excluded(self) -> Mapping[str, str]:
        """Cases whose files are not what the others are."""
        return {"hippocampus_118": "has no label", "hippocampus_010": "its image is no crop",
                "hippocampus_281": "its image is no crop"}  # fmt: skip

    def labels_of(self, layout: Layout) -> LabelMap:
        """Values are the task's, with or without its file."""
        return of_names(dict(enumerate(CLASSES)))

    def _stated(self) -> tuple[str, ...]:
        """Classes are known; no file need be read for them."""
        return CLASSES


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The hippocampus task."""
    return [Hippocampus]
