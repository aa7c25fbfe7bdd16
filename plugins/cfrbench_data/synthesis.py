"""What the synthetic data sets share: shapes as signed distances, painting with partial volume, an imperfect scanner.

Lengths are millimetres. ``points`` are the voxel centres ``(3, H, W, D)`` of a field of view centred on zero, so one
anatomy can be drawn on any grid. A signed distance is negative inside; all arrays are float32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from cfrbench.config import Frozen, Triple, digest
from cfrbench.contracts import DataSource
from cfrbench.errors import DataError
from cfrbench.volume import Split, Volume, checked_volume

Array = NDArray[np.float32]
#: part of every fingerprint: raise it when the same seed gives other voxels than before
VERSION = 1
_ROLES = ("train", "test")


class Difficulty(Frozen):
    """Size and difficulty of a synthetic data set; 0 switches a difficulty off, 1 is the calibrated level."""

    seed: int = Field(0, ge=0, description="another seed is another set of patients")
    shape: Triple = Field((80, 80, 32), description="voxels (H, W, D); the anatomy keeps its size in mm")
    train: int = Field(20, ge=1, description="training cases")
    test: int = Field(8, ge=1, description="test cases")
    shape_jitter: float = Field(1.0, ge=0, le=2, description="how much pose, size and form differ between cases")
    contrast_jitter: float = Field(1.0, ge=0, le=2, description="how much tissue contrast differs between cases")
    noise: float = Field(1.0, ge=0, le=4, description="scanner noise")
    bias: float = Field(1.0, ge=0, le=4, description="slow brightness change across the image")
    lookalikes: float = Field(1.0, ge=0, le=3, description="unlabelled structures as bright as the labelled ones")


#: preset -> settings of every synthetic set. Poses vary little, so nothing is turned by quarters or mirrored.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "smoke": {
        "training.patch": (16, 16, 16),
        "training.rotflip": False,
        "tuning.canvas": 64,
        "inference.stride_xy": 16,
        "inference.stride_z": 16,
    },
    # On a grid of half the resolution a whole volume is one canvas of 4 x 4 tiles, seen by LiteMedSAM at 112 pixels:
    # its windows of 7 and 14 tokens then need no padding: two thirds of the time at 128.
    "quick": {
        "grid.downsample": 2,
        "net.vnet.depth": 3,  # a fourth halving: a first side of 2, where bf16 gradients are wrong
        "training.steps": 300,
        "training.lr_policy": "poly-b",  # a decaying rate ends better in fewer steps
        "training.lr": 0.03,
        "training.patch": (32, 32, 16),
        "training.rotflip": False,
        "tuning.steps": 160,
        "tuning.patch": (40, 40, 16),
        "tuning.canvas": 160,
        "tuning.rotflip": False,
        "tuning.rotflip_canvas": False,
        "tuning.rotation_degrees": 15.0,
        "tuning.zoom": 1.2,
        "model.lite-medsam.input_size": 112,
        "inference.stride_xy": 8,
        "inference.stride_z": 16,
    },
    # The official schedule on crops that fit these volumes.
    "paper": {
        "training.patch": (64, 64, 32),
        "training.rotflip": False,
        "inference.stride_xy": 16,
        "inference.stride_z": 16,
    },
}


class SyntheticSource(DataSource):
    """A data set drawn from random numbers: no files, every case a pure function of (seed, role, index)."""

    modality = "synthetic"
    licence = "no restrictions: made by this package"
    origin = "generated on the fly"
    synthetic = True
    field_of_view_mm: tuple[float, float, float]

    class Config(Difficulty):
        """Size and difficulty."""

    config: Difficulty

    @abstractmethod
    def draw(self, rng: np.random.Generator, points: Array) -> tuple[Array, NDArray[np.uint8]]:
        """Return image and label ``(H, W, D)`` of one case at ``points``; all randomness from ``rng``."""

    def split(self) -> Split:
        """``train-00`` ... and ``test-00`` ...; more cases of one role never change the others."""
        train, test = (
            tuple(f"{role}-{number:02d}" for number in range(count))
            for role, count in zip(_ROLES, (self.config.train, self.config.test), strict=True)
        )
        return Split(train, test)

    def load(self, case: str) -> Volume:
        """Draw one case."""
        spacing_mm = self.spacing_mm
        image, label = self.draw(self._rng(case), voxel_centres(self.config.shape, spacing_mm))
        where = f"{self.name} case {case}"
        return checked_volume(where, torch.from_numpy(image), torch.from_numpy(label), self.num_classes, spacing_mm)

    def fingerprint(self) -> Mapping[str, str]:
        """Hash of everything a case is drawn from; nothing is drawn for it."""
        split = self.split()
        knobs = self.config.model_dump(exclude={"train", "test"})
        return {case: digest([self.name, VERSION, knobs, case]) for case in (*split.train, *split.test)}

    def protocol(self, preset: str) -> Mapping[str, Any]:
        """Recommended settings of a preset."""
        return PROTOCOLS[preset]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of the chosen grid."""
        x, y, z = (length / side for length, side in zip(self.field_of_view_mm, self.config.shape, strict=True))
        return x, y, z

    def _rng(self, case: str) -> np.random.Generator:
        role, _, number = case.partition("-")
        if role not in _ROLES or not number.isdecimal():
            raise DataError(f"{self.name} has no case '{case}'. Cases are called train-00, test-00 and so on.")
        words = [self.config.seed, _ROLES.index(role), int(number)]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


# ---------------------------------------------------------------------------------------------------------------------
# space


