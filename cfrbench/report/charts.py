"""Charts of ablations: bars, a curve over n, quality over parameters. Colours that colour-blind people can tell apart
and that differ in brightness too; every value is also written or marked by shape, so a grey print loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfrbench.report.pictures import figure

#: Okabe and Ito: the one to look at is dark, the others are light
DARK, LIGHT, LINE = "#0072B2", "#A9D3EE", "#333333"
MARKERS = "osD^vP*X<>hpd"


@dataclass(frozen=True)
class Bar:
    """One value (NaN: missing, which is written) with its spread (None: no spread to show)."""

    label: str
    value: float
    spread: float | None = None
    highlighted: bool = False


@dataclass(frozen=True)
class Point:
    """One fine-tuned model: how many parameters it has, how many of them train, how good it is."""

    label: str
    parameters: float
    trainable: float
    value: float
    highlighted: bool = False


def draw_bars(bars: Sequence[Bar], title: str, axis: str, path: Path) -> None:
    """Write a PNG with one horizontal bar each, the first on top, its value beside it."""
    with figure((6.4, 0.9 + 0.36 * len(bars)), title, path) as sheet:
        plot = sheet.subplots()
        plot.set_xlabel(axis, fontsize=9)
        reach = max((bar.value + (bar.spread or 0) for bar in bars if math.isfinite(bar.value)), default=1.0)
        for row, bar in enumerate(bars):
            if not math.isfinite(bar.value):
                plot.text(0.015 * reach, row, "missing", va="center", fontsize=8, style="italic")
                continue
            plot.barh(row, bar.value, color=DARK if bar.highlighted else LIGHT, edgecolor=LINE, linewidth=0.6)
            if bar.spread:
                plot.errorbar(bar.value, row, xerr=bar.spread, color=LINE, capsize=2.5, linewidth=0.9)
            plot.text(bar.value + (bar.spread or 0) + 0.015 * reach, row, f"{bar.value:.1f}", va="center", fontsize=8)
        plot.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9)
        plot.invert_yaxis()
        plot.set_xlim(0, 1.12 * reach or 1)
        plain_axes(plot)


def draw_curve(points: Sequence[tuple[int, Bar]], reference: Bar | None, title: str, axis: str, path: Path) -> None:
    """Write a PNG with the values over n, and a ``reference`` as a line across."""
    with figure((4.8, 3.4), title, path) as sheet:
        plot = sheet.subplots()
        places, bars = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        values, spreads = [bar.value for bar in bars], [bar.spread or 0 for bar in bars]
        plot.errorbar(places, values, yerr=spreads if any(spreads) else None, color=DARK, marker="o", capsize=3)
        if reference is not None:
            plot.axhline(reference.value, color=LINE, linestyle="--", linewidth=1)
            plot.annotate(reference.label, (places[0], reference.value), textcoords="offset points", xytext=(0, 3),
                          fontsize=8)  # fmt: skip
        plot.set_xticks(places, [f"{n} x {n}" for n in places], fontsize=9)
        plot.set_xlabel("slices on a canvas", fontsize=9)
        plot.set_ylabel(axis, fontsize=9)
        plain_axes(plot)


def draw_parameters(points: Sequence[Point], title: str, axis: str, path: Path) -> None:
    """Write a PNG with quality over all parameters (left) and over those that train (right), as in Figure 1."""
    from matplotlib.ticker import NullFormatter

    with figure((7.16, 2.9), title, path) as sheet:
        sides = sheet.subplots(1, 2, sharey=True)
        for plot, name in zip(sides, ("parameters", "trainable"), strict=True):
            shown = [point for point in points if getattr(point, name) > 0]
            for point in shown:
                turn, shape = divmod(points.index(point), len(MARKERS))
                colour = DARK if point.highlighted else (LIGHT, "white")[turn % 2]
                plot.scatter(getattr(point, name) / 1e6, point.value, marker=MARKERS[shape], s=45, label=point.label,
                             color=colour, edgecolor=LINE, linewidth=0.8)  # fmt: skip
            counts = [getattr(point, name) for point in shown]
            if counts and max(counts) > 10 * min(counts):
                plot.set_xscale("log")
                plot.xaxis.set_minor_formatter(NullFormatter())
            plot.margins(0.12)
            plot.set_xlabel(f"{'trainable ' * (name == 'trainable')}parameters (millions)", fontsize=9)
            plain_axes(plot)
        sides[0].set_ylabel(axis, fontsize=9)
        handles, labels = sides[0].get_legend_handles_labels()
        sheet.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)


def spread_of(row: dict[Any, Any]) -> float | None:
    """What a chart shows as spread: that of the seeds, or with one seed that of the cases."""
    for name in ("dice_std_seeds", "dice_std_cases"):
        if math.isfinite(row[name]):
            return float(row[name])
    return None


def plain_axes(plot: Any) -> None:
    """Axes without the lines above and on the right."""
    plot.spines[["top", "right"]].set_visible(False)
    plot.tick_params(labelsize=8)
