"""Writes prepared cases: in parallel processes, each case whole or absent, finished ones verified and skipped.

A data set says how one case is read (`CaseJob.read`, a function that can be pickled) and gets everything else here.
Arrays may be memory maps of any axis order: they are checked, measured and written in slabs, so a volume need not fit
into memory unless a step of `ScanSteps` needs it whole. Nothing is forced onto the disk case by case, which would take
most of the time: what a power cut loses, the checksums tell.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Triple, digest
from cfrbench.errors import CfrbenchError, DataError, StoreError
from cfrbench.files import sha256_file, storage_errors
from cfrbench.prepared import copies
from cfrbench.prepared.form import (
    CASE,
    CASES,
    IMAGE,
    LABEL,
    ArrayRecord,
    CaseRecord,
    SourceGrid,
    Statistics,
    case_folder,
    read_record,
)
from cfrbench.prepared.label_maps import LabelMap
from cfrbench.prepared.parallel import each
from cfrbench.scan_steps import Placement, ScanSteps, Spacing, placed_label

_SLAB_BYTES = 2**26
#: quantiles are those of at most so many evenly spaced voxels
_SAMPLE = 2**22
#: part of every recipe: raise it when the same source gives other arrays than before
VERSION = 1


@dataclass(frozen=True)
class RawCase:
    """What a reader hands over, on the prepared axes and before any step.

    image, label: ``(H, W, D)``, any numeric type, stored values: scale and label_scale hold (slope, intercept) of the
    true ones. affine: of ``image``, 4 x 4 in mm. grid: where a label map goes back to; None = onto ``image`` itself.
    box: (start, stop) of what is cut out, before the steps; ``measured="whole"``: after them, so that clipping and
    normalising see the whole scan. words: what the reader did, beside the steps.
    """

    image: NDArray[Any]
    label: NDArray[Any] | None
    spacing_mm: Spacing
    affine: NDArray[np.float64]
    axcodes: str
    scale: tuple[float, float] = (1.0, 0.0)
    label_scale: tuple[float, float] = (1.0, 0.0)
    grid: SourceGrid | None = None
    box: tuple[Triple, Triple] | None = None
    measured: Literal["box", "whole"] = "box"
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseJob:
    """One case to prepare. ``options`` is whatever else ``read`` depends on, JSON-able: it is part of the recipe.

    read: ``(job, scratch folder) -> RawCase``, a module's own function; its DataErrors are findings about the case.
    """

    case: str
    files: Mapping[str, Path]  # what is read, by role: {"image": ..., "label": ...}
    read: Callable[[CaseJob, Path], RawCase]
    labels: LabelMap
    steps: ScanSteps = field(default_factory=ScanSteps)
    patient: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """Hash of everything that the arrays depend on, but the files."""
        reader = f"{self.read.__module__}.{getattr(self.read, '__qualname__', '')}"
        return digest([VERSION, reader, self.labels, self.steps, self.options, sorted(self.files)])


Outcome = CaseRecord | CfrbenchError
Watcher = Callable[[str, Outcome], None]


def prepare_cases(
    folder: Path, jobs: Sequence[CaseJob], workers: int = 1, on_case: Watcher | None = None
) -> dict[str, Outcome]:
    """Prepare every case under ``folder``; the record of each, or why it could not be prepared, in the order of jobs.

    Stopped or killed, it goes on where it was: a case that is finished and sound is verified and not prepared again.
    StoreError if the disk does not take the arrays or a process dies.
    """
    with storage_errors("use the folder", folder):
        (folder / CASES).mkdir(parents=True, exist_ok=True)
        for remains in (folder / CASES).glob(".*.tmp"):
            shutil.rmtree(remains, ignore_errors=True)
    done: dict[str, Outcome] = {}
    for number, outcome in each(partial(_attempt, folder), jobs, workers):
        if isinstance(outcome, StoreError):
            raise outcome
        done[jobs[number].case] = outcome
        if on_case:
            on_case(jobs[number].case, outcome)
    return {job.case: done[job.case] for job in jobs}


def remove_cases(folder: Path, keep: Collection[str]) -> None:
    """Remove the cases of an earlier preparation that the set no longer names."""
    for place in (folder / CASES).iterdir():
        if place.name not in keep:
            shutil.rmtree(place)


def _attempt(folder: Path, job: CaseJob) -> Outcome:
    try:
        return prepare_case(folder, job)
    except CfrbenchError as error:
        return error


# ---------------------------------------------------------------------------------------------------------------------
# one case


def prepare_case(folder: Path, job: CaseJob) -> CaseRecord:
    """Prepare one case, or verify the finished one; DataError that names its file if something is wrong with it."""
    target = case_folder(folder, job.case)
    names = [path.name for path in job.files.values()]
    # An image and its label in two folders may have one name.
    sources = {path.name if names.count(path.name) == 1 else f"{role}/{path.name}": _hash(path)
               for role, path in job.files.items()}  # fmt: skip
    finished = _finished(target, job, sources)
    if finished is not None:
        return finished
    scratch = target.with_name(f".{job.case}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with storage_errors("write", target):
            scratch.mkdir(parents=True)
            record = _written(scratch, job, job.read(job, scratch), sources)
            (scratch / CASE).write_text(record.model_dump_json(indent=1), encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        return record
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _hash(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Restore the file.") from error


def _finished(target: Path, job: CaseJob, sources: Mapping[str, str]) -> CaseRecord | None:
    """The record of a case that was prepared in the same way from the same files and is sound; None otherwise."""
    if not (target / CASE).is_file():
        return None
    try:
        record = read_record(target / CASE, CaseRecord)
        sound = not verify(target, record)
    except DataError:
        return None
    same = record.recipe == job.recipe and record.sources == dict(sources) and record.patient == job.patient
    return record if sound and same else None


def verify(target: Path, record: CaseRecord) -> str:
    """What is wrong with the arrays of a case folder: "" if they are those of the record."""
    for name, array in ((IMAGE, record.image), (LABEL, record.label)):
        path = target / name
        if array is None:
            continue
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != array.bytes or sha256_file(path) != array.sha256:
            return f"{path} does not match its checksum"
    return ""


def _written(scratch: Path, job: CaseJob, raw: RawCase, sources: Mapping[str, str]) -> CaseRecord:
    """Write the arrays of a case into ``scratch``; its record."""
    image_file = job.files.get("image", next(iter(job.files.values())))
    if raw.image.ndim != 3 or 0 in raw.image.shape:
        raise DataError(f"{image_file}: the image has shape {tuple(raw.image.shape)}; a 3D volume (H, W, D) is needed. "
                        "Store one scalar volume per case.")  # fmt: skip
    label_file = job.files.get("label", image_file)
    if raw.label is not None and raw.label.shape != raw.image.shape:
        raise DataError(f"{label_file} has shape {tuple(raw.label.shape)}, its image {image_file.name} "
                        f"{tuple(raw.image.shape)}. They must be on one grid: do they belong together?")  # fmt: skip
    with naming(image_file):
        placed, scale, spacing_mm, placement = _placed(raw, job.steps)
        image, statistics = _write_image(scratch / IMAGE, placed, scale)
    label, box = None, None
    voxels: tuple[int, ...] = ()
    if raw.label is not None:
        with naming(label_file):
            label, voxels, box = _write_label(scratch / LABEL, raw, placement, job.labels)
    mapped = np.load(scratch / IMAGE, mmap_mode="r")
    return CaseRecord(
        case=job.case, patient=job.patient or job.case, shape=_sides(mapped.shape), spacing_mm=spacing_mm,
        affine=rows(_moved(raw.affine, placement)), axcodes=raw.axcodes, image=image, label=label,
        voxels=voxels, label_box=box, statistics=statistics, signature=copies.encode(copies.signature(mapped)),
        sources=dict(sources), recipe=job.recipe, steps=(*raw.words, *job.steps.words()), placement=placement,
        grid=raw.grid or SourceGrid(shape=raw.image.shape, affine=rows(raw.affine), axcodes=raw.axcodes),
    )  # fmt: skip


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before a DataError that does not know it."""
    try:
        yield
    except DataError as error:
        if path.name in str(error):
            raise
        raise DataError(f"{path}: {error}") from error


