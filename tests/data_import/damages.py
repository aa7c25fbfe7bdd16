"""Every kind of damage that is made on purpose: what is done to sound files, and what must then be said.

Sound files, real or synthetic, lie under the names of `tests.data_import.sound_files`; each damage spoils one of them.
``python -m tests.data_import.damages`` prints the table of docs/damage.md.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np

from cfrbench.errors import CfrbenchError
from cfrbench.prepared.importing import ImportRequest, import_folder
from cfrbench.prepared.inspection import inspect
from cfrbench.prepared.source import ImportedSource
from cfrbench_data.la import LeftAtrium
from tests.data_import.sound_files import H5, save, sound, write_h5

nib: Any = nibabel
Spoil = Callable[[Path], None]
IMAGE, LABEL, OTHER = "images/case 3.nii.gz", "labels/case 3.nii.gz", "images/case 2.nii.gz"


@dataclass(frozen=True)
class Damage:
    """``where``: import, check (LA's h5 files) or prepared. ``says``: what the message holds, the file's name first."""

    where: str
    what: str
    spoil: Spoil
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For the lines of a test run."""
        return f"{self.where}: {self.what}"


def told(damage: Damage, folder: Path) -> str:
    """Spoil ``folder`` (sound files, see below) and return everything that is said about it."""
    damage.spoil(folder)
    if damage.where == "import":
        source = folder / damage.options.get("source", "")
        try:
            import_folder(ImportRequest(source, "mine", folder.with_name("store")))
        except CfrbenchError as error:
            return str(error)
        return ""
    source_of = LeftAtrium(root=folder) if damage.where == "check" else None
    try:
        found = inspect(source_of or ImportedSource(root=folder))
    except CfrbenchError as error:
        return str(error)
    return " ".join(finding.message for finding in found.findings if finding.level == "error")


# ---------------------------------------------------------------------------------------------------------------------
# ways to spoil one file


def _bytes(path: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(home: Path) -> None:
        (home / path).write_bytes(change((home / path).read_bytes()))

    return spoil


def _voxels(path: str, change: Callable[[Any], Any], affine: Any = None) -> Spoil:
    def spoil(home: Path) -> None:
        old = nib.load(home / path)
        stored = np.asarray(old.dataobj)
        save(home / path, change(stored.astype(np.int16)), old.affine if affine is None else affine)

    return spoil


def _h5(case: str, change: Callable[[Any, Any], dict[str, Any]], as_case: str = "") -> Spoil:
    def spoil(home: Path) -> None:
        with h5py.File(home / H5.format(case)) as file:
            image, label = file["image"][()], file["label"][()]
        write_h5(home / H5.format(as_case or case), **change(image, label))

    return spoil


def _text(path: str, text: str) -> Spoil:
    def spoil(home: Path) -> None:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text)

    return spoil


def _gone(path: str) -> Spoil:
    return lambda home: (home / path).unlink()


def _flipped_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def _announces_too_much(content: bytes) -> bytes:
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.float64), np.eye(4)).header
    header.set_data_shape((32000, 32000, 32000))
    return gzip.compress(header.binaryblock + bytes(4))


def _announces_more(content: bytes) -> bytes:
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.int16), np.eye(4)).header
    header.set_data_shape((500, 500, 500))
    return gzip.compress(header.binaryblock + bytes(99))


def _endless(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content) + bytes(2**26 + 2**23), compresslevel=1)


