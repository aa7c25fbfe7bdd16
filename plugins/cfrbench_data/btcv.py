"""BTCV (Synapse, Beyond the Cranial Vault): abdominal CT, 13 organs in the paper's column order.

The field's h5 files are those of ``DeepMed-Lab-ECNU/MagicNet``. How they were made is not published: its paper states
1.5 x 1.5 x 2.0 mm and zero mean, unit variance, which is what the steps from the challenge's files do by default; an
intensity window is likely but unstated (issue 12 there), so it is an option: ``--window=-175,250`` is common elsewhere.
MagicNet shuffles its training list with numpy seed 1337 before the first N become the labelled ones (issue 5 there);
the list ``effective`` is that order, ``file`` the order of its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from cfrbench.contracts import DataSource
from cfrbench.hookspecs import hookimpl
from cfrbench.prepared.arrays import ArrayReading
from cfrbench.prepared.pair_reader import Reading, read_pair
from cfrbench.prepared.places import Layout, h5_layout, npy_layout
from cfrbench.prepared.proposals import propose
from cfrbench.prepared.public import PublicSource
from cfrbench.scan_steps import ScanSteps

SHIPPED = Path(__file__).parent / "splits"  # numbers only: MagicNet data/btcv.txt
SPACING_MM = (1.5, 1.5, 2.0)
ARRAYS = ArrayReading(spacing_mm=SPACING_MM)
STEPS = ScanSteps(spacing_mm=SPACING_MM, normalise="zscore")
TYPICAL = (250, 250, 170)

PAPER: dict[str, Any] = {
    "training.patch": (96, 96, 96),
    "training.steps": 70000,  # MagicNet, to which the paper refers
    "training.lr": 0.01,
    "training.lr_policy": "poly-b",
    "training.rotflip": False,
    "inference.stride_xy": 12,  # ShumengLI/CFR; MagicNet 16
    "inference.stride_z": 12,
}


class Btcv(PublicSource):
    """30 labelled scans, 18 for training and 12 for testing."""

    class Config(PublicSource.Config):
        """Which order of the training list counts."""

        order: Literal["effective", "file"] = Field("effective", description="of the training list")

    config: Config
    name = "btcv"
    title = "BTCV"
    modality = "portal-venous CT"
    licence = "registration at Synapse and its terms of use"
    origin = "https://www.synapse.org/#!Synapse:syn3193805, or the h5 files of github.com/DeepMed-Lab-ECNU/MagicNet"
    class_names = ("background", "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver",
                   "stomach", "aorta", "inferior vena cava", "portal and splenic veins", "pancreas",
                   "right adrenal gland", "left adrenal gland")  # fmt: skip
    budgets: ClassVar = {"scarce": 1, "moderate": 7}
    layouts = (
        h5_layout("{case}", "btcv_h5/{case}", "case{case}", "btcv_h5/case{case}", reading=ARRAYS, ids=r"\d{4}"),
        npy_layout("{case}_image", "npy/{case}_image", reading=ARRAYS, ids=r"\d{4}"),
        Layout("raw", ("image", ("img/img{case}", "*/img/img{case}", "*/*/img/img{case}", "imagesTr/img{case}")),
               read_pair, Reading(), {"label": ("../label/label{case}", "../labelsTr/label{case}")}, ids=r"\d{4}",
               steps=STEPS),
    )  # fmt: skip
    own_lists = (*PublicSource.own_lists, ("train_magic.list", "test_magic.list"))  # as ShumengLI/CFR names one
    id_pattern = r"\d{4}"
    lists: ClassVar = {"train": SHIPPED / "btcv_train.txt", "test": SHIPPED / "btcv_test.txt"}
    protocols: ClassVar = {**propose([TYPICAL]), "paper": PAPER}

    def shipped(self) -> Mapping[str, Path]:
        """The lists, the training cases in the order chosen."""
        order = "btcv_train.txt" if self.config.order == "effective" else "btcv_train_fileorder.txt"
        return {**self.lists, "train": SHIPPED / order}


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The BTCV source."""
    return [Btcv]
