"""Tiny files in the layouts of the public data sets, made in a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import nrrd
import numpy as np
from numpy.typing import NDArray

from cfrbench import registry
from cfrbench.prepared.preparing import Done, PrepareRequest, prepare_set

Array = NDArray[Any]


def opened(name: str, root: Path | None = None, **options: Any) -> Any:
    """A data set on a folder."""
    cls = registry.load("data", name)
    return cls(cls.Config(**options), root)


def prepare(name: str, raw: Path, folder: Path, **how: Any) -> Done:
    """Prepare in this process."""
    return prepare_set(PrepareRequest(opened(name, raw), folder, **how))


def arrays(done: Done, case: str) -> tuple[Any, Any]:
    """Image and label of a prepared case."""
    return np.asarray(done.prepared.image(case)), np.asarray(done.prepared.label(case))


def scan(number: int, shape: tuple[int, ...] = (24, 20, 12), classes: int = 2) -> tuple[Array, Array]:
    """An int16 image of blocks, brighter where the label is: boxes of classes 1 .. classes - 1 one behind the other."""
    rng = np.random.default_rng(number)
    label = np.zeros(shape, np.uint8)
    for value in range(1, classes):
        label[4 + number % 3 : 14, 2 + value : 4 + value, 3:9] = value
    blocks = np.kron(rng.integers(0, 80, [-(-side // 4) for side in shape]), np.ones((4, 4, 4), np.int64))
    image = rng.integers(20, 60, shape) + blocks[tuple(map(slice, shape))] + 30 * label.astype(np.int64)
    return image.astype(np.int16), label


def write_nifti(path: Path, array: Array, spacing_mm: Sequence[float] = (1, 1, 1), axcodes: str = "RAS") -> Path:
    """Write an array that lies on ``axcodes``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(axcodes)):  # type: ignore[no-untyped-call]
        affine[int(world), axis] = sign * spacing_mm[axis]
    affine[3, 3] = 1
    nib.save(nib.Nifti1Image(array, affine), path)  # type: ignore[no-untyped-call, attr-defined]
    return path


def write_nrrd(path: Path, array: Array, **header: Any) -> Path:
    """Write an array as the atrial challenge does: 0.625 mm, left-posterior-superior, gzip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"space": "left-posterior-superior", "space directions": 0.625 * np.eye(3), "encoding": "gzip"} | header
    nrrd.write(str(path), array, facts)
    return path


def write_lists(root: Path, train: str, test: str, names: tuple[str, str] = ("train.list", "test.list")) -> None:
    """Lists beside the data."""
    for name, text in zip(names, (train, test), strict=True):
        (root / name).write_text(text)


def write_task(root: Path, cases: int = 5, channels: int = 1) -> Path:
    """A Decathlon task with the values 0, 1 and 2, images in mm of 1 x 1 x 2; the first one has a test image too."""
    names = [f"spleen_{number:02d}" for number in range(cases)]
    for number, name in enumerate(names):
        image, label = scan(number, classes=3)
        several = np.stack([image + 7 * channel for channel in range(channels)], -1) if channels > 1 else image
        write_nifti(root / "imagesTr" / f"{name}.nii.gz", several, (1, 1, 2))
        write_nifti(root / "labelsTr" / f"{name}.nii.gz", label, (1, 1, 2))
    facts = {
        "name": "Spleens", "modality": {"0": "CT"}, "labels": {"0": "background", "1": "spleen", "2": "cyst"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/spleen_99.nii.gz"],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(facts))
    return root
