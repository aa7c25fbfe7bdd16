"""NRRD files, as the 2018 Atrial Segmentation Challenge hands them out: the header first, sizes bounded.

pynrrd parses the header; voxels are unpacked here, because what a stranger's file unpacks to must not exceed what its
header announces, and a header must not lead to other files.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfrbench.errors import DataError
from cfrbench.prepared.nifti import LIMIT_GIB, NiftiHeader, nib, require_size, unpacked
from cfrbench.scan_steps import Spacing

#: a header is text of some hundred bytes; its end must come within this
_HEADER_BYTES = 2**16
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"), "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"), "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",), "f8": ("double",),
}  # fmt: skip
_DTYPES = {name: np.dtype(short) for short, names in _TYPES.items() for name in names}
#: sign of each world axis against right, anterior, superior
_SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip


def read_nrrd_header(path: Path, spacing_mm: Spacing, limit_gib: float = LIMIT_GIB) -> NiftiHeader:
    """Read and judge the header of a file with its data attached; ``spacing_mm`` where it states none.

    DataError if it is damaged, too large, no scalar 3D volume, or keeps its voxels in another file.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise DataError(f"{path} does not exist or is empty. Give an NRRD file (.nrrd).")
    try:
        head, offset = _head(path)
        sizes = tuple(int(side) for side in head["sizes"])
        dtype = _DTYPES[head["type"]].newbyteorder("<" if head.get("endian", "little") == "little" else ">")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, error) from error
    if "data file" in head or "datafile" in head:
        raise DataError(f"{path} keeps its voxels in another file. Save it with attached data (.nrrd, not .nhdr).")
    if str(head.get("encoding")) not in ("raw", "gzip", "gz"):
        raise DataError(f"{path} is encoded as {head.get('encoding')}. Save it as raw or gzip.")
    if len(sizes) != 3 or min(sizes) < 1:
        raise DataError(f"{path} has shape {sizes}; one scalar 3D volume is needed. Extract it from the file.")
    x, y, z = sizes
    require_size(path, offset + math.prod(sizes) * dtype.itemsize, sizes, dtype, limit_gib, _is_packed(head))
    affine = _affine(path, head, spacing_mm)
    sx, sy, sz = (float(size) for size in nib.affines.voxel_sizes(affine))
    axcodes = "".join(nib.orientations.ornt2axcodes(nib.orientations.io_orientation(affine)))
    return NiftiHeader(path, (x, y, z), sizes, 0, dtype, offset, 1.0, 0.0, affine, (sx, sy, sz), axcodes, b"")


def read_nrrd_voxels(header: NiftiHeader, scratch: Path) -> NDArray[Any]:
    """The voxels ``(x, y, z)`` on the stored axes: a view of what was unpacked or mapped."""
    try:
        if not _is_packed(_head(header.path)[0]):
            return np.memmap(header.path, header.dtype, "r", header.offset, header.shape, order="F")
        with header.path.open("rb") as file:
            file.seek(header.offset)
            with gzip.GzipFile(fileobj=file) as stream:
                data = unpacked(stream, 0, header.voxel_bytes, scratch)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(header.path, error) from error
    return np.ndarray(header.shape, header.dtype, data, order="F")


def _head(path: Path) -> tuple[Mapping[str, Any], int]:
    """The parsed header and where the data begin; ValueError if it is none."""
    import nrrd

    with path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    blank = re.search(rb"\r?\n\r?\n", start)
    if not start.startswith(b"NRRD") or not blank:
        raise ValueError("it does not begin with an NRRD header")
    try:
        head: Mapping[str, Any] = nrrd.read_header(start[: blank.start()].decode("ascii").splitlines())
    except nrrd.NRRDError as error:
        raise ValueError(str(error)) from error
    return head, blank.end()


def _is_packed(head: Mapping[str, Any]) -> bool:
    return str(head.get("encoding")) in ("gzip", "gz")


def _affine(path: Path, head: Mapping[str, Any], spacing_mm: Spacing) -> NDArray[np.float64]:
    """Voxel indices to mm, right-anterior-superior; a file that states no space is taken as left-posterior-superior."""
    signs = np.asarray(_SPACES.get(str(head.get("space", "lps")).lower(), (-1, -1, 1)), np.float64)
    affine = np.eye(4)
    if "space directions" in head:
        directions = np.asarray(head["space directions"], np.float64)
        if directions.shape != (3, 3) or not np.isfinite(directions).all() or abs(np.linalg.det(directions)) < 1e-12:
            raise DataError(f"{path}: the space directions in its header are no three axes. Repair the header.")
        affine[:3, :3] = signs[:, None] * directions.T
    else:
        steps = np.asarray(head.get("spacings", spacing_mm), np.float64)
        affine[:3, :3] = np.diag(signs * np.where(np.isfinite(steps) & (steps > 0), steps, spacing_mm))
    origin = np.asarray(head.get("space origin", np.zeros(3)), np.float64)
    affine[:3, 3] = signs * np.where(np.isfinite(origin), origin, 0)
    return affine


def _damaged(path: Path, error: Exception) -> DataError:
    cause = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path} is no readable NRRD file ({cause}). It is cut short or damaged: copy it again.")
