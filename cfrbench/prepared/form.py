"""The one on-disk form of prepared data.

    FOLDER/prepared.json             the set: classes, split, protocol, steps, every case with its fingerprint
    FOLDER/signatures.npy            (cases, 1728) int8, by which copies are found (`cfrbench.prepared.copies`)
    FOLDER/cases/<case>/case.json    the case: grids, intensities, hashes of sources and arrays
    FOLDER/cases/<case>/image.npy    (H, W, D) int16 or float32, C order
    FOLDER/cases/<case>/label.npy    (H, W, D) uint8, absent without a label

A case folder is whole or absent: it is written beside its place and renamed. ``prepared.json`` is written last, so a
folder without it is unfinished, and the command that began it goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic
from pydantic import Field

from cfrbench.config import Frozen, Triple, digest
from cfrbench.errors import DataError
from cfrbench.scan_steps import Placement, ScanSteps, Spacing

FORMAT = 1
MANIFEST, SIGNATURES, CASES = "prepared.json", "signatures.npy", "cases"
CASE, IMAGE, LABEL = "case.json", "image.npy", "label.npy"
#: where a store keeps the sets that were imported into it, one folder a name
DATASETS = "datasets"

Row = tuple[float, float, float, float]
Affine = tuple[Row, Row, Row, Row]
R = TypeVar("R", bound=Frozen)


class ArrayRecord(Frozen):
    """One ``.npy`` file: its type, its length and its SHA-256, header included."""

    dtype: Literal["int16", "float32", "uint8"]
    bytes: int
    sha256: str


class Statistics(Frozen):
    """Intensities of a prepared image; quantiles of every voxel, or of evenly spaced ones of a huge image."""

    low: float
    high: float
    mean: float
    deviation: float
    q005: float
    median: float
    q995: float


class SourceGrid(Frozen):
    """The grid a case came from, on its own axes: what a label map needs to be written back.

    shape: as stored, trailing axes of length one included. header: base64 of the NIfTI header, "" for other files.
    """

    shape: tuple[int, ...]
    affine: Affine
    axcodes: str
    header: str = ""


class CaseRecord(Frozen):
    """One prepared case. affine and spacing_mm: of the prepared array. voxels: how many of each class."""

    format: int = FORMAT
    case: str
    patient: str
    shape: Triple
    spacing_mm: Spacing
    affine: Affine
    axcodes: str
    image: ArrayRecord
    label: ArrayRecord | None
    voxels: tuple[int, ...]
    label_box: tuple[Triple, Triple] | None  # start and stop of what is labelled; None without any
    statistics: Statistics
    signature: str
    sources: dict[str, str]  # file name -> SHA-256
    recipe: str  # hash of everything but the sources that the arrays depend on
    steps: tuple[str, ...]
    placement: Placement
    grid: SourceGrid

    @property
    def fingerprint(self) -> str:
        """Hash of what a run reads: arrays and voxel size. Neither names nor places are part of it."""
        label = self.label.sha256 if self.label else None
        return digest([self.image.sha256, label, self.spacing_mm])


class SetRecord(Frozen):
    """A prepared set. protocol: preset -> settings. left_out: file or case -> why. made: how, in words."""

    format: int = FORMAT
    name: str
    title: str
    modality: str = "not stated"
    licence: str = "not stated"
    origin: str = "not stated"
    class_names: tuple[str, ...]
    labels: dict[str, int] = Field(default_factory=dict)  # raw value -> class number
    axcodes: str
    scan_steps: ScanSteps = ScanSteps()
    train: tuple[str, ...]
    test: tuple[str, ...]
    val: tuple[str, ...] = ()
    note: str = ""
    budgets: dict[str, int] = Field(default_factory=dict)
    protocol: dict[str, dict[str, Any]] = Field(default_factory=dict)
    cases: dict[str, str]  # case -> fingerprint
    patients: dict[str, str] = Field(default_factory=dict)
    unlabelled: tuple[str, ...] = ()  # training cases that have no label
    left_out: dict[str, str] = Field(default_factory=dict)
    made: dict[str, Any] = Field(default_factory=dict)


def case_folder(folder: Path, case: str) -> Path:
    """Where a case lies; DataError if its name would lead elsewhere."""
    return folder / CASES / checked_case(case)


def checked_case(case: str) -> str:
    """The id, if it can be the name of a folder anywhere; DataError otherwise."""
    if not case or case != case.strip() or case.startswith(".") or re.search(r'[/\\:*?"<>|]', case) \
            or not case.isprintable() or len(case.encode()) > 200:  # fmt: skip
        raise DataError(f"{case!r} cannot be the name of a case. Use up to 200 bytes without / \\ : * ? \" < > |, not "
                        "beginning with a dot or ending with a space.")  # fmt: skip
    return case


def read_record(path: Path, kind: type[R]) -> R:
    """A record from its JSON file; DataError if it is missing, damaged or of another version."""
    try:
        values: Mapping[str, Any] = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']}; this version reads {FORMAT}. Prepare the data "
                            "again with this version.")  # fmt: skip
        return kind.model_validate(values)
    except (OSError, ValueError, KeyError, TypeError, pydantic.ValidationError) as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is missing or damaged ({cause}). Give the command that prepared it again: finished "
                        "cases are kept.") from error  # fmt: skip
