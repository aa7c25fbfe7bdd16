"""MACT, the multi-organ abdominal CT reference standard: 43 TCIA Pancreas-CT and 47 BTCV scans, 8 organs.

Labels are Zenodo record 1169361 (Gibson et al. 2018); images come from their owners. `VALUES` maps the record's values
to the paper's columns; the other organs are annotated in BTCV scans only and count as background. Annotation may be
incomplete outside the box that the record's ``cropping.csv`` gives of each scan, so a scan is cut to it first, if the
table lies beside the label folders.

The field's h5 files are MagicNet's, numbered 0001 to 0090; to which scans the numbers belong, and how the files were
made, is not published. The paper says "same as MagicNet": spacing and normalisation are those of BTCV, windows an
option. CFR's 70/20 lists are unpublished too: ``plain`` is our own convention, ``magicnet-fold1`` to ``4`` MagicNet's
four-fold cross-validation.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from cfrbench.config import Triple
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.arrays import ArrayReading
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.nifti import nib
from cfrbench.prepared.pair_reader import Reading, read_pair
from cfrbench.prepared.places import Layout, h5_layout, npy_layout
from cfrbench.prepared.proposals import propose
from cfrbench.prepared.public import PublicSource
from cfrbench.prepared.writing import CaseJob, RawCase, scaled
from cfrbench.scan_steps import ScanSteps

SHIPPED = Path(__file__).parent / "splits"
SPACING_MM = (1.5, 1.5, 2.0)
ARRAYS = ArrayReading(spacing_mm=SPACING_MM)
TYPICAL = (230, 200, 130)
CLASSES = ("background", "spleen", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "pancreas",
           "duodenum")  # fmt: skip
#: value in the record -> column of the paper; 2, 8, 9, 10, 12, 13 are annotated in BTCV scans only
VALUES = {0: 0, 1: 1, 3: 2, 4: 3, 5: 4, 6: 5, 7: 6, 11: 7, 14: 8}
EXTENTS = (("extent_left", "extent_right"), ("extent_ant", "extent_post"), ("extent_inf", "extent_sup"))
#: PANCREAS_0025 has been withdrawn from TCIA's collection
WITHDRAWN = "tcia-0025"

PAPER: dict[str, Any] = {
    "training.patch": (96, 96, 96),
    "training.steps": 30000,  # MagicNet, to which the paper refers
    "training.lr": 0.01,
    "training.lr_policy": "step",
    "training.rotflip": False,
    "inference.stride_xy": 12,  # ShumengLI/CFR; MagicNet 16
    "inference.stride_z": 12,
}


class BoxReading(Reading):
    """How a scan of the record is read."""

    box: Literal["table", "none"] = Field("table", description="cut to its box in cropping.csv, if that is there")


def read_boxed(job: CaseJob, scratch: Path) -> RawCase:
    """Read a pair, to be cut to its box in ``cropping.csv``; DataError if the box misses most of what is labelled."""
    reading = BoxReading.model_validate(dict(job.options))
    plain = reading.model_dump(exclude={"box"})
    raw = read_pair(replace(job, options=plain), scratch)
    if reading.box == "none" or "boxes" not in job.files:
        return raw
    start, stop = box_of(job.files["boxes"], job.case, raw)
    if raw.label is not None:
        wanted = [value for value in VALUES if value]
        full = np.isin(np.round(scaled(raw.label, raw.label_scale)), wanted)
        inside = full[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))].sum()
        if 2 * inside < full.sum():
            raise DataError(f"{job.files['boxes']}: the box of {job.case} holds {inside} of {full.sum()} labelled "
                            "voxels, so it is not of this scan, or counted along other axes. Go on without: --set "
                            "box=none.")  # fmt: skip
    return replace(raw, box=(start, stop), words=("cut to cropping.csv",))


def box_of(table: Path, case: str, raw: RawCase) -> tuple[Triple, Triple]:
    """Start and stop of a scan's box on the axes of ``raw``.

    The table counts columns, rows and slices of the DICOM image: from the patient's right, front and foot (LPS axes),
    as the public conversion scripts use it.
    """
    publisher, number = case.split("-")
    row = next((row for row in _rows(table) if row["publisher"].lower().startswith(publisher)
                and row["original_id"].zfill(4) == number), None)  # fmt: skip
    if row is None:
        raise DataError(f"{table} has no box of {case}. Go on without: --set box=none.")
    sides = raw.image.shape
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("LPS"),
                                           nib.orientations.axcodes2ornt(raw.axcodes))  # fmt: skip
    start, stop = [0, 0, 0], [0, 0, 0]
    for names, (axis, sign) in zip(EXTENTS, turn, strict=True):
        side = sides[int(axis)]
        low, high = (min(max(int(float(row[name])), 0), side) for name in names)
        start[int(axis)], stop[int(axis)] = (low, high) if sign > 0 else (side - high, side - low)
    if any(a >= b for a, b in zip(start, stop, strict=True)):
        raise DataError(f"{table}: the box of {case} is empty on its {sides} voxels. Go on without: --set box=none.")
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def _rows(table: Path) -> list[dict[str, str]]:
    needed = {"publisher", "original_id", *(name for pair in EXTENTS for name in pair)}
    try:
        rows = list(csv.DictReader(table.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table: {error}. Fetch it again from the record.") from error
    if not rows or not needed <= rows[0].keys():
        raise DataError(f"{table} lacks the columns {', '.join(sorted(needed))}. Fetch it again from the record.")
    return rows


def _raw(source: str, *images: str) -> Layout:
    """The record's labels of one source, each with its image elsewhere."""
    place = f"label_{source}_multiorgan/label{{case}}"
    return Layout("raw", ("label", (place, f"*/{place}")), read_boxed, BoxReading(),
                  {"image": images, "boxes": ("../cropping.csv", "../../cropping.csv")}, ids=r"\d{4}",
                  prefix=f"{source}-", steps=ScanSteps(spacing_mm=SPACING_MM, normalise="zscore"),
                  labels=LabelMap(names=CLASSES, values=VALUES, other=0))  # fmt: skip