def voxel_centres(shape: Triple, spacing_mm: Sequence[float]) -> Array:
    """Voxel centres ``(3, H, W, D)`` of a grid centred on zero."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)


def smooth_field(rng: np.random.Generator, shape: Triple, knots: Triple) -> Array:
    """A random field with unit variance at its ``knots``, joined by cubic splines to ``shape``."""
    from scipy.interpolate import CubicSpline  # 0.8 s, which a plan need not pay

    field = rng.standard_normal(knots, dtype=np.float32)
    for axis, (count, side) in enumerate(zip(knots, shape, strict=True)):
        # A spline through the unit vectors is the matrix that interpolates one axis: three small products, no loop.
        matrix = CubicSpline(np.arange(count), np.eye(count))(np.linspace(0, count - 1, side))
        field = np.moveaxis(np.tensordot(matrix.astype(np.float32), field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field)


def warp(rng: np.random.Generator, points: Array, amplitude_mm: float) -> Array:
    """Shift every point by a smooth random displacement: straight anatomy becomes irregular."""
    shape = points.shape[1:]
    shift = [smooth_field(rng, (shape[0], shape[1], shape[2]), (5, 5, 4)) for _ in range(3)]
    return points + amplitude_mm * np.stack(shift)


def rotation(angles_degree: ArrayLike) -> NDArray[np.float64]:
    """Rotation matrix about the third, second and first axis, in this order."""
    z, y, x = np.deg2rad(np.asarray(angles_degree, dtype=np.float64))
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    turn: NDArray[np.float64] = about_x @ about_y @ about_z
    return turn


def posed(points: Array, turn: NDArray[np.float64], scale: float, shift_mm: NDArray[np.float64]) -> Array:
    """Points in the frame of an anatomy that was scaled, turned and shifted."""
    moved = points - shift_mm.astype(np.float32)[:, None, None, None]
    return np.tensordot((turn.T / scale).astype(np.float32), moved, axes=1)


# ---------------------------------------------------------------------------------------------------------------------
# shapes


def ellipsoid(points: Array, centre_mm: ArrayLike, radii_mm: ArrayLike) -> Array:
    """Signed distance of an ellipsoid, exact to first order near its surface."""
    radii = np.asarray(radii_mm, dtype=np.float32)[:, None, None, None]
    offset = (points - np.asarray(centre_mm, dtype=np.float32)[:, None, None, None]) / radii
    level = np.sqrt(np.einsum("i...,i...", offset, offset))
    slope = np.sqrt(np.einsum("i...,i...", offset / radii, offset / radii))
    distance: Array = level * (level - 1) / np.maximum(slope, 1e-6)
    return distance


def tube(points: Array, path_mm: Sequence[ArrayLike] | NDArray[np.float64], radius_mm: float) -> Array:
    """Signed distance of a round tube along a polyline ``(knots, 3)``."""
    knots = np.asarray(path_mm, dtype=np.float32)
    pieces = [_segment(points, start, end) for start, end in pairwise(knots)]
    distance: Array = np.sqrt(np.minimum.reduce(pieces)) - np.float32(radius_mm)
    return distance


def _segment(points: Array, start: Array, end: Array) -> Array:
    """Squared distance to the line segment from ``start`` to ``end``."""
    along = end - start
    offset = points - start[:, None, None, None]
    part = np.clip(np.tensordot(along, offset, axes=1) / float(along @ along), 0, 1)
    rest = offset - along[:, None, None, None] * part
    squared: Array = np.einsum("i...,i...", rest, rest)
    return squared


def blend(a: Array, b: Array, width_mm: float) -> Array:
    """Union of two shapes with a rounded joint (polynomial smooth minimum)."""
    overlap = np.maximum(width_mm - np.abs(a - b), 0) / width_mm
    joined: Array = np.minimum(a, b) - overlap * overlap * np.float32(width_mm / 4)
    return joined


def paint(image: Array, distance_mm: Array, value: float | Array, edge_mm: float = 1.5) -> None:
    """Cover what lies inside a shape with ``value``, in place; voxels on the edge take part of it."""
    cover = np.clip(0.5 - distance_mm / np.float32(edge_mm), 0, 1)
    image += cover * (value - image)


# ---------------------------------------------------------------------------------------------------------------------
# scanner


def acquire(rng: np.random.Generator, image: Array, config: Difficulty, blur_mm: float,
            spacing_mm: Sequence[float]) -> Array:  # fmt: skip
    """What a scanner makes of true brightness in about [0, 1]: blur, bias field, noise, then gamma, gain and offset."""
    from scipy import ndimage

    height, width, depth = image.shape
    blurred: Array = ndimage.gaussian_filter(image, [blur_mm / step for step in spacing_mm])
    field = smooth_field(rng, (height, width, depth), (3, 3, 3))
    gamma = np.exp(0.35 * config.contrast_jitter * rng.standard_normal())
    gain, offset = np.exp(0.5 * rng.standard_normal()), 0.5 * rng.standard_normal()
    seen = blurred * np.exp(0.18 * config.bias * field)
    level = np.float32(0.035 * config.noise * rng.uniform(0.6, 1.4))
    # Rician noise, as in magnitude images: it lifts dark regions instead of making them negative.
    parts = rng.standard_normal((2, *image.shape), dtype=np.float32) * level
    seen = np.hypot(seen + parts[0], parts[1])
    result: Array = (100 * gain * (np.maximum(seen, 0) ** gamma + offset)).astype(np.float32)
    return result
