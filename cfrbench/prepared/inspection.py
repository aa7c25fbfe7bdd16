"""A whole look at a data set: a verdict on every case, and what only all of them together show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Triple
from cfrbench.contracts import DataSource
from cfrbench.datasets import Finding, check_source
from cfrbench.errors import DataError
from cfrbench.prepared import copies
from cfrbench.prepared.form import CaseRecord
from cfrbench.prepared.leaks import across_lists, copies_among
from cfrbench.prepared.source import has_manifest
from cfrbench.scan_steps import Spacing
from cfrbench.volume import Split, Volume

#: a case whose intensities spread so many times more or less than those of the median case is pointed out
_STRANGE_SPREAD = 10.0
#: how near, in sides of the image, every label's middle must be to the image's for a crop around it
_CENTRED, _CENTRED_TYPICALLY = 0.15, 0.06


@dataclass(frozen=True)
class CaseRow:
    """What one case is. voxels: of each class; orientation: of its file, "" where none is stored."""

    case: str
    role: str
    shape: Triple = (0, 0, 0)
    spacing_mm: Spacing = (0.0, 0.0, 0.0)
    orientation: str = ""
    low: float = 0.0
    median: float = 0.0
    high: float = 0.0
    deviation: float = 0.0
    voxels: tuple[int, ...] = ()
    off_centre: tuple[float, float, float] | None = None  # of the label's box, in sides of the image
    remarks: tuple[str, ...] = ()
    verdict: Literal["ok", "note", "error"] = "ok"

    def millilitres(self) -> tuple[float, ...]:
        """Volume of each class but the background."""
        voxel = self.spacing_mm[0] * self.spacing_mm[1] * self.spacing_mm[2] / 1000
        return tuple(count * voxel for count in self.voxels[1:])


@dataclass
class Inspection:
    """Rows in list order, and all findings; an empty list of errors means that the data will not spoil a run."""

    rows: list[CaseRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        """Whether any finding is an error."""
        return any(finding.level == "error" for finding in self.findings)


def inspect(source: DataSource, on_case: Callable[[str], None] | None = None) -> Inspection:
    """Read every case once and say what is wrong with it, or with all of them. Raises nothing of what it finds."""
    seen: dict[str, CaseRow] = {}
    signatures: dict[str, NDArray[Any]] = {}

    def look(case: str, volume: Volume | None) -> None:
        if volume is not None:
            seen[case] = _row(source, case, volume)
            signatures[case] = copies.signature(volume.image.numpy())
        if on_case:
            on_case(case)

    findings = check_source(source, look)
    try:
        split = source.split()
    except DataError:
        return Inspection([], findings)
    findings += _near_copies(split, signatures, findings)
    findings += [found for judge in (_spread, _sizes, _orientations, partial(_centred, split))
                 for found in judge(list(seen.values()))]  # fmt: skip
    lists = [("train", split.train), ("val", split.val), ("test", split.test)]
    rows = [_judged(seen.get(case, CaseRow(case, role)), role, findings) for role, cases in lists for case in cases]
    return Inspection(rows, findings)


def rows_of(source: DataSource, on_case: Callable[[str], None] | None = None) -> list[CaseRow]:
    """What every case is, without a judgement; from the manifest where there is one, else each case is read."""
    rows = []
    split = source.split()
    for role in ("train", "val", "test"):
        for case in getattr(split, role):
            if has_manifest(source):
                row = _recorded(source.prepared.case(case))
            else:
                row = _row(source, case, source.load(case))
            rows.append(replace(row, role=role))
            if on_case:
                on_case(case)
    return rows


def _recorded(record: CaseRecord) -> CaseRow:
    seen = record.statistics
    return CaseRow(record.case, "", record.shape, record.spacing_mm, record.grid.axcodes, seen.low, seen.median,
                   seen.high, seen.deviation, record.voxels)  # fmt: skip


def _row(source: DataSource, case: str, volume: Volume) -> CaseRow:
    image = volume.image.numpy()
    low, median, high = (float(q) for q in np.quantile(image.reshape(-1)[:: max(1, image.size // 10**6)], (0, 0.5, 1)))
    voxels: tuple[int, ...] = ()
    if volume.label is not None:
        voxels = tuple(np.bincount(volume.label.numpy().reshape(-1), minlength=source.num_classes).tolist())
    orientation = source.prepared.case(case).grid.axcodes if has_manifest(source) else ""
    return CaseRow(case, "", volume.shape, volume.spacing_mm, orientation, low, median, high,
                   float(image.std(dtype=np.float64)), voxels, _off_centre(volume))  # fmt: skip


def _off_centre(volume: Volume) -> tuple[float, float, float] | None:
    if volume.label is None or not bool(volume.label.any()):
        return None
    full = volume.label.numpy() > 0
    places = [np.flatnonzero(full.any(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    x, y, z = (abs((p[0] + p[-1] + 1) / 2 / side - 0.5) for p, side in zip(places, full.shape, strict=True))
    return float(x), float(y), float(z)


def _judged(row: CaseRow, role: str, findings: Sequence[Finding]) -> CaseRow:
    own = [finding for finding in findings if row.case in finding.cases]
    verdict: Literal["ok", "note", "error"] = "ok"
    if own:
        verdict = "error" if any(finding.level == "error" for finding in own) else "note"
    return replace(row, role=role, verdict=verdict, remarks=tuple(f.message for f in own))


# ---------------------------------------------------------------------------------------------------------------------
# what all cases together show


def _near_copies(split: Split, signatures: dict[str, NDArray[Any]], known: Sequence[Finding]) -> list[Finding]:
    """Images that are one, flipped, turned or scaled; those that are equal have been found by their voxels."""
    told = [set(finding.cases) for finding in known if len(finding.cases) > 1]
    found = [pair for pair in copies_among(signatures) if not any({*pair[:2]} <= cases for cases in told)]
    leaks = across_lists(split, found)
    findings = []
    for first, second, alike in found:
        words = f"{first} = {second}: one image under two names, flipped, turned or scaled (correlation {alike:.3f})."
        leak = " They stand in different lists, so test scores would be on seen data. Keep one of them."
        same = " They stand in one list: it counts twice, unless they are moments of one examination."
        crossing = (first, second, alike) in leaks
        findings.append(Finding("error" if crossing else "note", words + (leak if crossing else same), (first, second)))
    return findings


def _spread(rows: Sequence[CaseRow]) -> list[Finding]:
    if len(rows) < 3:
        return []
    typical = float(np.median([row.deviation for row in rows]))
    odd = [row.case for row in rows if not 1 / _STRANGE_SPREAD <= row.deviation / typical <= _STRANGE_SPREAD]
    if not odd:
        return []
    few = ", ".join(odd[:6]) + " ..." * (len(odd) > 6)
    return [Finding("note", f"Intensities of {few} spread over {_STRANGE_SPREAD:g} times more or less than those of "
                    "the median case. Each volume is standardised by itself (grid.standardise), which evens that out; "
                    "make sure that they are of one modality.", tuple(odd))]  # fmt: skip


def _sizes(rows: Sequence[CaseRow]) -> list[Finding]:
    if len({row.spacing_mm for row in rows}) < 2:
        return []
    table = np.asarray([row.spacing_mm for row in rows])
    factor = float((table.max(0) / table.min(0)).max())
    if factor < 1.5:
        return []
    return [Finding("note", f"Voxel sizes differ by a factor of {factor:.1f} between cases. Networks see voxels, not "
                    "millimetres: resample (`cfrbench data import --spacing auto`).")]  # fmt: skip


def _orientations(rows: Sequence[CaseRow]) -> list[Finding]:
    kinds = sorted({row.orientation for row in rows} - {""})
    if not kinds:
        return [Finding("note", "The files store no orientation: nobody can check that all cases lie the same "
                        "way. Look at them: `cfrbench data show`.")] if rows else []  # fmt: skip
    if len(kinds) == 1:
        return []
    return [Finding("note", f"The source files are stored in {len(kinds)} orientations ({', '.join(kinds)}); all were "
                    "turned to one.")]  # fmt: skip


def _centred(split: Split, rows: Sequence[CaseRow]) -> list[Finding]:
    """Whether images were cropped around their labels, those of test cases too."""
    offsets = np.asarray([row.off_centre for row in rows if row.off_centre is not None])
    if len(offsets) < 4:
        return []
    axes = (offsets.max(0) < _CENTRED) & (np.median(offsets, axis=0) < _CENTRED_TYPICALLY)
    if axes.sum() < 2:
        return []
    return [Finding("note", "In every case the label lies in the middle of the image (its box is off by "
                    f"{float(np.median(offsets[:, axes])):.0%} of a side at the median): the images were cropped "
                    "around their labels. That is part of the protocol, and a method that is tested on whole scans "
                    "will do worse.")]  # fmt: skip