class Mact(PublicSource):
    """90 scans; 70 for training and 20 for testing in the paper."""

    class Config(PublicSource.Config):
        """Which lists count."""

        split: Literal["plain", "magicnet-fold1", "magicnet-fold2", "magicnet-fold3", "magicnet-fold4"] = Field(
            "plain", description="plain: 0001-0070 and 0071-0090, ours; of folds 2 to 4 the training order is ours too"
        )

    config: Config
    name = "mact"
    title = "MACT"
    modality = "CT"
    licence = "labels CC BY 4.0; images under the terms of TCIA Pancreas-CT and of Synapse"
    origin = "https://zenodo.org/records/1169361 with TCIA Pancreas-CT and BTCV, or MagicNet's h5 files"
    class_names = CLASSES
    budgets: ClassVar = {"scarce": 1, "moderate": 14}
    layouts = (
        h5_layout("{case}", "MACT_h5/{case}", reading=ARRAYS, ids=r"\d{4}"),
        npy_layout("{case}_image", "npy/{case}_image", reading=ARRAYS, ids=r"\d{4}"),
        _raw("tcia", "../image_tcia_multiorgan/img{case}", "../image_tcia_multiorgan/PANCREAS_{case}",
             "../Pancreas-CT/PANCREAS_{case}", "../Pancreas-CT/Pancreas_{case}"),
        _raw("btcv", "../image_btcv_multiorgan/img{case}", "../RawData/Training/img/img{case}",
             "../RawData/Testing/img/img{case}"),
    )  # fmt: skip
    id_pattern = r"(tcia-|btcv-)?\d{4}"
    lists: ClassVar = {"train": SHIPPED / "mact_train.txt", "test": SHIPPED / "mact_test.txt"}
    protocols: ClassVar = {**propose([TYPICAL]), "paper": PAPER}

    def shipped(self) -> Mapping[str, Path]:
        """The lists chosen; of folds 2 to 4 only the test list is known."""
        if self.config.split == "plain":
            return self.lists
        fold = self.config.split.removeprefix("magicnet-")
        return {role: SHIPPED / f"mact_magicnet_{fold}_{role}.txt" for role in ("train", "test")}

    def excluded(self) -> Mapping[str, str]:
        """The withdrawn scan, for whoever still has it: results with it cannot be repeated."""
        return {WITHDRAWN: "withdrawn from TCIA Pancreas-CT"}

    def patient_of(self, case: str) -> str:
        """A scan is a patient."""
        return re.sub(r"\W", "", case)


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The MACT source."""
    return [Mact]