def _placed(raw: RawCase, steps: ScanSteps) -> tuple[NDArray[Any], tuple[float, float], Spacing, Placement]:
    """The image after its steps, what scale is still to be applied, its voxel size and its place."""
    sides = _sides(raw.image.shape)
    start, stop = raw.box or ((0, 0, 0), sides)
    whole = Placement(shape=sides, start=start, stop=stop, sides=_sides(tuple(np.subtract(stop, start).tolist())))
    if steps.none:
        return raw.image[whole.box], raw.scale, raw.spacing_mm, whole
    _low_high(raw.image, raw.scale)  # NaN would spread, and is better reported as what it is
    image = raw.image if raw.scale == (1.0, 0.0) else scaled(raw.image, raw.scale)
    if raw.measured == "whole":
        placed = steps.place(image, raw.spacing_mm)
        if not placed.placement.untouched:
            raise DataError("a cut after the steps goes with neither a crop nor resampling. Leave those out.")
        return placed.image[whole.box], (1.0, 0.0), raw.spacing_mm, whole
    placed = steps.place(image[whole.box], raw.spacing_mm)
    inner = placed.placement
    outer = Placement(shape=sides, start=_sides(tuple(np.add(start, inner.start).tolist())),
                      stop=_sides(tuple(np.add(start, inner.stop).tolist())), sides=inner.sides)  # fmt: skip
    return placed.image, (1.0, 0.0), placed.spacing_mm, outer


