"""Left atrium in late gadolinium-enhanced MR: the 2018 Atrial Segmentation Challenge as the field uses it.

The files are those of ``yulequan/UA-MT`` (folder ``data/``): cropped around the atrium, 0.625 mm isotropic, z-scored
over the whole scan *before* the crop. UA-MT trains on them as they are, ``ShumengLI/CFR`` z-scores again; that choice
is ``grid.standardise``, so `load` returns the stored intensities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cfrbench.contracts import DataSource
from cfrbench.datasets import file_sha256, present_split, read_h5_pair, read_list
from cfrbench.errors import DataError
from cfrbench.hookspecs import hookimpl
from cfrbench.volume import Split, Volume, checked_volume

SPACING_MM = (0.625, 0.625, 0.625)
#: where a case may lie under the data root: the challenge's layout, the same without its folder, AC-MT's renamed files
LAYOUTS = ("2018LA_Seg_Training Set/{case}/mri_norm2.h5", "{case}/mri_norm2.h5", "{case}.h5")
SHIPPED = Path(__file__).parent / "splits"  # ids only: UA-MT data/train.list and data/test.list

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


class LeftAtrium(DataSource):
    """100 scans, 80 for training and 20 for testing; lists in the data root win over the shipped split."""

    name = "la"
    title = "LA"
    modality = "late gadolinium-enhanced MR"
    licence = "research use under the terms of the MICCAI 2018 Atrial Segmentation Challenge"
    origin = "https://github.com/yulequan/UA-MT, folder data/"
    class_names = ("background", "left atrium")
    budgets: ClassVar[Mapping[str, int]] = {"scarce": 1, "moderate": 16}

    def split(self) -> Split:
        """The cases of the lists that have files; ``note`` counts them if some are missing."""
        root = self._folder()
        lists = [root / "train.list", root / "test.list"]
        own = [path for path in lists if path.exists()]
        if len(own) == 1:
            other = next(path.name for path in lists if path not in own)
            raise DataError(f"{root} has {own[0].name} but no {other}. Put both beside the data, or neither to use the "
                            "split of the field.")  # fmt: skip
        official = [read_list(SHIPPED / name) for name in ("la_train.txt", "la_test.txt")]
        train, test = (read_list(path) for path in own) if own else official
        try:
            return self._counted(present_split(train, test, self._present), official)
        except DataError as error:
            raise DataError(f"LA data in {root}: {error} {self._remedy()}") from error

    def _counted(self, split: Split, official: list[tuple[str, ...]]) -> Split:
        """Say so where the split is a part of the field's: its numbers are not those of the whole."""
        train, test = official
        ours, whole = {*split.train, *split.test}, {*train, *test}
        if split.note or not ours < whole:
            return split
        note = f"{len(split.train)} of {len(train)} training and {len(split.test)} of {len(test)} test cases present"
        return dataclasses.replace(split, note=note)

    def load(self, case: str) -> Volume:
        """Read one case, ``(H, W, 88)`` in the official files, with its stored intensities."""
        path = self._file(case)
        if not path.is_file():
            raise DataError(f"LA case {case}: there is no {path}. {self._remedy()}")
        image, label = read_h5_pair(path)
        return checked_volume(str(path), image, label, self.num_classes, SPACING_MM)

    def fingerprint(self) -> Mapping[str, str]:
        """SHA-256 of each case's file."""
        split = self.split()
        return {case: file_sha256(self._file(case)) for case in (*split.train, *split.test)}

    def protocol(self, preset: str) -> Mapping[str, Any]:
        """Recommended settings of a preset; only ``paper`` is the published protocol."""
        return PROTOCOLS[preset]

    def _folder(self) -> Path:
        if self.root is None:
            raise DataError(f"LA needs the folder of its files: pass --data-root DIR. {self._remedy()}")
        if not self.root.is_dir():
            raise DataError(f"The LA data folder {self.root} does not exist or is no folder. {self._remedy()}")
        return self.root

    def _present(self, case: str) -> bool:
        """Whether the case has its file. A case without a folder makes a partial set; a folder without it, damage."""
        places = self._places(case)
        if any(path.is_file() for path in places):
            return True
        bare = [path.parent for path in places if path.parent.name == case and path.parent.is_dir()]
        if bare:
            raise DataError(f"The folder of case {case} has no {places[0].name}. Restore the file, or remove the "
                            "folder to do without the case.")  # fmt: skip
        return False

    def _places(self, case: str) -> list[Path]:
        if Path(case).name != case:  # ids from lists are checked there; this guards direct calls
            raise DataError(f"'{case}' is no LA case id. Use the plain name of a case, without folders.")
        return [self._folder() / layout.format(case=case) for layout in LAYOUTS]

    def _file(self, case: str) -> Path:
        """The case's file in the layout found; the official place if there is none."""
        places = self._places(case)
        return next((path for path in places if path.is_file()), places[0])

    def _remedy(self) -> str:
        return (f"Get the files from {self.origin}, and lay them out as 'DIR/{LAYOUTS[0].format(case='<id>')}' "
                "('DIR/<id>/mri_norm2.h5' and 'DIR/<id>.h5' work too).")  # fmt: skip


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The LA source."""
    return [LeftAtrium]
