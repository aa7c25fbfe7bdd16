"""`cfrbench verify`: every number of an archive computed again from its label maps, and what differs named."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench import registry
from cfrbench.archive.form import (
    COLUMNS,
    METRICS,
    SCORES,
    SUMMARY,
    CellRecord,
    DataRecord,
    prediction_file,
    score_rows,
    seal_of,
    truth_checksum,
    truth_file,
)  # fmt: skip
from cfrbench.archive.reading import LIMIT_GIB, Archive, open_archive
from cfrbench.config import validate
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.pipeline import score_mask
from cfrbench.prepared.nifti import read_header, read_voxels

#: numbers this close are equal: sums in another order, on another processor, differ in the last bits
RELATIVE = 1e-9
#: what the options of a data set may ask to be drawn: an archive must not fill the memory of whoever checks it
_MOST_VOXELS = 2**29

Truth = Callable[[str], NDArray[np.uint8]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit. file: of the archive. expected: what the archive says. found: what is there."""

    file: str
    case: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"{self.file}, case {self.case}" if self.case else self.file
        return f"{where}: {self.what}: expected {self.expected}, found {self.found}"


@dataclass
class Verdict:
    """What was checked, and every `Finding`. truth: where the truth came from, in words."""

    run: str
    truth: str
    files: int = 0
    predictions: int = 0
    numbers: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, file: str, case: str, what: str, expected: object, found: object) -> None:
        """Record what does not fit."""
        self.findings.append(Finding(file, case, what, str(expected), str(found)))


def verify(
    path: Path,
    data_root: Path | None = None,
    limit_gib: float = LIMIT_GIB,
    on_case: Callable[[int, int, str], None] | None = None,
) -> Verdict:
    """Check checksums, then recompute every score and mean from the label maps and the truth.

    The truth comes from the data set where that can be read (``data_root``, or synthetic), else from the archive.
    ``on_case`` is told number, total and id of each case. DataError if the archive cannot be trusted enough to be read,
    or the truth cannot be found.
    """
    with open_archive(path, limit_gib) as archive, TemporaryDirectory() as scratch:
        volumes = _Volumes(archive, Path(scratch), limit_gib)
        words, truth = _truth(archive, volumes, data_root)
        verdict = Verdict(archive.manifest.run, words)
        _check_files(archive, verdict)
        told = _told_scores(archive, verdict)
        rows: dict[str, list[Row]] = {cell.name: [] for cell in archive.manifest.cells}
        for number, case in enumerate(archive.manifest.cases, start=1):
            if on_case:
                on_case(number, len(archive.manifest.cases), case)
            for cell, found in _scores_of(archive, case, volumes, truth, verdict):
                rows[cell.name] += found
                _compare_rows(score_rows(cell, found), told, verdict)
        for cell_name, case, class_name in told:
            verdict.add(SCORES, case, f"a score of {cell_name}, {class_name}", "a label map behind it", "none")
        _compare_means(archive, rows, verdict)
        return verdict


# ---------------------------------------------------------------------------------------------------------------------
# files


def _check_files(archive: Archive, verdict: Verdict) -> None:
    manifest = archive.manifest
    if manifest.seal != (seal := seal_of(manifest)):
        verdict.add("manifest.json", "", "changed after it was written, its seal", manifest.seal, seal)
    present = set(archive.names)
    for name in sorted(present - set(manifest.files)):
        verdict.add(name, "", "a file that the table of contents does not name", "no such file", "it is there")
    for name, record in manifest.files.items():
        verdict.files += 1
        if name not in present:
            verdict.add(name, _case_of(name), "missing", f"SHA-256 {record.sha256}", "no such file")
            continue
        try:
            found = hashlib.sha256(archive.read(name)).hexdigest()
        except DataError:
            found = "bytes that cannot be read"
        if found != record.sha256:
            verdict.add(name, _case_of(name), "changed after it was written, its SHA-256", record.sha256, found)


