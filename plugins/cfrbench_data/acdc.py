"""ACDC, cine MR of the heart at end-diastole and end-systole: the challenge's NIfTI files, or the h5 volumes of
SSL4MIS and WSL4MIS.

Lists name patients, because repositories number the two frames of a patient differently (01 and 02, or the frames'
own numbers); a patient's frames stand together, in rising order. The h5 files hold slices first and no voxel size: a
voxel then counts 1 mm along each axis. They were clipped at the 99th percentile and scaled to [0, 1]; from the
challenge's files the clip is repeated, the scaling is left to `grid.standardise`, which undoes any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from cfrbench.contracts import DataSource
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.arrays import ArrayReading
from cfrbench.prepared.pair_reader import Reading, read_pair
from cfrbench.prepared.places import Layout, h5_layout
from cfrbench.prepared.proposals import propose
from cfrbench.prepared.public import PublicSource
from cfrbench.scan_steps import ScanSteps
from cfrbench.volume import Split

SHIPPED = Path(__file__).parent / "splits"  # patients only: SSL4MIS data/ACDC/{train,val,test}.list
FRAME = r"patient\d{3}_frame\d{2}"
SLICES_FIRST = ArrayReading(axes=(1, 2, 0))
TYPICAL = (216, 232, 9)


class Acdc(PublicSource):
    """100 patients, two volumes each: 70 patients for training, 10 for validation, 20 for testing."""

    name = "acdc"
    title = "ACDC"
    modality = "cine MR"
    licence = "research use after registration with the challenge"
    origin = "https://www.creatis.insa-lyon.fr/Challenge/acdc/, or the h5 files of github.com/HiLab-git/SSL4MIS"
    class_names = ("background", "right ventricle", "myocardium", "left ventricle")
    budgets: ClassVar = {"scarce": 1, "moderate": 14}
    layouts = (
        h5_layout("{case}", "ACDC_training_volumes/{case}", "data/{case}", reading=SLICES_FIRST, ids=FRAME),
        Layout("raw", ("image", ("*/{case}", "*/*/{case}", "*/*/*/{case}", "{case}")), read_pair, Reading(),
               {"label": ("{case}_gt",)}, ids=FRAME, steps=ScanSteps(clip_above=0.99)),
    )  # fmt: skip
    id_pattern = r"patient\d{3}"
    lists: ClassVar = {role: SHIPPED / f"acdc_{role}.txt" for role in ("train", "val", "test")}
    protocols: ClassVar = propose([TYPICAL])

    def members(self, cases: Collection[str]) -> Mapping[str, Sequence[str]]:
        """Patient -> frames."""
        found: dict[str, list[str]] = defaultdict(list)
        for case in sorted(cases):
            found[case.partition("_")[0]].append(case)
        return found

    def listed_split(self, cases: Collection[str], beside: Path) -> Split:
        """The split of the frames; its note counts patients."""
        split = super().listed_split(cases, beside)
        return replace(split, note=split.note.replace("cases", "patients"))


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The ACDC source."""
    return [Acdc]
