"""A synthetic heart: one bright irregular chamber with vessels, among neighbours that are just as bright.

It imitates what makes the left atrium hard: blood is bright everywhere, so the chamber is known by where it lies
(behind the ventricles, before the spine, between the lungs) and by the four veins that enter it; the label follows the
veins a short way and then stops. Contrast, pose and form differ between cases, so one labelled case is not enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cfrbench.contracts import DataSource
from cfrbench.hookspecs import hookimpl
from cfrbench_data.synthesis import (
    Array,
    Difficulty,
    SyntheticSource,
    acquire,
    blend,
    ellipsoid,
    paint,
    posed,
    rotation,
    smooth_field,
    tube,
    warp,
)

BLUR_MM = 1.0
VEIN_LABEL_MM = 4.0  # how far outside the chamber a vein still belongs to the label


class Tissue(NamedTuple):
    """True brightness of one case, before the scanner."""

    lung: float
    muscle: float
    bone: float
    blood: float
    chamber: float

    @classmethod
    def drawn(cls, rng: np.random.Generator, jitter: float) -> Tissue:
        """Draw one case's contrast: with full jitter, chamber and muscle are sometimes hard to tell apart."""
        a, b, c, d, e = (float(v) for v in jitter * rng.standard_normal(5))
        muscle = 0.42 + 0.05 * a
        blood = muscle + max(0.14, 0.34 + 0.13 * b)
        chamber = max(blood + 0.08 * c, muscle + 0.14)
        return cls(lung=0.08 + 0.1 * abs(d), muscle=muscle, bone=0.5 + 0.07 * e, blood=blood, chamber=chamber)


class Phantom(SyntheticSource):
    """20 training and 8 test cases of 80 x 80 x 32 voxels by default; axes are left, back, up."""

    name = "phantom"
    title = "Phantom"
    class_names = ("background", "chamber")
    budgets: ClassVar[Mapping[str, int]] = {"scarce": 1, "moderate": 4}
    field_of_view_mm = (100.0, 100.0, 80.0)

    class Config(Difficulty):
        """Set so that all labels give over 80 Dice, one label gives Mean Teacher far less, and 160 steps of LoRA help.

        Pseudo-labels were looked at too: at a contrast jitter of 1.8, so few steps on one label find half the chamber.
        """

        contrast_jitter: float = Field(1.0, ge=0, le=2, description="how much tissue contrast differs between cases")
        lookalikes: float = Field(1.5, ge=0, le=3, description="unlabelled structures as bright as the chamber")

    def draw(self, rng: np.random.Generator, points: Array) -> tuple[Array, NDArray[np.uint8]]:
        """One heart: image and label (1 = chamber with the first millimetres of its veins)."""
        vary = self.config.shape_jitter
        tissue = Tissue.drawn(rng, self.config.contrast_jitter)
        turn = rotation(vary * rng.normal(0, (15, 8, 8)))
        heart = posed(points, turn, float(np.exp(0.08 * vary * rng.standard_normal())), vary * rng.normal(0, 5, 3))
        heart = warp(rng, heart, 2.5 * vary)
        image = _thorax(rng, points, heart, tissue)
        _neighbours(rng, image, heart, tissue, vary)
        _lookalikes(rng, image, heart, tissue, self.config.lookalikes)
        body = _chamber(rng, heart, vary)
        whole = blend(body, _veins(rng, heart, vary), 5.0)
        paint(image, whole - 1.5, tissue.muscle)  # a thin wall keeps the neighbours' blood apart
        paint(image, whole, tissue.chamber)
        label = ((whole < 0) & (body < VEIN_LABEL_MM)).astype(np.uint8)
        return acquire(rng, image, self.config, BLUR_MM, self.spacing_mm), label