def _case_of(name: str) -> str:
    """The case of a label map by its name; "" for other files."""
    return name.rpartition("/")[2].removesuffix(".nii.gz") if name.endswith(".nii.gz") else ""


class _Volumes:
    """Label maps of an archive, each unpacked only after its header was judged."""

    def __init__(self, archive: Archive, scratch: Path, limit_gib: float) -> None:
        self._archive, self._scratch, self._limit_gib = archive, scratch, limit_gib

    def __call__(self, name: str, case: str) -> NDArray[np.uint8]:
        """The map ``(H, W, D)``; DataError that names the member if it is damaged or of another grid."""
        file = self._scratch / "volume.nii.gz"
        file.write_bytes(self._archive.read(name))
        try:
            header = read_header(file, limit_gib=self._limit_gib)
            shape = self._archive.manifest.cases[case].shape
            if header.shape != shape or header.dtype != np.uint8 or (header.slope, header.intercept) != (1.0, 0.0):
                raise DataError(f"{name} holds {header.dtype} voxels {header.shape}, not uint8 {shape}.")
            voxels: NDArray[np.uint8] = np.ascontiguousarray(read_voxels(header, self._scratch))
        except DataError as error:
            raise DataError(str(error).replace(str(file), name)) from error
        return voxels


# ---------------------------------------------------------------------------------------------------------------------
# truth


def _truth(archive: Archive, volumes: _Volumes, data_root: Path | None) -> tuple[str, Truth]:
    """Where the truth comes from, in words, and what reads it."""
    data = archive.manifest.data
    if data_root is None and not data.synthetic:
        if any(truth_file(case) not in archive.manifest.files for case in archive.manifest.cases):
            raise DataError(f"{archive.path} holds no truth of {data.title}, only its checksums. Give the folder of "
                            f"your copy with --data-root (get it from: {data.origin}).")  # fmt: skip
        return "from the archive", lambda case: volumes(truth_file(case), case)
    source = _open(archive.path, data, data_root)

    def load(case: str) -> NDArray[np.uint8]:
        label = source.load(case).label
        if label is None:
            raise DataError(f"The case {case} of {data.title} has no label in {data_root}. Complete your copy.")
        voxels: NDArray[np.uint8] = label.numpy()
        return voxels

    return "drawn again from its seed" if data.synthetic else f"from {data_root}", load


def _open(path: Path, data: DataRecord, root: Path | None) -> DataSource:
    for name, value in data.options.items():
        sides = [side for side in value if isinstance(side, int)] if isinstance(value, list) else []
        if sides and math.prod(sides) > _MOST_VOXELS:
            raise DataError(f"{path} asks for volumes of {name} {value} to be drawn: more than {_MOST_VOXELS} voxels. "
                            "Do not trust this file.")  # fmt: skip
    cls = registry.load("data", data.name)
    source: DataSource = cls(validate(cls.Config, data.options, f"the data set of {path}"), root)
    if source.class_names != data.class_names:
        raise DataError(f"{path} scores the classes {', '.join(data.class_names)}, but the data set '{data.name}' has "
                        f"{', '.join(source.class_names)} here. Install {data.version} to verify it.")  # fmt: skip
    return source


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def _scores_of(
    archive: Archive, case: str, volumes: _Volumes, truth: Truth, verdict: Verdict
) -> Iterator[tuple[CellRecord, list[Row]]]:
    """The recomputed rows of one case, cell by cell; nothing where the truth or a label map is not what it was."""
    record, names = archive.manifest.cases[case], archive.manifest.data.class_names
    label = truth(case)
    if (found := truth_checksum(label, record.spacing_mm)) != record.truth_sha256:
        verdict.add(truth_file(case), case, f"the truth ({verdict.truth}) is another one, its SHA-256",
                    record.truth_sha256, found)  # fmt: skip
        return
    for cell in (cell for cell in archive.manifest.cells if case in cell.cases):
        file = prediction_file(cell.name, case)
        try:
            mask = volumes(file, case)
        except (DataError, KeyError) as error:
            verdict.add(file, case, "cannot be scored", "a label map", " ".join(str(error).split()))
            continue
        if int(mask.max()) >= len(names):
            verdict.add(file, case, "holds a class that the data set has not", f"0..{len(names) - 1}", mask.max())
            continue
        verdict.predictions += 1
        yield cell, score_mask(case, mask, label, record.spacing_mm, names, cell.scoring)


