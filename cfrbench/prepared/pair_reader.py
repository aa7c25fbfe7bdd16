"""Reads an image and its label from NIfTI files, and says first what is wrong with them. Imports no torch."""

from __future__ import annotations

import base64
import math
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Frozen, Triple
from cfrbench.errors import DataError
from cfrbench.prepared.form import SourceGrid
from cfrbench.prepared.label_maps import counted
from cfrbench.prepared.nifti import LIMIT_GIB, NiftiHeader, header_of, read_header, read_voxels
from cfrbench.prepared.pairs import Pair
from cfrbench.prepared.writing import CaseJob, RawCase, rows, scaled, slabs
from cfrbench.scan_steps import Spacing

#: how far corresponding corners of image and label may lie apart, in voxels: programs round affines differently
_APART = 0.1


class Reading(Frozen):
    """How pairs are read. ignore_affine: lay the label on the image by index, whatever its header says."""

    axcodes: str = "RAS"
    channel: int | None = None
    limit_gib: float = LIMIT_GIB
    ignore_affine: bool = False


@dataclass(frozen=True)
class Surveyed:
    """What the headers and the label of a case say; ``problem`` is "" if nothing is wrong with them.

    shape, spacing_mm: along the wanted axes. stored: orientation in the file. counts: raw label value -> voxels.
    """

    case: str
    problem: str = ""
    shape: Triple = (0, 0, 0)
    spacing_mm: Spacing = (0.0, 0.0, 0.0)
    stored: str = ""
    counts: dict[int, int] = field(default_factory=dict)


def survey(reading: Reading, pair: Pair) -> Surveyed:
    """Look at one case without preparing it: headers of both files, the whole label."""
    try:
        image, label = _headers(reading, pair.image, pair.label)
        counts: dict[int, int] = {}
        if label is not None:
            with tempfile.TemporaryDirectory() as scratch:
                counts = _counts(label, Path(scratch))
        shape = image.turned_shape(reading.axcodes)
        return Surveyed(pair.case, "", shape, image.turned_spacing(reading.axcodes), image.axcodes, counts)
    except DataError as error:
        return Surveyed(pair.case, str(error))


def _counts(label: NiftiHeader, scratch: Path) -> dict[int, int]:
    scale, counts = (label.slope, label.intercept), Counter[int]()
    voxels = read_voxels(label, scratch).T  # C order: slabs are whole
    try:
        for part in slabs(voxels):
            counts.update(counted(voxels[part] if scale == (1.0, 0.0) else scaled(voxels[part], scale)))
        return dict(sorted(counts.items()))
    except DataError as error:
        raise error if label.path.name in str(error) else DataError(f"{label.path}: {error}") from error


def _headers(reading: Reading, image: Path, label: Path | None) -> tuple[NiftiHeader, NiftiHeader | None]:
    """The headers of both files, which are on one grid."""
    first = read_header(image, reading.channel, reading.limit_gib)
    if label is None:
        return first, None
    second = read_header(label, None, reading.limit_gib)
    if reading.ignore_affine:
        if first.shape != second.shape:
            raise _other_shape(first, second)
        return first, second
    if first.turned_shape(reading.axcodes) != second.turned_shape(reading.axcodes):
        raise _other_shape(first, second)
    apart = _corners_apart(first, second, reading.axcodes)
    if apart > _APART:
        raise DataError(f"{label} lies elsewhere than its image {image}: their affines put corresponding voxels up to "
                        f"{apart:.1f} voxels apart. Resample the label onto the image, or, if their indices are known "
                        "to agree, allow it with --ignore-affine.")  # fmt: skip
    return first, second


def _other_shape(image: NiftiHeader, label: NiftiHeader) -> DataError:
    return DataError(f"{label.path} has shape {label.shape}, its image {image.path} {image.shape}. They must be on one "
                     "grid: do they belong together?")  # fmt: skip


def _corners_apart(first: NiftiHeader, second: NiftiHeader, axcodes: str) -> float:
    """The largest distance of corresponding corners, in voxels of the finest axis."""
    far = np.subtract(first.turned_shape(axcodes), 1)
    corners = np.stack(np.meshgrid(*([0, side] for side in far), [1], indexing="ij"), -1).reshape(-1, 4)
    moved = corners @ (first.turned_affine(axcodes) - second.turned_affine(axcodes)).T
    distances: NDArray[np.float64] = np.linalg.norm(moved[:, :3], axis=1)
    return float(distances.max() / min(np.linalg.norm(first.affine[:3, :3], axis=0)))


def read_pair(job: CaseJob, scratch: Path) -> RawCase:
    """The reader of `CaseJob`s whose files are ``image`` and perhaps ``label``, and whose options are a `Reading`."""
    reading = Reading.model_validate(dict(job.options))
    image, label = _headers(reading, job.files["image"], job.files.get("label"))
    return RawCase(
        image=image.turned(read_voxels(image, scratch), reading.axcodes),
        label=None if label is None else _label(image, label, reading, scratch),
        spacing_mm=image.turned_spacing(reading.axcodes),
        affine=image.turned_affine(reading.axcodes),
        axcodes=reading.axcodes,
        scale=(image.slope, image.intercept),
        label_scale=(1.0, 0.0) if label is None else (label.slope, label.intercept),
        grid=_grid(image),
    )


def _label(image: NiftiHeader, label: NiftiHeader, reading: Reading, scratch: Path) -> NDArray[Any]:
    # By index: the label takes the axes that the image's header gives them.
    guide = image if reading.ignore_affine else label
    return guide.turned(read_voxels(label, scratch), reading.axcodes)


def _grid(image: NiftiHeader) -> SourceGrid:
    """Where label maps go back to: the file's own grid, or that of the one volume that was taken of several."""
    header = header_of(image.block)
    several = math.prod(image.stored_shape[3:]) > 1
    shape = image.shape if several else image.stored_shape
    header.set_data_shape(shape)
    return SourceGrid(shape=shape, affine=rows(image.affine), axcodes=image.axcodes,
                      header=base64.b64encode(header.binaryblock).decode())  # fmt: skip
