"""A prepared set: opened from one manifest, volumes mapped when they are asked for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Triple
from cfrbench.errors import DataError, suggest
from cfrbench.files import write_atomic, write_json
from cfrbench.prepared import copies
from cfrbench.prepared.form import (
    CASE,
    IMAGE,
    LABEL,
    MANIFEST,
    SIGNATURES,
    CaseRecord,
    SetRecord,
    case_folder,
    read_record,
)
from cfrbench.prepared.nifti import header_of, nib
from cfrbench.prepared.writing import verify


@dataclass(frozen=True)
class PreparedSet:
    """A folder in the one on-disk form. Nothing but the manifest is read before it is asked for."""

    folder: Path
    record: SetRecord
    _cases: dict[str, CaseRecord] = field(default_factory=dict, repr=False, compare=False)
    _maps: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> PreparedSet:
        """The set in ``folder``; DataError if there is none, or an unfinished one."""
        if not (folder / MANIFEST).is_file():
            why = "its preparation was not finished" if (folder / "cases").is_dir() else "it has no prepared.json"
            raise DataError(f"{folder} is no prepared data set: {why}. Give the command that prepares it (again): "
                            "finished cases are kept.")  # fmt: skip
        return cls(folder, read_record(folder / MANIFEST, SetRecord))

    def case(self, case: str) -> CaseRecord:
        """The record of a case; DataError if the set has none of that name."""
        if case not in self.record.cases:
            raise DataError(f"The data set {self.record.name} has no case '{case}'. "
                            f"{suggest(case, list(self.record.cases)[:50])}")  # fmt: skip
        if case not in self._cases:
            record = read_record(case_folder(self.folder, case) / CASE, CaseRecord)
            if record.fingerprint != self.record.cases[case]:
                raise DataError(f"{case_folder(self.folder, case)} is not the case that {MANIFEST} names: it was "
                                "prepared again, or changed. Prepare the set again.")  # fmt: skip
            self._cases[case] = record
        return self._cases[case]

    def image(self, case: str) -> NDArray[Any]:
        """The image ``(H, W, D)``, int16 or float32, memory-mapped; writing to it changes no file."""
        record = self.case(case)
        found: NDArray[Any] = self._map(case, IMAGE, record.image.bytes)
        return found

    def label(self, case: str) -> NDArray[np.uint8] | None:
        """The label ``(H, W, D)`` uint8, memory-mapped, or None."""
        record = self.case(case)
        return None if record.label is None else self._map(case, LABEL, record.label.bytes)

    def crop(self, case: str, start: Triple, sides: Triple) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None]:
        """A box of image and label as arrays of their own; only its pages are read. It must lie inside the volume."""
        shape = self.case(case).shape
        if any(a < 0 or n < 1 or a + n > side for a, n, side in zip(start, sides, shape, strict=True)):
            raise DataError(f"The box {sides} at {start} does not lie inside {case}, which has shape {shape}.")
        x, y, z = (slice(a, a + n) for a, n in zip(start, sides, strict=True))
        label = self.label(case)
        return self.image(case)[x, y, z].astype(np.float32), None if label is None else np.array(label[x, y, z])

    def verify(self, case: str) -> None:
        """DataError unless the arrays have the checksums of the manifest."""
        wrong = verify(case_folder(self.folder, case), self.case(case))
        if wrong:
            raise DataError(f"{wrong}: the disk or somebody has changed it. Prepare the set again: only what is "
                            "damaged is done anew.")  # fmt: skip

    def signatures(self) -> dict[str, NDArray[np.int8]]:
        """Signature of each case, by which copies are found."""
        path = self.folder / SIGNATURES
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is missing or damaged ({error}). Prepare the set again.") from error
        if table.shape != (len(self.record.cases), copies.LENGTH) or table.dtype != np.int8:
            raise DataError(f"{path} does not belong to {MANIFEST}. Prepare the set again.")
        return dict(zip(self.record.cases, table, strict=True))

    def write_label(self, case: str, label: NDArray[Any], path: Path) -> None:
        """Write a label map ``(H, W, D)`` of a prepared case as NIfTI on the grid of its source file.

        Shape, affine, both transforms with their codes, and orientation are the source's, bit for bit; cropping and
        resampling are undone by the nearest voxel. Sources that were no NIfTI get the affine that is known of them.
        """
        from cfrbench.images import ImageFile, write_label

        record = self.case(case)
        whole = record.placement.restored(label)
        grid = record.grid
        if grid.header:
            header = header_of(base64.b64decode(grid.header))
        else:
            header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), np.asarray(grid.affine)).header
        start = nib.orientations.io_orientation(np.asarray(grid.affine))
        turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(record.axcodes))
        like = ImageFile(case_folder(self.folder, case) / CASE, whole, record.spacing_mm, record.axcodes, grid.shape,
                         header, turn)  # fmt: skip
        write_label(path, whole, like)

    def _map(self, case: str, name: str, length: int) -> Any:
        path = case_folder(self.folder, case) / name
        if path not in self._maps:  # a map that stays has its pages at hand
            self._maps[path] = self._mapped(path, length)
        return self._maps[path]

    def _mapped(self, path: Path, length: int) -> Any:
        try:
            if path.stat().st_size != length:
                raise ValueError(f"it has {path.stat().st_size} bytes, not {length}")
            # "c": torch takes writable memory only; what is written stays in this process.
            return np.load(path, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}). Prepare the set again: only what is damaged is done "
                            "anew.") from error  # fmt: skip


def seal(folder: Path, record: SetRecord, cases: Sequence[CaseRecord]) -> PreparedSet:
    """Write the manifest of a set whose cases are all prepared: from now on it can be opened.

    ``record.cases`` is filled in. DataError if its lists name a case that is not among ``cases``.
    """
    by_name = {case.case: case for case in cases}
    listed = [*record.train, *record.val, *record.test]
    missing = [case for case in listed if case not in by_name]
    if missing:
        raise DataError(f"The lists name {', '.join(missing[:5])}, which {'has' if len(missing) == 1 else 'have'} not "
                        "been prepared. Take them off the lists, or add their files.")  # fmt: skip
    kept = {case: by_name[case].fingerprint for case in listed}
    patients = {case: by_name[case].patient for case in listed}
    bare = tuple(case for case in listed if by_name[case].label is None)
    whole = record.model_copy(update={"cases": kept, "patients": patients, "unlabelled": bare})
    buffer = io.BytesIO()
    np.save(buffer, np.stack([copies.decode(by_name[case].signature) for case in kept]))
    write_atomic(folder / SIGNATURES, buffer.getvalue())
    write_json(folder / MANIFEST, whole)
    return PreparedSet(folder, whole, {case: by_name[case] for case in kept})
