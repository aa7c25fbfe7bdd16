"""NIfTI files from strangers: nothing is unpacked before the header has said how much that would be.

`read_header` reads the first bytes of a file; `read_voxels` unpacks exactly what they announce, once, checksum
included, and gives the voxels as a view of the bytes. Huge files are unpacked beside the result and mapped.
"""

from __future__ import annotations

import gzip
import math
import mmap
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from cfrbench.config import Triple
from cfrbench.errors import DataError
from cfrbench.scan_steps import Spacing

nib: Any = nibabel  # half-typed upstream

SUFFIXES = (".nii.gz", ".nii")
#: what one file may hold unpacked; the command line offers another limit
LIMIT_GIB = 16.0
#: unpacked in memory up to this, beside the result above
_IN_MEMORY = 2**29
_PIECE = 2**22
#: no deflate stream grows by more than this: a file that announces more is cut short or lies
_LARGEST_RATIO = 1032
_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
_DAMAGE = (OSError, EOFError, ValueError, zlib.error, nib.spatialimages.HeaderDataError)


@dataclass(frozen=True)
class NiftiHeader:
    """What a NIfTI file announces. shape: of one volume, on the stored axes; channel: which of several is meant."""

    path: Path
    shape: Triple
    stored_shape: tuple[int, ...]
    channel: int
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    affine: NDArray[np.float64]
    spacing_mm: Spacing
    axcodes: str
    block: bytes  # the header itself

    @property
    def voxel_bytes(self) -> int:
        """What its voxels take unpacked."""
        return math.prod(self.stored_shape) * self.dtype.itemsize

    def turn(self, axcodes: str) -> NDArray[np.float64]:
        """The nibabel orientation ``(3, 2)`` from the stored axes to ``axcodes``."""
        start = nib.orientations.io_orientation(self.affine)
        turn: NDArray[np.float64] = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axcodes))
        return turn

    def turned(self, array: NDArray[Any], axcodes: str) -> NDArray[Any]:
        """``array`` on the stored axes as a view on ``axcodes``."""
        view: NDArray[Any] = nib.orientations.apply_orientation(array, self.turn(axcodes))
        return view

    def turned_shape(self, axcodes: str) -> Triple:
        """Sides along ``axcodes``."""
        x, y, z = (self.shape[axis] for axis in np.argsort(self.turn(axcodes)[:, 0]))
        return x, y, z

    def turned_affine(self, axcodes: str) -> NDArray[np.float64]:
        """The affine of the array on ``axcodes``."""
        inverse = nib.orientations.inv_ornt_aff(self.turn(axcodes), self.shape)
        affine: NDArray[np.float64] = self.affine @ inverse
        return affine

    def turned_spacing(self, axcodes: str) -> Spacing:
        """Voxel size in mm along ``axcodes``."""
        x, y, z = (self.spacing_mm[axis] for axis in np.argsort(self.turn(axcodes)[:, 0]))
        return x, y, z


