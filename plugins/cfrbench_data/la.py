"""Left atrium in late gadolinium-enhanced MR: the 2018 Atrial Segmentation Challenge as the field uses it.

The files are those of ``yulequan/UA-MT`` (folder ``data/``): cropped around the atrium, 0.625 mm isotropic, z-scored
over the whole scan *before* the crop. UA-MT trains on them as they are, ``ShumengLI/CFR`` z-scores again; that choice
is ``grid.standardise``, so stored intensities are what is loaded.

The challenge's own scans (NRRD) go through `read_scan`, which does what ``yulequan/UA-MT``
``code/dataloaders/la_heart_processing.py`` does. It centres the crop on the ground truth, of test cases too, and draws
margins at random without a seed, so its very files cannot be made again; here the margins are a function of seed and
case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cfrbench.config import Frozen, Triple
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.arrays import ArrayReading
from cfrbench.prepared.form import SourceGrid
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.nrrd import read_nrrd_header, read_nrrd_voxels
from cfrbench.prepared.places import Layout, h5_layout
from cfrbench.prepared.public import PublicSource
from cfrbench.prepared.writing import CaseJob, RawCase, rows
from cfrbench.scan_steps import ScanSteps

SPACING_MM = (0.625, 0.625, 0.625)
FOLDER = "2018LA_Seg_Training Set"
#: where a case may lie under the data root: the challenge's layout, the same without its folder, AC-MT's renamed files
LAYOUTS = (f"{FOLDER}/{{case}}/mri_norm2.h5", "{case}/mri_norm2.h5", "{case}.h5")
SHIPPED = Path(__file__).parent / "splits"  # ids only: UA-MT data/train.list and data/test.list
CLASSES = ("background", "left atrium")

#: preset -> settings. paper: CFR paper section IV and ShumengLI/CFR code/train_retraining.py, test_singleclass.py
PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {
        "training.patch": (112, 112, 80),
        "training.steps": 6000,
        "training.lr": 0.01,
        "training.lr_policy": "step",
        "training.rotflip": True,
        "inference.stride_xy": 18,
        "inference.stride_z": 4,
    },
    # On a grid of half the resolution: 6 x 7 tiles of 80 x 64 pixels hold the 40 slices of a crop, nearly a whole
    # volume. Small turns and zooms stand for the variety that one labelled volume lacks; quarter turns and flips
    # hide where the atrium lies (mean pseudo-label Dice on 6 volumes, one label, 200 steps: 59 with them, 72 without,
    # 78 with the larger crop).
    "quick": {
        "grid.downsample": 2,
        "training.patch": (64, 64, 32),
        "training.steps": 400,
        "training.lr_policy": "poly-b",  # a decaying rate ends better in fewer steps
        "training.lr": 0.03,
        "training.rotflip": True,
        "tuning.patch": (80, 64, 40),
        "tuning.canvas": 480,
        "tuning.steps": 150,
        "model.lite-medsam.input_size": 224,  # its windows of 7 and 14 tokens need no padding, as they do at 256
        "tuning.rotflip": False,
        "tuning.rotflip_canvas": False,
        "tuning.rotation_degrees": 15.0,
        "tuning.zoom": 1.2,
        "inference.stride_xy": 20,
        "inference.stride_z": 16,
    },
    "smoke": {
        "grid.downsample": 4,
        "training.patch": (16, 16, 16),
        "training.rotflip": True,
        "tuning.patch": (16, 16, 16),
        "tuning.canvas": 64,
        "inference.stride_xy": 16,
        "inference.stride_z": 16,
    },
}


class AtriumReading(Frozen):
    """How a raw scan is cut; the defaults are UA-MT's."""

    cut: Literal["xy", "xyz", "none"] = Field(
        "xy", description="around the label; UA-MT computes limits in z and does not use them: 'xyz' does"
    )
    least_sides: Triple = Field((112, 112, 80), description="half of what the label's box lacks of it is added")
    margin_xy: tuple[int, int] = Field((10, 19), description="smallest and largest random margin at each side")
    margin_z: tuple[int, int] = (5, 9)
    seed: int = Field(0, ge=0, description="of the margins; the original has none")
    spacing_mm: tuple[float, float, float] = Field(SPACING_MM, description="where the file states none")


