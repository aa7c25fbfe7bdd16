"""Reads cases that the field passes around as bare arrays: HDF5 with members image and label, pairs of ``.npy``.

Such files state no voxel size and no orientation; the data set does, in its `ArrayReading`. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Frozen, Triple
from cfrbench.errors import DataError
from cfrbench.prepared.nifti import LIMIT_GIB, nib, require_size
from cfrbench.prepared.writing import CaseJob, RawCase
from cfrbench.scan_steps import Spacing


class ArrayReading(Frozen):
    """What is known of arrays whose files do not say it. axes: those of the file that become H, W and D."""

    axes: Triple = (0, 1, 2)
    spacing_mm: Spacing = (1.0, 1.0, 1.0)
    axcodes: str = "RAS"


def read_arrays(job: CaseJob, scratch: Path) -> RawCase:
    """The reader of `CaseJob`s whose files are ``pair`` (HDF5), or ``image`` and ``label`` (.npy)."""
    reading = ArrayReading.model_validate(dict(job.options))
    pair = job.files.get("pair")
    if pair is not None:
        image, label = read_h5(pair)
    else:
        image = read_npy(job.files["image"])
        label = read_npy(job.files["label"])
    return RawCase(_turned(image, reading), _turned(label, reading), reading.spacing_mm, affine_of(reading),
                   reading.axcodes)  # fmt: skip


def _turned(array: NDArray[Any], reading: ArrayReading) -> NDArray[Any]:
    # Arrays of other rank pass: whoever checks volumes reports their shape.
    return array.transpose(reading.axes) if array.ndim == 3 else array


def affine_of(reading: ArrayReading) -> NDArray[np.float64]:
    """The affine of an array of which orientation and voxel size alone are known; the first voxel is the origin."""
    directions = nib.orientations.axcodes2ornt(reading.axcodes)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (world, sign) in enumerate(directions):
        affine[int(world), axis] = sign * reading.spacing_mm[axis]
    return affine


def read_h5(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """The members ``image`` and ``label`` of an HDF5 file, as stored; DataError if one is missing or damaged."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return _member(path, file, "image"), _member(path, file, "label")
    except (OSError, RuntimeError) as error:  # h5py raises either, by where the damage lies
        raise DataError(f"{path} is no readable HDF5 file ({error}). It is missing, cut short or damaged: copy it "
                        "again from where you got it.") from error  # fmt: skip


def _member(path: Path, file: Any, name: str) -> NDArray[Any]:
    import h5py

    if not isinstance(file.get(name), h5py.Dataset):
        raise DataError(f"{path} has no array '{name}'; it holds {', '.join(sorted(file)) or 'nothing'}. "
                        "A case needs the members 'image' and 'label'.")  # fmt: skip
    data = file[name]
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or data.external:
        raise DataError(f"{path}: the member '{name}' lies in another file. Store it in this one.")
    require_size(path, data.size * data.dtype.itemsize, data.shape, data.dtype, LIMIT_GIB, packed=True)
    return _numbers(path, np.asarray(data[()]), f"the member '{name}'")


def read_npy(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file, memory-mapped; DataError if it is damaged or holds objects (no pickle is read)."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no readable .npy file ({error}). It is missing, cut short or damaged: copy it "
                        "again from where you got it.") from error  # fmt: skip
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is an archive of several arrays. Store one array in each .npy file.")
    return _numbers(path, array, "the array")


def _numbers(path: Path, array: NDArray[Any], what: str) -> NDArray[Any]:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{path}: {what} has type {array.dtype}, which is not a number. Store image and "
                        "label as numbers.")  # fmt: skip
    # torch knows neither unsigned integers above 8 bits nor foreign byte order: pass those on as 64-bit numbers.
    plain = array.dtype.isnative and array.dtype.name not in ("uint16", "uint32", "uint64", "float128", "longdouble")
    return array if plain else array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