def _moved(affine: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    """The affine of a cut and resampled array, voxel centres in their places."""
    old = np.subtract(placement.stop, placement.start)
    step = old / np.asarray(placement.sides)
    change = np.diag([*step, 1.0])
    change[:3, 3] = np.asarray(placement.start) + step / 2 - 0.5
    moved: NDArray[np.float64] = affine @ change
    return moved


def rows(affine: NDArray[np.float64]) -> Any:
    """A 4 x 4 matrix as nested tuples of floats, exact."""
    return tuple(tuple(float(value) for value in row) for row in affine)


# ---------------------------------------------------------------------------------------------------------------------
# arrays, slab by slab


def slabs(array: NDArray[Any]) -> Iterator[slice]:
    """Slices along the first axis, each of some ten megabytes."""
    step = max(1, _SLAB_BYTES // max(1, 4 * array[:1].size))
    return (slice(low, min(low + step, len(array))) for low in range(0, len(array), step))


def scaled(array: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.float32]:
    """True values of stored ones, float32; what is beyond its range becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite and is reported as such
        if scale == (1.0, 0.0):
            return array.astype(np.float32)
        return (array * np.float64(scale[0]) + scale[1]).astype(np.float32)


def _low_high(array: NDArray[Any], scale: tuple[float, float]) -> tuple[float, float]:
    """Smallest and largest true value; DataError if a true one is not finite, or all are equal."""
    low, high, odd = np.inf, -np.inf, 0
    for part in slabs(array):
        piece = array[part] if array.dtype.kind in "biu" and scale == (1.0, 0.0) else scaled(array[part], scale)
        if piece.dtype.kind == "f":
            odd += int(piece.size - np.isfinite(piece).sum())
        if not odd:
            low, high = min(low, float(piece.min())), max(high, float(piece.max()))
    if odd:
        raise DataError(f"the image holds {odd} NaN or infinite voxels. Replace them, or leave the case out.")
    if low == high:
        raise DataError(f"every voxel of the image is {low:g}; there is nothing to segment. The file may be damaged: "
                        "convert it again.")  # fmt: skip
    return low, high


def _write_image(path: Path, array: NDArray[Any], scale: tuple[float, float]) -> tuple[ArrayRecord, Statistics]:
    low, high = _low_high(array, scale)
    whole = array.dtype.kind in "biu" and scale == (1.0, 0.0) and low >= -(2**15) and high < 2**15
    target = _mapped(path, np.int16 if whole else np.float32, _sides(array.shape))
    total, square = 0.0, 0.0
    for part in slabs(array):
        piece = array[part].astype(np.int16) if whole else scaled(array[part], scale)
        target[part] = piece
        total += float(piece.sum(dtype=np.float64))
    mean = total / array.size
    for part in slabs(array):
        square += float(np.square(target[part] - mean, dtype=np.float64).sum())
    q005, median, q995 = (float(q) for q in np.quantile(_sample(target), (0.005, 0.5, 0.995)))
    record = _closed(path, target)
    deviation = float(np.sqrt(square / array.size))
    return record, Statistics(low=low, high=high, mean=mean, deviation=deviation,
                              q005=q005, median=median, q995=q995)  # fmt: skip


def _sample(array: NDArray[Any]) -> NDArray[Any]:
    return array.reshape(-1)[:: -(-array.size // _SAMPLE)]


def _write_label(
    path: Path, raw: RawCase, placement: Placement, labels: LabelMap
) -> tuple[ArrayRecord, tuple[int, ...], tuple[Triple, Triple] | None]:
    """Write the class numbers; their record, voxels of each class, and the box of what is labelled."""
    assert raw.label is not None
    unscaled = raw.label_scale == (1.0, 0.0)
    stored = _mapped(path, np.uint8, placement.sides)
    if placement.untouched:
        for part in slabs(raw.label):
            stored[part] = labels.apply(raw.label[part] if unscaled else scaled(raw.label[part], raw.label_scale))
    else:
        stored[:] = placed_label(labels.apply(raw.label if unscaled else scaled(raw.label, raw.label_scale)), placement)
    counts = np.zeros(len(labels.names), np.int64)
    seen = [np.zeros(side, bool) for side in stored.shape]
    for part in slabs(stored):
        counts += np.bincount(stored[part].ravel(), minlength=len(counts))
        full = stored[part] > 0
        seen[0][part] = full.any((1, 2))
        seen[1] |= full.any((0, 2))
        seen[2] |= full.any((0, 1))
    found = [np.flatnonzero(axis) for axis in seen]
    box = None
    if found[0].size:
        box = (_sides(tuple(int(f[0]) for f in found)), _sides(tuple(int(f[-1]) + 1 for f in found)))
    return _closed(path, stored), tuple(counts.tolist()), box


def _mapped(path: Path, dtype: Any, sides: Triple) -> Any:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=sides)


def _closed(path: Path, array: Any) -> ArrayRecord:
    return ArrayRecord(dtype=array.dtype.name, bytes=path.stat().st_size, sha256=sha256_file(path))


def _sides(shape: tuple[int, ...]) -> Triple:
    height, width, depth = shape
    return height, width, depth