def _thorax(rng: np.random.Generator, points: Array, heart: Array, tissue: Tissue) -> Array:
    """Lungs, the tissue between them, the spine; muscle is mottled."""
    shape = points.shape[1:]
    image = np.full(shape, tissue.lung, dtype=np.float32)
    mottled = tissue.muscle + 0.03 * smooth_field(rng, (shape[0], shape[1], shape[2]), (14, 14, 8))
    middle = blend(ellipsoid(heart, (0, -14, 0), (38, 42, 70)), ellipsoid(heart, (0, 34, 0), (26, 24, 200)), 12.0)
    paint(image, middle, mottled)
    paint(image, tube(heart, ((0, 40, -60), (0, 38, 60)), 13.0), tissue.bone)
    return image


def _neighbours(rng: np.random.Generator, image: Array, heart: Array, tissue: Tissue, vary: float) -> None:
    """Ventricles, right atrium, aorta, gullet: where they are in a heart, and as bright as the chamber."""

    def near(*centre_mm: float) -> list[float]:
        return [float(v) for v in np.asarray(centre_mm) + vary * rng.normal(0, 2, 3)]

    left = ellipsoid(heart, near(16, -33, -10), near(12, 13, 20))
    paint(image, left - 7, tissue.muscle * 0.85)
    paint(image, left, tissue.blood)
    paint(image, ellipsoid(heart, near(-12, -36, -8), near(13, 10, 20)), tissue.blood)
    paint(image, ellipsoid(heart, near(-29, -14, -6), near(9, 12, 16)), tissue.blood)
    x, y, _ = near(14, 27, 0)
    paint(image, tube(heart, ((x, y, -60), (x - 1, y + 2, 0), (x + 1, y, 60)), 7.5), tissue.blood)
    x, y, z = near(-3, -17, 12)
    paint(image, tube(heart, ((x + 4, y - 4, z - 8), (x, y, z + 6), (x - 4, y - 4, 60)), 7.5), tissue.blood)
    paint(image, tube(heart, ((0, 24, -60), (1, 23, 0), (-2, 25, 60)), 4.0), tissue.muscle * 0.8)


def _lookalikes(rng: np.random.Generator, image: Array, heart: Array, tissue: Tissue, amount: float) -> None:
    """Vessels in the lungs and round nodes near the chamber: bright, but never part of the label."""
    for side in rng.choice((-1.0, 1.0), rng.poisson(5 * amount)):
        start = np.array([side * rng.uniform(30, 42), rng.uniform(-25, 30), rng.uniform(-38, 38)])
        bend = start + rng.normal(0, 9, 3)
        paint(image, tube(heart, (start, bend, bend + rng.normal(0, 9, 3)), rng.uniform(2, 4.5)), tissue.blood)
    for _ in range(rng.poisson(3 * amount)):
        centre = np.array([rng.normal(0, 22), rng.normal(8, 14), rng.normal(0, 22)])
        paint(image, ellipsoid(heart, centre, rng.uniform(4, 9, 3)), tissue.blood)


def _chamber(rng: np.random.Generator, heart: Array, vary: float) -> Array:
    """Body and appendage."""
    size = np.exp(0.15 * vary * rng.standard_normal(3))
    body = ellipsoid(heart, (0, 2, 0), np.array([23, 15.5, 19]) * size)
    ear = ellipsoid(heart, np.array([20, -9, 9]) * size + vary * rng.normal(0, 2, 3), vary * rng.normal(0, 1, 3) + 8)
    return blend(body, ear, 7.0)


def _veins(rng: np.random.Generator, heart: Array, vary: float) -> Array:
    """Four veins that leave sideways, two a side; now and then two join in one trunk."""
    veins = []
    for side in (-1, 1):
        joined = rng.random() < 0.3 * vary
        for level in (-1, 1):
            bend = np.array([side * 28, 9, level * (4 if joined else 13)]) + vary * rng.normal(0, 2, 3)
            end = np.array([side * 55, 8, level * 17]) + vary * rng.normal(0, 7, 3)
            path = (np.array([side * 10, 4, level * (4 if joined else 8)]), bend, end)
            veins.append(tube(heart, path, rng.uniform(4.0, 5.5)))
    together: Array = np.minimum.reduce(veins)
    return together


@hookimpl
def data_sources() -> list[type[DataSource]]:
    """The phantom source."""
    return [Phantom]
