"""NIfTI in and out: an image becomes an array, a label map goes back onto exactly the grid the image came from.

Only whole axes are permuted and flipped, never resampled: what leaves is the exact inverse of what came in, for
rotated, oblique and anisotropic grids too.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from cfrbench.errors import DataError, StoreError
from cfrbench.files import write_atomic

nib: Any = nibabel  # half-typed upstream: a strict checker objects to every call otherwise

SUFFIXES = (".nii.gz", ".nii")
_MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


@dataclass(frozen=True)
class ImageFile:
    """A NIfTI file as the networks see it, and the way back.

    array: ``(H, W, D)`` along `axcodes`, float32 (uint8 from `read_label`). spacing_mm: voxel size of those axes.
    stored_shape, header: as in the file. orientation: ``(3, 2)`` nibabel orientation from the stored axes to these.
    """

    path: Path
    array: NDArray[Any]
    spacing_mm: tuple[float, float, float]
    axcodes: str
    stored_shape: tuple[int, ...]
    header: Any
    orientation: NDArray[np.float64]


def find_images(path: Path) -> list[Path]:
    """``path`` itself, or the NIfTI files in it sorted by name; DataError if there is none or two share a name."""
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a NIfTI file (.nii, .nii.gz) or a folder of them.")
    if not path.is_dir():
        _require_nifti(path)
        return [path]
    found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
    if not found:
        raise DataError(f"The folder {path} holds no NIfTI file. Convert the images to .nii or .nii.gz.")
    stems = [image_stem(p) for p in found]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DataError(f"The folder {path} holds {', '.join(twice)} both as .nii and as .nii.gz. Keep one of them.")
    return found


def image_stem(path: Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def read_image(path: Path, axcodes: str | None = None) -> ImageFile:
    """Read a 3D image as float32, its axes turned to ``axcodes`` ("RAS", ...) or left as stored for None.

    DataError if the file is missing, damaged, not 3D, not finite, or constant.
    """
    image = _read(path, axcodes, "scalar intensities")
    infinite = int((~np.isfinite(image.array)).sum())
    if infinite:
        raise DataError(f"{path}: the image holds {infinite} NaN or infinite voxels. Replace them and try again.")
    if image.array.min() == image.array.max():
        raise DataError(f"{path}: every voxel is {float(image.array.flat[0]):g}; there is nothing to segment. The file "
                        "may be damaged: convert it again.")  # fmt: skip
    return image


def read_label(path: Path, axcodes: str | None = None) -> ImageFile:
    """Read a label map as uint8; like `read_image`, but a constant map is allowed and values must be whole, 0..255."""
    image = _read(path, axcodes, "class numbers")
    whole = np.round(image.array)
    # Maps stored with scaling come back as 0.9999. NaN fails this comparison, as it must.
    if not (np.abs(whole - image.array) <= 1e-3).all() or whole.min() < 0 or whole.max() > 255:
        raise DataError(f"{path} is no label map: its values are not whole numbers from 0 to 255. Store one class "
                        "number a voxel.")  # fmt: skip
    return ImageFile(**{**vars(image), "array": whole.astype(np.uint8)})


def write_label(path: Path, label: NDArray[Any], like: ImageFile) -> None:
    """Write a label ``(H, W, D)`` on the axes of ``like`` as uint8 NIfTI on the original grid, atomically.

    Shape, affine, qform and sform with their codes, and units are those of the original file; intensity scaling,
    display range and header extensions describe the image and are dropped. The same label gives the same bytes.
    """
    _require_nifti(path)
    if path.exists() and path.samefile(like.path):
        raise DataError(f"{path} is the image itself; a label map would overwrite it. Choose another output name.")
    if label.shape != like.array.shape:
        raise DataError(f"{path}: the label has shape {label.shape}, the image {like.path} {like.array.shape}. "
                        "Predict on the array that was read from that file.")  # fmt: skip
    if label.dtype.kind not in "biu" or label.min() < 0 or label.max() > 255:
        raise DataError(f"{path}: a label map holds whole numbers from 0 to 255, not {label.dtype} from "
                        f"{label.min()} to {label.max()}. Pass class numbers.")  # fmt: skip
    stored = _turn(label.astype(np.uint8), _inverse(like.orientation)).reshape(like.stored_shape)
    header = like.header.copy()
    header.set_data_dtype(np.uint8)
    header.extensions.clear()
    for field in ("cal_min", "cal_max", "glmin", "glmax"):
        if field in header:
            header[field] = 0
    # No affine is passed on purpose: nibabel then leaves both of the header's transforms, and their codes, as they are.
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    payload = kind(stored, None, header).to_bytes()
    _replace(path, gzip.compress(payload, mtime=0) if path.name.endswith(".gz") else payload)


def encode_volume(array: NDArray[Any], spacing_mm: Sequence[float], axcodes: str) -> bytes:
    """A ``.nii.gz`` of an array ``(H, W, D)`` along ``axcodes``, in the array's type; equal arrays give equal bytes.

    Voxel size and orientation are kept; where the scan stood in the scanner is not known to an array.
    """
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(_checked_axcodes(axcodes))):
        affine[int(world), axis] = sign * spacing_mm[axis]
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), mtime=0)


def _read(path: Path, axcodes: str | None, content: str) -> ImageFile:
    target = None if axcodes is None else _checked_axcodes(axcodes)
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file. Give a NIfTI file (.nii, .nii.gz).")
    _require_nifti(path)
    try:
        _verify_gzip(path)
        image = nib.load(path)
        if not isinstance(image, nib.Nifti1Image):
            raise ValueError(f"it is a {type(image).__name__}")
        shape, header = image.shape, image.header
        _require_scalar_volume(path, shape, header.get_data_dtype(), content)
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and are reported as such
            stored = np.asarray(image.dataobj, dtype=np.float32).reshape(shape[:3])
        start = _orientation(path, image.affine)
    except _DAMAGE as error:
        cause = " ".join(str(error).split())  # nibabel writes over several lines
        raise DataError(f"{path} is no readable NIfTI file ({cause}). It is cut short or damaged: copy or convert it "
                        "again.") from error  # fmt: skip
    turn = nib.orientations.ornt_transform(start, start if target is None else nib.orientations.axcodes2ornt(target))
    codes = "".join(nib.orientations.ornt2axcodes(start)) if target is None else target
    spacing_mm = _spacing_mm(image.affine, header, turn)
    return ImageFile(path, _turn(stored, turn), spacing_mm, codes, tuple(shape), header.copy(), turn)


def _require_nifti(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path} is not named as a NIfTI file. Convert to .nii or .nii.gz, or correct the name.")


def _verify_gzip(path: Path) -> None:
    """Read a compressed file to its end, where the checksum is; nibabel stops before it and returns damaged voxels."""
    if path.name.endswith(".gz"):
        with gzip.open(path) as file:
            while file.read(1 << 22):
                continue


def _require_scalar_volume(path: Path, shape: Sequence[int], dtype: np.dtype[Any], content: str) -> None:
    # Trailing axes of length one are common (a "time series" of one volume) and harmless.
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or 0 in shape:
        raise DataError(f"{path} has shape {tuple(shape)}; one 3D volume is needed. Extract the volume you want and "
                        "save it as its own file.")  # fmt: skip
    if dtype.kind not in "biuf":
        raise DataError(f"{path} stores {dtype} voxels; {content} are needed. Convert the image to one plain number a "
                        "voxel.")  # fmt: skip


def _checked_axcodes(axcodes: str) -> str:
    pairs = ("LR", "PA", "IS")
    if len(axcodes) != 3 or any(sum(code in pair for code in axcodes) != 1 for pair in pairs):
        raise DataError(f"'{axcodes}' is no orientation. Name the direction of each axis once, as in RAS or LPS.")
    return axcodes


def _orientation(path: Path, affine: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise DataError(f"{path}: the affine in its header is not invertible, so the axes have no direction. Repair "
                        "the header.")  # fmt: skip
    turn: NDArray[np.float64] = nib.orientations.io_orientation(affine)
    return turn


def _spacing_mm(affine: NDArray[np.float64], header: Any, turn: NDArray[np.float64]) -> tuple[float, float, float]:
    # From the affine, which decides where voxels are; `pixdim` may contradict it where only an sform was edited.
    sizes = nib.affines.voxel_sizes(affine) * _MM[header.get_xyzt_units()[0]]
    x, y, z = (float(sizes[axis]) for axis in np.argsort(turn[:, 0]))
    return x, y, z


def _turn(array: NDArray[Any], turn: NDArray[np.float64]) -> NDArray[Any]:
    return np.ascontiguousarray(nib.orientations.apply_orientation(array, turn))


def _inverse(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    identity = nib.orientations.axcodes2ornt("RAS")
    back: NDArray[np.float64] = nib.orientations.ornt_transform(identity, turn)
    return back


def _replace(path: Path, payload: bytes) -> None:
    """Write the whole file or nothing; DataError if the folder does not take it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, payload)
    except (OSError, StoreError) as error:
        raise DataError(f"{path} cannot be written: {error}. Choose a folder you may write to.") from error