def _told_scores(archive: Archive, verdict: Verdict) -> dict[tuple[str, str, str], Row]:
    """scores.csv by cell, case and class; a row that cannot be read is a finding."""
    try:
        text = archive.read(SCORES).decode()
    except (DataError, KeyError, UnicodeDecodeError) as error:
        verdict.add(SCORES, "", "cannot be read", "a table of scores", " ".join(str(error).split()))
        return {}
    told: dict[tuple[str, str, str], Row] = {}
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        verdict.add(SCORES, "", "its columns", ",".join(COLUMNS), ",".join(reader.fieldnames or ()))
        return {}
    for row in reader:
        told[row["cell"], row["case"], row["class"]] = row
    return told


def _compare_rows(computed: list[Row], told: dict[tuple[str, str, str], Row], verdict: Verdict) -> None:
    """Compare recomputed rows with those of scores.csv, which are taken out of ``told``."""
    for row in computed:
        said = told.pop((row["cell"], row["case"], row["class"]), None)
        if said is None:
            verdict.add(SCORES, row["case"], f"the score of {row['cell']}, {row['class']}", "a row", "none")
            continue
        for name in COLUMNS:
            verdict.numbers += name in METRICS
            value = row[name]
            if not (_same(said[name], value) if name in METRICS else said[name] == str(value)):
                what = f"{name} of {row['cell']}, {row['class']}, recomputed from its label map"
                verdict.add(SCORES, row["case"], what, said[name], value)


def _same(said: object, value: float) -> bool:
    """Whether a number as written is the one recomputed; NaN and an empty cell say the same."""
    try:
        number = math.nan if said in (None, "") else float(str(said))
    except ValueError:
        return False
    return (math.isnan(number) and math.isnan(value)) or math.isclose(number, value, rel_tol=RELATIVE, abs_tol=RELATIVE)


def _compare_means(archive: Archive, rows: Mapping[str, list[Row]], verdict: Verdict) -> None:
    """Compare the means of summary.json with those of the recomputed scores, if every cell could be recomputed."""
    import pandas as pd

    from cfrbench.report import frames

    cells = archive.manifest.cells
    # A case that could not be scored has been named already; means without it would only repeat that.
    if any({row["case"] for row in rows[cell.name]} != set(cell.cases) for cell in cells):
        return
    tidy = pd.concat([frames.tidy(pd.DataFrame(_in_order(cell, rows[cell.name])), cell.about) for cell in cells])
    expected = frames.json_rows(frames.summary(tidy), archive.manifest.facts["unit"])
    try:
        told = json.loads(archive.read(SUMMARY))
    except (DataError, KeyError, ValueError) as error:
        verdict.add(SUMMARY, "", "cannot be read", "the means of the table", " ".join(str(error).split()))
        return
    if not isinstance(told, list) or len(told) != len(expected):
        verdict.add(SUMMARY, "", "its rows", len(expected), len(told) if isinstance(told, list) else "no list")
        return
    for said, computed in zip(told, expected, strict=True):
        what = f"of {computed['ssl']}, {computed['variant']}, {computed['labels']} labelled"
        for name, value in computed.items():
            number = isinstance(value, float) or value is None
            verdict.numbers += number
            given = said.get(name) if isinstance(said, dict) else None
            if not (_same(given, math.nan if value is None else value) if number else given == value):
                verdict.add(SUMMARY, "", f"{name} {what}, recomputed", given, value)


def _in_order(cell: CellRecord, rows: list[Row]) -> list[Row]:
    """Rows in the order in which the cell was scored: sums of floats depend on it."""
    place = {case: number for number, case in enumerate(cell.cases)}
    return sorted(rows, key=lambda row: place[row["case"]])
