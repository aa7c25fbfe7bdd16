"""BraTS 2019, FLAIR and whole tumour: the challenge's NIfTI files, or the h5 files that SSL4MIS passes around.

Steps from the challenge's files are those of ``HiLab-git/SSL4MIS`` ``code/dataloaders/brats_proprecessing.py``: cut to
the box of what is not 0, whose far limits exclude the last slice (``nonzero-open``); clip at the intensity where the
cumulative histogram reaches 0.999; z-score by mean and deviation of voxels above 0 (``zscore-positive``), so that the
background becomes a negative constant; label > 0 is tumour. Its h5 files hold axes z, y, x, which ``ShumengLI/CFR``
swaps, and labels that it makes binary again; so does this reader. The stored axes, LPS, are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from cfrbench.contracts import DataSource
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.arrays import ArrayReading
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.pair_reader import Reading, read_pair
from cfrbench.prepared.places import Layout, h5_layout
from cfrbench.prepared.proposals import propose
from cfrbench.prepared.public import PublicSource
from cfrbench.scan_steps import ScanSteps

SHIPPED = Path(__file__).parent / "splits"  # ids only: SSL4MIS data/BraTS2019/{train,val,test}.txt
CLASSES = ("background", "whole tumour")
LABELS = LabelMap(names=CLASSES, values={0: 0}, other=1)
#: sides of a typical brain after cropping; quick and smoke are proposed from it
TYPICAL = (137, 170, 138)

PAPER: dict[str, Any] = {
    "training.patch": (96, 96, 96),
    "training.steps": 30000,  # SSL4MIS, to which the paper refers; its own code has no value for this set
    "training.lr": 0.01,
    "training.lr_policy": "step",  # ShumengLI/CFR code/train_retraining.py; SSL4MIS: poly 0.9, i.e. poly-b
    "training.rotflip": True,
    "inference.stride_xy": 64,
    "inference.stride_z": 64,
}


class BraTS19(PublicSource):
    """335 patients: 250 training, 25 validation, which the paper does not use, 60 test."""

    name = "brats19"
    title = "BraTS 2019"
    modality = "FLAIR MR"
    licence = "registration with the organisers of the challenge; the originals may not be passed on"
    origin = "https://www.med.upenn.edu/cbica/brats2019/data.html, or the h5 files of github.com/HiLab-git/SSL4MIS"
    class_names = CLASSES
    budgets: ClassVar = {"scarce": 1, "moderate": 50}
    axcodes = "LPS"
    segmenter = "unet3d"
    layouts = (
        h5_layout("{case}", "data/{case}", reading=ArrayReading(axes=(2, 1, 0), axcodes="LPS"), labels=LABELS),
        Layout("raw", ("image", ("{case}/{case}_flair", "*/{case}/{case}_flair", "*/*/{case}/{case}_flair",
                                 "{case}_flair")), read_pair, Reading(axcodes="LPS"), {"label": ("{case}_seg",)},
               labels=LABELS, steps=ScanSteps(crop="nonzero-open", clip_above=0.999, normalise="zscore-positive")),
    )  # fmt: skip
    lists: ClassVar = {"train": SHIPPED / "brats_train.txt", "val": SHIPPED / "brats_val.txt",
                       "test": SHIPPED / "brats_test.txt"}  # fmt: skip
    own_lists = (*PublicSource.own_lists, ("train_follow.list", "test_follow.list"))  # as ShumengLI/CFR names them
    protocols: ClassVar = {
        **{preset: {**values, "training.rotflip": True} for preset, values in propose([TYPICAL]).items()},
        "paper": PAPER,
    }


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The BraTS 2019 source."""
    return [BraTS19]