def _colours(voxels: Any) -> Any:
    return np.zeros(voxels.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


def _all_labels(change: Callable[[Any], Any]) -> Spoil:
    def spoil(home: Path) -> None:
        for path in (home / "labels").iterdir():
            _voxels(f"labels/{path.name}", change)(home)

    return spoil


def _copy(turn: Callable[[Any], Any]) -> Spoil:
    """Case 2 once more, as ``other``."""

    def spoil(home: Path) -> None:
        for part in ("images", "labels"):
            old = nib.load(home / part / "case 2.nii.gz")
            save(home / part / "other.nii.gz", turn(np.asarray(old.dataobj)), old.affine)

    return spoil


def _link(target: str) -> Spoil:
    def spoil(home: Path) -> None:
        outside = home.with_name("elsewhere.nii.gz")
        shutil.copy(home / IMAGE, outside)
        (home / IMAGE).unlink()
        os.symlink(home.with_name(target), home / IMAGE)

    return spoil


def _dicom(home: Path) -> None:
    (home / "scan" / "series").mkdir(parents=True)
    (home / "scan" / "series" / "000001").write_bytes(bytes(128) + b"DICM" + bytes(99))


def _csv(*lines: str) -> Spoil:
    return _text("pairs.csv", "\n".join(lines) + "\n")


def _outside(home: Path) -> None:
    shutil.copy(home / IMAGE, home.with_name("elsewhere.nii.gz"))
    _csv("image,label", "../elsewhere.nii.gz,")(home)


def _channels(home: Path) -> None:
    for path in list((home / "images").iterdir()):
        stem = path.name.removesuffix(".nii.gz")
        shutil.copy(path, path.with_name(f"{stem}_0001.nii.gz"))
        path.rename(path.with_name(f"{stem}_0000.nii.gz"))


def _plain_too(home: Path) -> None:
    (home / IMAGE.removesuffix(".gz")).write_bytes(gzip.decompress((home / IMAGE).read_bytes()))


def _no_affine(home: Path) -> None:
    header = bytearray(gzip.decompress((home / IMAGE).read_bytes()))
    header[252:256] = (0).to_bytes(2, "little") + (1).to_bytes(2, "little")  # qform_code 0, sform_code 1
    header[280:328] = bytes(48)  # srow_x, srow_y, srow_z
    (home / IMAGE).write_bytes(gzip.compress(bytes(header)))


def _other_names(home: Path) -> None:
    for path in list((home / "labels").iterdir()):
        path.rename(path.with_name(path.name.replace("case", "patient")))


def _array(change: Callable[[bytes], bytes]) -> Spoil:
    return _bytes("cases/case 3/image.npy", change)


def _replaced(home: Path) -> None:
    record = json.loads((home / "cases/case 2/case.json").read_text()) | {"case": "case 3"}
    (home / "cases/case 3/case.json").write_text(json.dumps(record))


# ---------------------------------------------------------------------------------------------------------------------
# the table

IMPORT = [
    ("an image of 0 bytes", _bytes(IMAGE, lambda b: b""), ("case 3.nii.gz is empty",)),
    ("an image that was cut short", _bytes(IMAGE, lambda b: b[: len(b) // 2]), (IMAGE, "cut short")),
    ("one damaged byte in a compressed image", _bytes(IMAGE, _flipped_bit), (IMAGE, "damaged")),
    ("no gzip, but named .gz", _bytes(IMAGE, gzip.decompress), (IMAGE, "damaged")),
    ("a text under the name of an image", _bytes(IMAGE, lambda b: gzip.compress(b"no scan" * 99)),
     (IMAGE, "NIfTI header")),
    ("a header that announces terabytes (gzip bomb)", _bytes(IMAGE, _announces_too_much), (IMAGE, "above the limit")),
    ("more voxels announced than the file can hold", _bytes(IMAGE, _announces_more),
     (IMAGE, "cannot hold")),
    ("a stream that does not end (gzip bomb)", _bytes(IMAGE, _endless), (IMAGE, "long after")),
    ("a 4D image", _voxels(IMAGE, lambda v: np.stack([v] * 3, -1)), (IMAGE, "--channel")),
    ("an RGB image", _voxels(IMAGE, _colours), (IMAGE, "colours")),
    ("complex voxels", _voxels(IMAGE, lambda v: v.astype(np.complex64)), (IMAGE, "complex64")),
    ("a single slice", _voxels(IMAGE, lambda v: v[:, :, 0]), (IMAGE, "3D volume")),
    ("NaN voxels", _voxels(IMAGE, lambda v: np.where(v > 50, np.nan, v).astype(np.float32)), (IMAGE, "NaN")),
    ("a constant image", _voxels(IMAGE, lambda v: v * 0 + 7), (IMAGE, "every voxel of the image is 7")),
    ("an affine of zeros", _no_affine, (IMAGE, "not invertible")),
    ("a label of another shape", _voxels(LABEL, lambda v: v[:, :, 1:]), (LABEL, IMAGE, "one grid")),
    ("a label that lies elsewhere than its image", _voxels(LABEL, lambda v: v, np.diag([1.0, 1.0, 3.0, 1.0])),
     (LABEL, "elsewhere")),
    ("a label of 0 bytes", _bytes(LABEL, lambda b: b""), ("labels/case 3.nii.gz is empty",)),
    ("probabilities instead of class numbers", _voxels(LABEL, lambda v: (v / 2.5).astype(np.float32)),
     (LABEL, "not whole numbers")),
    ("the image saved under the label's name", _voxels(LABEL, lambda v: v - 100), (LABEL, "the image, saved")),
    ("labels numbered 0, 5, 7", _all_labels(lambda v: np.select([v == 1, v == 2], [5, 7]).astype(np.uint8)),
     ("0, 5, 7", "--labels-map")),
    ("no labelled voxel anywhere", _all_labels(lambda v: v * 0), ("nothing to learn",)),
    ("a value that dataset.json does not name", _text("dataset.json", '{"labels": {"background": 0, "organ": 1}}'),
     ("labels/case 0.nii.gz", "dataset.json does not name")),
    ("a dataset.json that is no JSON", _text("dataset.json", "{"), ("dataset.json", "no readable JSON")),
    ("two images of one case", _plain_too, ("case 3.nii.gz", "case 3.nii ", "both the case")),
    ("labels under other names than images", _other_names, ("no label has the name of an image", "case 0.nii.gz")),
    ("several channels of each case", _channels, ("images", "0, 1", "--channel")),
    ("a link that leads out of the folder", _link("elsewhere.nii.gz"), (IMAGE, "leads out of the folder")),
    ("a link to nothing", _link("nothing.nii.gz"), (IMAGE, "does not exist")),
    ("one image under two names", _copy(lambda v: v), ("case 2", "other", "voxel for voxel")),
    ("one image under two names, flipped", _copy(lambda v: v[::-1].copy()), ("case 2", "other", "flipped")),
    ("one image under two names, turned and scaled", _copy(lambda v: np.rot90(v, axes=(0, 1)).copy()),
     ("case 2", "other")),
    ("a folder of DICOM files", _dicom, ("scan", "DICOM", "dcm2niix"), {"source": "scan"}),
    ("a folder without scans", _text("notes/notes.txt", "none"), ("notes", "no NIfTI file"), {"source": "notes"}),
    ("an empty folder", lambda home: (home / "void").mkdir(), ("void is empty",), {"source": "void"}),
    ("a folder that is not there", lambda home: None, ("nowhere does not exist",), {"source": "nowhere"}),
    ("a table that names a missing file", _csv("image,label", "images/case 9.nii.gz,"), ("case 9.nii.gz", "no file"),
     {"source": "pairs.csv"}),
    ("a table that leads out of its folder", _outside,
     ("elsewhere.nii.gz", "outside"), {"source": "pairs.csv"}),
    ("a table with an unknown split", _csv("image,split", f"{IMAGE},learn"), ("line 2", "'learn'"),
     {"source": "pairs.csv"}),
    ("a patient in two lists", _csv("image,label,patient,split", f"{IMAGE},{LABEL},p,train",
                                    f"{OTHER},labels/case 2.nii.gz,p,test"),
     ("case 3", "case 2", "of the patient 'p'"), {"source": "pairs.csv"}),
]  # fmt: skip

CHECK = [
    ("a folder without its file", _gone(H5.format("b")), ("case b", "mri_norm2.h5")),
    ("a file that was cut short", _bytes(H5.format("b"), lambda b: b[: len(b) // 2]), (H5.format("b"), "cut short")),
    ("a file of 0 bytes", _bytes(H5.format("b"), lambda b: b""), (H5.format("b"), "HDF5")),
    ("a text under the name of a case", _text(H5.format("b"), "<html>"), (H5.format("b"), "HDF5")),
    ("no label in the file", _h5("b", lambda i, t: {"image": i}), (H5.format("b"), "no array 'label'")),
    ("words instead of numbers", _h5("b", lambda i, t: {"image": i, "label": "left atrium"}),
     (H5.format("b"), "not a number")),
    ("image and label of different shapes", _h5("b", lambda i, t: {"image": i, "label": t[1:]}),
     (H5.format("b"), "one grid")),
    ("an image of four axes", _h5("b", lambda i, t: {"image": i[None], "label": t}), (H5.format("b"), "3D volume")),
    ("NaN voxels", _h5("b", lambda i, t: {"image": i / np.where(t, np.nan, 1), "label": t}), (H5.format("b"), "NaN")),
    ("a constant image", _h5("b", lambda i, t: {"image": i * 0, "label": t}), (H5.format("b"), "every voxel")),
    ("label values outside the classes", _h5("b", lambda i, t: {"image": i, "label": t * 9}), (H5.format("b"), "0..9")),
    ("probabilities instead of class numbers", _h5("b", lambda i, t: {"image": i, "label": t * 0.4}),
     (H5.format("b"), "not whole numbers")),
    ("a case in both lists", _text("test.list", "a\n"), ("a stand in the train list and in the test list",)),
    ("a list that names a case twice", _text("train.list", "a\nb\nb\n"), ("train.list", "more than once")),
    ("an empty list", _text("test.list", "\n"), ("test.list", "no case")),
    ("a path in a list", _text("test.list", "../c\n"), ("test.list", "not a case id")),
    ("one list without the other", _gone("test.list"), ("train.list", "no test.list")),
    ("one volume under two names", _h5("a", lambda i, t: {"image": i, "label": t}, "b"), ("a = b",)),
    ("a test volume that also trains", _h5("a", lambda i, t: {"image": i.astype(np.float64), "label": t}, "c"),
     ("a = c", "train and test")),
    ("a test volume that also trains, flipped and scaled",
     _h5("a", lambda i, t: {"image": 5 * i[:, ::-1] - 1, "label": t[:, ::-1]}, "c"),
     ("a = c", "flipped", "different lists")),
]  # fmt: skip

PREPARED = [
    ("a changed array", _array(lambda b: b[:-1] + bytes([b[-1] ^ 1])), ("case 3/image.npy", "checksum")),
    ("an array that was cut short", _array(lambda b: b[:-9]), ("case 3/image.npy", "checksum")),
    ("a missing array", _gone("cases/case 3/image.npy"), ("case 3/image.npy", "missing")),
    ("another case in its place", _replaced, ("cases/case 3", "not the case")),
    ("a manifest that was cut short", _bytes("prepared.json", lambda b: b[:99]), ("prepared.json", "damaged")),
    ("no manifest: preparation was stopped", _gone("prepared.json"), ("not finished",)),
]

DAMAGES = [
    Damage(where, *row)  # type: ignore[arg-type]
    for where, rows in (("import", IMPORT), ("check", CHECK), ("prepared", PREPARED))
    for row in rows
]


# ---------------------------------------------------------------------------------------------------------------------
# docs/damage.md


def row(damage: Damage, said: str, home: Path) -> str:
    """The damage's line of the table: its message without folders of this machine and words of libraries."""
    shown = said.replace(f"{home}/data/", "").replace(f"{home}/data", "DIR").replace(f"{home}/", "../")
    shown = re.sub(
        r"(readable \w+|readable \w+ file|damaged) \(.*?\)( It|\. It|\. Give|\. Repair)", r"\1 (...)\2", shown
    )
    return f"| {damage.what} | {shown.replace('|', chr(92) + '|')} |"


def tables() -> dict[str, str]:
    """The table of each kind of data."""
    found = {}
    for where in ("import", "check", "prepared"):
        lines = []
        for damage in (d for d in DAMAGES if d.where == where):
            with tempfile.TemporaryDirectory() as home:
                lines.append(row(damage, told(damage, sound(damage.where, Path(home))), Path(home)))
        found[where] = "\n".join(["| damage | what is said |", "|---|---|", *lines])
    return found


if __name__ == "__main__":
    import sys

    for where, text in tables().items():
        sys.stdout.write(f"<!-- {where} -->\n{text}\n\n")
