"""What lies in an archive of a run, a ZIP file without anything that can run code.

    manifest.json                     this module's `Manifest`: cells, protocol, cases, checksums of every other file
    scores.csv                        every score: one row per cell, case and class
    summary.json                      the means of the run's table
    run.toml                          the request; `cfrbench run --config` takes it
    stages.json                       recipe, environment and seconds of every stage behind the scores
    predictions/<cell>/<case>.nii.gz  the label maps that were scored
    truth/<case>.nii.gz               only in an archive made with the truth

Equal runs give equal bytes: no time of writing, no place on a disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from cfrbench.config import Frozen, ScoringSection, Triple, canonical, digest

FORMAT = 1
MANIFEST, SCORES, SUMMARY, REQUEST, STAGES = "manifest.json", "scores.csv", "summary.json", "run.toml", "stages.json"
METRICS = ("dice", "jaccard", "asd", "hd95")
#: columns of scores.csv; ``cell`` is the name of a folder under predictions/
COLUMNS = ("cell", "ssl", "variant", "labels", "unlabelled", "seed", "case", "class", *METRICS, "empty")


class FileRecord(Frozen):
    """One file of the archive."""

    sha256: str
    bytes: int


class CaseRecord(Frozen):
    """A scored case. truth_sha256: see `truth_checksum`."""

    fingerprint: str
    shape: Triple
    spacing_mm: tuple[float, float, float]
    truth_sha256: str


class DataRecord(Frozen):
    """The data set: the plug-in that reads it, and what a person must know of it."""

    name: str
    version: str
    options: dict[str, Any]
    title: str
    licence: str
    origin: str
    synthetic: bool
    class_names: tuple[str, ...]
    axcodes: str


class CellRecord(Frozen):
    """One method at one budget and seed. name: its folder. about: its columns of the tidy frame."""

    name: str
    about: dict[str, Any]
    stage: str  # whose label maps were scored: predict or pseudo
    scoring: ScoringSection
    cases: tuple[str, ...]


class Manifest(Frozen):
    """The table of contents. facts: what every table of the run says about itself. seal: hash of all the rest."""

    format: int
    made_by: str
    run: str
    facts: dict[str, Any]
    protocol: str
    data: DataRecord
    cells: tuple[CellRecord, ...]
    cases: dict[str, CaseRecord]
    files: dict[str, FileRecord]
    seal: str = ""


def seal_of(manifest: Manifest) -> str:
    """The hash of everything in a manifest but its seal."""
    return digest(manifest.model_dump(mode="json", exclude={"seal"}))


def truth_checksum(label: NDArray[Any], spacing_mm: tuple[float, float, float]) -> str:
    """SHA-256 of a truth ``(H, W, D)`` uint8: of its shape, voxel size and voxels in C order, not of any file."""
    head = canonical([list(label.shape), list(spacing_mm)])
    return hashlib.sha256(head.encode() + label.tobytes(order="C")).hexdigest()


def prediction_file(cell: str, case: str) -> str:
    """The archive's name of a label map."""
    return f"predictions/{cell}/{case}.nii.gz"


def truth_file(case: str) -> str:
    """The archive's name of a truth."""
    return f"truth/{case}.nii.gz"


def score_rows(cell: CellRecord, rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    """Rows as `pipeline.score_mask` gives them, with the columns of scores.csv."""
    about = {name: cell.about[name] for name in ("ssl", "variant", "labels", "unlabelled", "seed")}
    return [{"cell": cell.name, **about, **{n: row[n] for n in ("case", "class", *METRICS, "empty")}} for row in rows]