def case_stem(path: Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``, whatever their case."""
    name = path.name
    for suffix in (".gz", ".nii"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


# ---------------------------------------------------------------------------------------------------------------------
# headers


def read_header(path: Path, channel: int | None = None, limit_gib: float = LIMIT_GIB) -> NiftiHeader:
    """Read and judge the header of a file; DataError if it is damaged, too large, or no scalar 3D volume."""
    _require_file(path)
    try:
        with _opened(path) as file:
            head = file.read(540)
        header = _parsed(head)
        shape = tuple(int(side) for side in header.get_data_shape())
        dtype, affine = header.get_data_dtype(), np.asarray(header.get_best_affine(), dtype=np.float64)
        slope, intercept = (
            _or(value, default) for value, default in zip(header.get_slope_inter(), (1, 0), strict=True)
        )
        offset = int(header.get_data_offset())
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    _require_scalar(path, dtype)
    volume, chosen = _volume(path, shape, channel)
    require_size(path, offset + math.prod(shape) * dtype.itemsize, shape, dtype, limit_gib)
    spacing, axcodes = _geometry(path, affine, header)
    return NiftiHeader(path, volume, shape, chosen, dtype, offset, slope, intercept, affine, spacing, axcodes,
                       header.binaryblock)  # fmt: skip


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file. Give a NIfTI file (.nii, .nii.gz).")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path} is not named as a NIfTI file. Convert to .nii or .nii.gz, or correct the name.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes): a copy or download broke off. Fetch it again, or remove it.")


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _parsed(head: bytes) -> Any:
    if len(head) < 348:
        raise ValueError(f"its header ends after {len(head)} bytes")
    kind = nib.Nifti2Header if 540 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")) \
        else nib.Nifti1Header  # fmt: skip
    if kind is nib.Nifti1Header and head[344:347] not in (b"n+1", b"ni1"):
        raise ValueError("it does not begin with a NIfTI header")
    return kind(head[: kind.template_dtype.itemsize], check=True)


def _or(value: Any, default: float) -> float:
    return default if value is None else float(value)


def _require_scalar(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.fields is not None:
        raise DataError(f"{path} stores colours ({len(dtype.fields)} numbers a voxel), not intensities or class "
                        "numbers. Convert it to one number a voxel.")  # fmt: skip
    if dtype.kind not in "biuf":
        raise DataError(f"{path} stores {dtype} voxels, not plain numbers. Convert it to integers or floats.")


def _volume(path: Path, shape: tuple[int, ...], channel: int | None) -> tuple[Triple, int]:
    if len(shape) < 3 or 0 in shape:
        raise DataError(f"{path} has shape {shape}; a 3D volume is needed. Stack the slices of a case in one file.")
    more = [side for side in shape[3:] if side != 1]
    count = math.prod(more)
    if more and channel is None:
        raise DataError(f"{path} has shape {shape}: {count} volumes in one file. Say which one is meant with --channel "
                        f"0 to {count - 1}, or extract it.")  # fmt: skip
    if channel is not None and more and not 0 <= channel < count:
        raise DataError(f"{path} holds {count} volumes, and --channel {channel} is none of 0 to {count - 1}.")
    x, y, z = shape[:3]
    return (x, y, z), (channel or 0) if more else 0


def require_size(path: Path, announced: int, shape: tuple[int, ...], dtype: np.dtype[Any], limit_gib: float,
                 packed: bool | None = None) -> None:  # fmt: skip
    """DataError unless so many bytes, header included, are within the limit and can come out of the file."""
    size = path.stat().st_size
    if announced > limit_gib * 2**30:
        raise DataError(f"{path} announces {shape} voxels of {dtype}: {announced / 2**30:.1f} GiB unpacked, above the "
                        f"limit of {limit_gib:g} GiB. If that is right, allow it with --max-gib.")  # fmt: skip
    packed = path.name.lower().endswith(".gz") if packed is None else packed
    room = size * _LARGEST_RATIO if packed else size
    if announced > room:
        raise DataError(f"{path} announces {shape} voxels of {dtype}, but its {size} bytes cannot hold them: the file "
                        "is cut short or its header is wrong. Copy or convert it again.")  # fmt: skip


def _geometry(path: Path, affine: NDArray[np.float64], header: Any) -> tuple[Spacing, str]:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{path}: the affine in its header is not invertible, so the axes have no direction. Repair "
                        "the header.")  # fmt: skip
    # From the affine, which decides where voxels are; `pixdim` may contradict it where only an sform was edited.
    x, y, z = (float(size) for size in nib.affines.voxel_sizes(affine) * _MM[header.get_xyzt_units()[0]])
    axcodes = "".join(nib.orientations.ornt2axcodes(nib.orientations.io_orientation(affine)))
    return (x, y, z), axcodes


def _damaged(path: Path, error: Exception) -> DataError:
    cause = " ".join(str(error).split())  # libraries write over several lines
    return DataError(f"{path} is no readable NIfTI file ({cause}). It is cut short or damaged: copy or convert it "
                     "again.")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# voxels


def read_voxels(header: NiftiHeader, scratch: Path) -> NDArray[Any]:
    """The voxels ``(x, y, z)`` on the stored axes, not yet scaled: a read-only view of what was unpacked or mapped."""
    try:
        if not header.path.name.lower().endswith(".gz"):
            whole: Any = np.memmap(header.path, np.uint8, mode="r", offset=header.offset, shape=(header.voxel_bytes,))
            return _shaped(header, memoryview(whole))
        return _shaped(header, _unpacked(header, scratch))
    except _DAMAGE as error:
        raise _damaged(header.path, error) from error


def _shaped(header: NiftiHeader, data: Any) -> NDArray[Any]:
    x, y, z = header.shape
    channels = np.ndarray((x, y, z, math.prod(header.stored_shape[3:])), header.dtype, data, order="F")
    return channels[..., header.channel]


def _unpacked(header: NiftiHeader, scratch: Path) -> Any:
    with gzip.open(header.path) as file:
        return unpacked(file, header.offset, header.voxel_bytes, scratch)


def unpacked(file: gzip.GzipFile, offset: int, length: int, scratch: Path) -> Any:
    """``length`` unpacked bytes from ``offset`` on as one buffer, the gzip checksum verified; mapped if they are many.

    ValueError if the file holds less, or goes on long after them.
    """
    target = _room(length, scratch)
    view = memoryview(target)
    skipped = len(file.read(offset))
    done = 0
    while done < len(view) and (count := file.readinto(view[done : done + _PIECE])):
        done += count
    if skipped < offset or done < len(view):
        raise ValueError(f"it ends after {done} of {len(view)} bytes of voxels")
    # The checksum stands at the very end; whatever lies before it may not be endless.
    extra = 0
    while piece := file.read(_PIECE):
        extra += len(piece)
        if extra > 16 * _PIECE:
            raise ValueError("it goes on long after the voxels its header announces")
    return target


def _room(length: int, scratch: Path) -> Any:
    if length <= _IN_MEMORY:
        return bytearray(length)
    path = scratch / "voxels.tmp"
    with path.open("wb+") as file:
        file.truncate(length)
        mapped = mmap.mmap(file.fileno(), length)
    path.unlink()  # it lives as long as it is mapped
    return mapped


def header_of(block: bytes) -> Any:
    """The nibabel header of stored bytes."""
    return (nib.Nifti2Header if len(block) == 540 else nib.Nifti1Header).from_fileobj(BytesIO(block), check=False)
