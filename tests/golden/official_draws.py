"""The official order of draws for Bezier curves, from Python's `random` (facts: ShumengLI/CFR code/utils)."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

from cfrbench.intensity import Floats, bezier_points

Monotone = Literal["both", "x"]


class Bend(NamedTuple):
    """Control points (4, 2) of a curve and which of its coordinates are sorted."""

    points: Floats
    monotone: Monotone


def draw_points(source: random.Random) -> Floats:
    """Two free control points: four numbers."""
    return bezier_points([source.random() for _ in range(4)])


def draw_rising(source: random.Random, rate: float) -> Bend | None:
    """Official modes 2 and 5: a gate, then the points. None: the slice stays."""
    return Bend(draw_points(source), "both") if source.random() < rate else None


def draw_either(source: random.Random, rate: float) -> Bend | None:
    """Official modes 1 and 4: a gate, the points, then whether only x is sorted."""
    if source.random() >= rate:
        return None
    points = draw_points(source)
    return Bend(points, "x" if source.random() < 0.5 else "both")


def draw_fixed(source: random.Random, rate: float) -> Bend | None:
    """Official mode 6: a gate, then one of two fixed curves on [-1, 1]."""
    if source.random() >= rate:
        return None
    bow = 0.5 if source.random() < 0.5 else 0.75
    points = bezier_points([-bow, bow, bow, -bow])
    points[0] = -1.0
    return Bend(points, "both")
