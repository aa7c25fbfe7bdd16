"""Grey photographs in the size of a slice: from a PASCAL VOC 2012 folder, any folder of images, or scikit-image.

The photographs inside scikit-image are enough to run, not to reproduce the paper, which used 2,913 of VOC. Where each
comes from and on what terms is written at the function of its name in ``skimage.data``; VOC's are under Flickr's terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from cfrbench.config import digest
from cfrbench.errors import DataError
from cfrbench.weights import digest_of

#: the natural scenes and textures inside the scikit-image wheel; what else is there are pages, drawings, microscopy
PACKAGED = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png",
    "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg",
)  # fmt: skip
SUFFIXES = {".jpg", ".jpeg", ".png"}
#: places of PASCAL VOC 2012 below the folder it was unpacked in
DEVKITS = (".", "VOC2012", "VOCdevkit/VOC2012")
#: the 2,913 images of VOC 2012's segmentation task, those of the paper
VOC_LIST = Path("ImageSets", "Segmentation", "trainval.txt")
REMEDY = (
    "Name a PASCAL VOC 2012 folder (with JPEGImages in it) or a folder of .jpg or .png files by the option "
    "concat.natural-mix.root, or leave it out: the photographs inside scikit-image are used then."
)


@lru_cache(maxsize=8)
def find_photographs(root: Path | None) -> tuple[Path, ...]:
    """The files below ``root``, sorted by name: VOC's segmentation images, or all of the folder; None = scikit-image's.

    DataError if the folder or a listed file is missing, or there is no photograph.
    """
    if root is None:
        return _packaged()
    if not root.is_dir():
        raise DataError(f"The folder of photographs {root} does not exist or is no folder. {REMEDY}")
    home = next((root / kit for kit in DEVKITS if (root / kit / "JPEGImages").is_dir()), None)
    if home is not None and (home / VOC_LIST).is_file():
        names = sorted((home / VOC_LIST).read_text(encoding="utf-8").split())
        found = [home / "JPEGImages" / f"{name}.jpg" for name in names]
        absent = [file.name for file in found if not file.is_file()]
        if absent:
            raise DataError(f"{home / VOC_LIST} names {len(absent)} images that are not in JPEGImages, such as "
                            f"{absent[0]}. Unpack the archive again, or remove the list to use all.")  # fmt: skip
    else:
        folder = root if home is None else home / "JPEGImages"
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError(f"The folder of photographs {root} holds no image file (.jpg, .jpeg, .png). {REMEDY}")
    return tuple(found)


def _packaged() -> tuple[Path, ...]:
    # Found without importing it, and never through its data functions, which download what is not in the wheel.
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else Path()
    found = tuple(folder / name for name in PACKAGED)
    if not all(file.is_file() for file in found):
        raise DataError(f"The photographs inside scikit-image 0.26 are not there: pip install scikit-image. {REMEDY}")
    return found


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of names and contents, wherever the files lie."""
    return digest([[file.name, digest_of(file)] for file in files])


@lru_cache(maxsize=2)
def grey_tiles(files: tuple[Path, ...], rows: int, columns: int) -> Tensor:
    """All photographs as ``(P, rows, columns)`` uint8: the middle part in these proportions, shrunk or enlarged.

    Decoded once per process: VOC's 2,913 images take 37 MB at 112 x 112. DataError names a file that is no image.
    """
    return torch.from_numpy(np.stack([_decoded(file, rows, columns) for file in files]))


def _decoded(file: Path, rows: int, columns: int) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            # A JPEG is decoded at no more than the scale that is needed, which is several times faster.
            image.draft("L", (columns, rows))
            return np.asarray(ImageOps.fit(image.convert("L"), (columns, rows), Image.Resampling.BILINEAR))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"The photograph {file} cannot be read: {error}. Copy it again or remove it from the folder.") \
            from error  # fmt: skip


def standardised(tiles: Tensor) -> Tensor:
    """Grey tiles ``(..., rows, columns)`` as float32 of mean 0 and deviation 1 each; a uniform one becomes 0."""
    grey = tiles.float()
    deviation, mean = torch.std_mean(grey, dim=(-2, -1), correction=0, keepdim=True)
    return (grey - mean) / torch.where(deviation > 0, deviation, 1.0)
