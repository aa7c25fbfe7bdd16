"""Small sound files of each kind, which damages spoil and other tests import."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np

from cfrbench.prepared.importing import ImportRequest, import_folder

nib: Any = nibabel
H5 = "{}/mri_norm2.h5"


def volume(number: int) -> tuple[Any, Any]:
    """An image, a bright box on noise, elsewhere for each number, and its label: values 0, 1, 2."""
    rng = np.random.default_rng(number)
    label = np.zeros((16, 16, 16), np.uint8)
    x, y, z = rng.integers(1, 6, 3)
    label[x : x + 8, y : y + 7, z : z + 6] = 1
    label[x : x + 3, y : y + 7, z : z + 6] = 2
    return (rng.normal(0, 20, label.shape) + 100 * label).astype(np.int16), label


def nifti_folder(home: Path, cases: int = 4) -> Path:
    """Small cases in two folders, ``case 0`` and so on."""
    for number in range(cases):
        image, label = volume(number)
        save(home / f"images/case {number}.nii.gz", image)
        save(home / f"labels/case {number}.nii.gz", label)
    return home


def h5_folder(home: Path) -> Path:
    """Three small cases in LA's layout, two for training, and their lists."""
    for number, case in enumerate("abc"):
        label = np.zeros((18, 17, 16), np.uint8)
        label[3:9, 3 + number : 9, 2:8] = 1
        image = np.random.default_rng(number).normal(size=label.shape).astype(np.float32) + 3 * label
        write_h5(home / H5.format(case), image=image, label=label)
    return with_lists(home)


def with_lists(home: Path) -> Path:
    """The lists of `h5_folder`."""
    (home / "train.list").write_text("a\nb\n")
    (home / "test.list").write_text("c\n")
    return home


def prepared_folder(home: Path, source: Path) -> Path:
    """``source``, a `nifti_folder`, imported."""
    done = import_folder(ImportRequest(source, "mine", home.with_name("prepared store")))
    shutil.copytree(done.prepared.folder, home)
    return home


def save(path: Path, voxels: Any, affine: Any = None) -> None:
    """Write voxels as NIfTI, 1 x 1 x 2 mm by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine), path)


def write_h5(path: Path, **members: Any) -> None:
    """Write arrays under their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in members.items():
            file.create_dataset(name, data=array, compression="gzip" if np.ndim(array) else None)


def sound(where: str, home: Path) -> Path:
    """Synthetic sound files for a damage."""
    folder = home / "data"
    if where == "prepared":
        return prepared_folder(folder, nifti_folder(home / "sources"))
    return (nifti_folder if where == "import" else h5_folder)(folder)
