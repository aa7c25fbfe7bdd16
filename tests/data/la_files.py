"""Tiny LA data roots made in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from cfrbench_data.la import LeftAtrium

FOLDER = "2018LA_Seg_Training Set"
SHAPE = (10, 9, 8)


def case_arrays(number: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An image with a bright box, and its label; another number is another case."""
    image = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32)
    label = np.zeros(SHAPE, np.uint8)
    label[3:6, 3:6, 2:5] = 1
    return image + 3 * label, label


def write_h5(path: Path, **members: NDArray[np.generic]) -> Path:
    """Write arrays under their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in members.items():
            file.create_dataset(name, data=array, compression="gzip")
    return path


def write_case(root: Path, case: str, number: int, layout: str = FOLDER + "/{case}/mri_norm2.h5") -> Path:
    """Write one sound case."""
    image, label = case_arrays(number)
    return write_h5(root / layout.format(case=case), image=image, label=label)


def make_root(root: Path, train: str = "a\nb\n", test: str = "c\n") -> LeftAtrium:
    """A root with lists and the cases a, b, c."""
    for number, case in enumerate("abc"):
        write_case(root, case, number)
    (root / "train.list").write_bytes(train.encode())
    (root / "test.list").write_bytes(test.encode())
    return LeftAtrium(root=root)