def read_scan(job: CaseJob, scratch: Path) -> RawCase:
    """Read ``lgemri.nrrd`` and ``laendo.nrrd`` on their stored axes; 255 is the atrium (`RAW` maps it)."""
    reading = AtriumReading.model_validate(dict(job.options))
    header = read_nrrd_header(job.files["image"], reading.spacing_mm)
    image, label, box = read_nrrd_voxels(header, scratch), None, None
    if "label" in job.files:
        label = read_nrrd_voxels(read_nrrd_header(job.files["label"], reading.spacing_mm), scratch)
        if label.shape != image.shape:
            raise DataError(f"{job.files['label']} has shape {label.shape}, its image {image.shape}. Do they belong "
                            "together?")  # fmt: skip
    if reading.cut != "none":
        box = _around(job, label, reading)
    return RawCase(image, label, header.spacing_mm, header.affine, header.axcodes, box=box, measured="whole",
                   grid=SourceGrid(shape=header.shape, affine=rows(header.affine), axcodes=header.axcodes),
                   words=(f"cut {reading.cut} around the label",) * (box is not None))  # fmt: skip


def _around(job: CaseJob, label: NDArray[Any] | None, reading: AtriumReading) -> tuple[Triple, Triple]:
    """Start and stop of the label's box, grown by what it lacks and by margins, within the scan."""
    full = None if label is None else label == 255
    if full is None or not full.any():
        raise DataError(f"{job.files['image']} cannot be cut around its label: laendo.nrrd is missing or holds no 255. "
                        "Keep the whole scan with --set cut=none.")  # fmt: skip
    case = int.from_bytes(hashlib.sha256(job.case.encode()).digest()[:8])
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([reading.seed, case])))
    start, stop = [0, 0, 0], list(full.shape)
    for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
        low, high = (int(end) for end in np.flatnonzero(full.any(axis=others))[[0, -1]])
        least, most = reading.margin_z if axis == 2 else reading.margin_xy
        below, above = (int(margin) for margin in rng.integers(least, most + 1, 2))
        half = max(reading.least_sides[axis] - (high - low), 0) // 2
        if axis < 2 or reading.cut == "xyz":
            # The far limit is the last index of the label, not the one after it, as in the original.
            start[axis], stop[axis] = max(low - below - half, 0), min(high + above + half, full.shape[axis])
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


H5 = h5_layout(*(place.removesuffix(".h5") for place in LAYOUTS), reading=ArrayReading(spacing_mm=SPACING_MM))
RAW = Layout("raw", ("image", (f"{FOLDER}/{{case}}/lgemri", "{case}/lgemri", "*/{case}/lgemri")), read_scan,
             AtriumReading(), {"label": ("laendo",)}, ends=(".nrrd",), steps=ScanSteps(normalise="zscore"),
             labels=LabelMap(names=CLASSES, values={0: 0, 255: 1}, other=0))  # fmt: skip


class LeftAtrium(PublicSource):
    """100 scans, 80 for training and 20 for testing; lists in the data root win over the shipped split."""

    name = "la"
    title = "LA"
    modality = "late gadolinium-enhanced MR"
    licence = "research use under the terms of the MICCAI 2018 Atrial Segmentation Challenge"
    origin = "https://github.com/yulequan/UA-MT, folder data/"
    class_names = CLASSES
    budgets: ClassVar = {"scarce": 1, "moderate": 16}
    layouts = (H5, RAW)
    lists: ClassVar = {"train": SHIPPED / "la_train.txt", "test": SHIPPED / "la_test.txt"}
    protocols = PROTOCOLS

    def refuse_bare(self, cases: Collection[str], listed: Sequence[str]) -> None:
        """A case without a folder makes a partial set; a folder without the file, damage."""
        for case in listed:
            if case not in cases and any((self.folder() / top / case).is_dir() for top in (FOLDER, ".")):
                raise DataError(f"The folder of case {case} has no mri_norm2.h5. Restore the file, or remove the "
                                "folder to do without the case.")  # fmt: skip


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The LA source."""
    return [LeftAtrium]
