"""Plots of a comparison: Dice over budgets, bars of methods, training curves, pseudo-labels against what came of them.

As in `cfrbench.report.charts`: colours that colour-blind people can tell apart and that differ in brightness, and what
a colour says is said by shape, line or letters too. A missing value (NaN) is left out of lines and written at bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cfrbench.report.charts import DARK, LIGHT, LINE, MARKERS, plain_axes
from cfrbench.report.pictures import figure

#: inches of a column and of a page in most journals
COLUMN, PAGE = 3.5, 7.16
#: per variant: colour, line, marker, what fills it
LOOKS = {
    "baseline": {"color": "#7FB8DE", "linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "cfr": {"color": DARK, "linestyle": "-", "marker": "s", "markerfacecolor": DARK},
}


@dataclass(frozen=True)
class Score:
    """A mean with its spread; NaN: missing."""

    value: float
    spread: float = math.nan


@dataclass(frozen=True)
class Pair:
    """One method without and with guidance; None: that form was not asked for."""

    title: str
    baseline: Score | None
    cfr: Score | None


@dataclass(frozen=True)
class Dot:
    """Pseudo-labels and the network trained on them: both Dice, the method, the budget."""

    title: str
    labels: int
    pseudo: float
    final: float


def draw_budgets(methods: Mapping[str, Mapping[str, Mapping[int, Score]]], title: str, axis: str, path: Path) -> None:
    """Dice over labelled cases, a panel for each method: ``methods[title][variant][labels]``, budgets doubling."""
    with figure((min(PAGE, 0.7 + 2.15 * len(methods)), 2.5), title, path) as sheet:
        panels = sheet.subplots(1, len(methods), sharey=True, squeeze=False)[0]
        budgets = sorted({n for forms in methods.values() for scores in forms.values() for n in scores})
        for plot, (name, forms) in zip(panels, methods.items(), strict=True):
            plot.set_title(name)
            for variant, scores in forms.items():
                _line(plot, variant, name, scores)
            if not any(math.isfinite(score.value) for scores in forms.values() for score in scores.values()):
                plot.text(0.5, 0.6, "missing", transform=plot.transAxes, ha="center", style="italic")
            plot.set_xscale("log", base=2)
            plot.set_xticks(budgets, [str(n) for n in budgets])
            plot.set_xlim(budgets[0] / 1.2, budgets[-1] * 1.2)
            plot.minorticks_off()
            plot.set_xlabel("labelled volumes")
            plot.legend(loc="lower right", frameon=False)
            plot.grid(axis="y", color="#DDDDDD", linewidth=0.5)
            plain_axes(plot)
        panels[0].set_ylabel(axis)


def _line(plot: Any, variant: str, name: str, scores: Mapping[int, Score]) -> None:
    there = {n: score for n, score in sorted(scores.items()) if math.isfinite(score.value)}
    spreads = [score.spread if math.isfinite(score.spread) else 0.0 for score in there.values()]
    label = f"{name} + CFR" if variant == "cfr" else name
    beside = 1.03 if variant == "cfr" else 1 / 1.03  # so that bars of one budget do not hide each other
    plot.errorbar([n * beside for n in there], [score.value for score in there.values()], label=label, capsize=2,
                  yerr=spreads if any(spreads) else None, linewidth=1.3, markersize=4, elinewidth=0.7,
                  **LOOKS[variant])  # fmt: skip


def draw_methods(pairs: Sequence[Pair], bounds: Mapping[str, float], title: str, axis: str, path: Path) -> None:
    """Bars of methods, the CFR twin below its baseline; ``bounds`` are lines across, by name."""
    bars = [(pair, variant) for pair in pairs for variant in LOOKS if getattr(pair, variant) is not None]
    with figure((COLUMN + 1.4, 0.95 + 0.21 * len(bars)), title, path) as sheet:
        plot = sheet.subplots()
        finite = [s.value + _known(s.spread) for s in (getattr(p, v) for p, v in bars) if math.isfinite(s.value)]
        reach = max([*finite, *(b for b in bounds.values() if math.isfinite(b)), 1.0])
        for row, (pair, variant) in enumerate(bars):
            _bar(plot, row, getattr(pair, variant), variant, reach)
        for (name, value), style in zip(bounds.items(), (":", "--"), strict=False):
            if math.isfinite(value):
                plot.axvline(value, color=LINE, linestyle=style, linewidth=0.9, label=f"{name} ({value:.1f})")
        plot.set_yticks(range(len(bars)), [f"{p.title} + CFR" if v == "cfr" else p.title for p, v in bars])
        plot.invert_yaxis()
        plot.set_xlim(0, 1.12 * reach)
        plot.set_xlabel(axis)
        if any(math.isfinite(value) for value in bounds.values()):
            plot.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        plain_axes(plot)


def _bar(plot: Any, row: int, score: Score, variant: str, reach: float) -> None:
    if not math.isfinite(score.value):
        plot.text(0.015 * reach, row, "missing", va="center", fontsize=7, style="italic")
        return
    plot.barh(row, score.value, height=0.78, color=DARK if variant == "cfr" else LIGHT, edgecolor=LINE, linewidth=0.5)
    if _known(score.spread):
        plot.errorbar(score.value, row, xerr=score.spread, color=LINE, capsize=2, linewidth=0.7)
    # A column of its own, where neither bars nor bounds reach.
    plot.text(1.02 * reach, row, f"{score.value:.1f}", va="center", fontsize=7)


def _known(spread: float) -> float:
    return spread if math.isfinite(spread) else 0.0


def draw_quality(dots: Sequence[Dot], title: str, path: Path) -> None:
    """Dice of the network trained on pseudo-labels over that of the pseudo-labels; on the line they are equal."""
    with figure((COLUMN + 1.2, COLUMN), title, path) as sheet:
        plot = sheet.subplots()
        names = list(dict.fromkeys(dot.title for dot in dots))
        values = [value for dot in dots for value in (dot.pseudo, dot.final)]
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 1.0
        ends = [low - margin, high + margin]
        plot.plot(ends, ends, color=LINE, linestyle=":", linewidth=0.9)
        for place, name in enumerate(names):
            own = [dot for dot in dots if dot.title == name]
            looks = {"marker": MARKERS[place % len(MARKERS)], "color": (DARK, LIGHT)[place % 2], "edgecolor": LINE}
            plot.scatter([dot.pseudo for dot in own], [dot.final for dot in own], s=30, label=f"{name} + CFR",
                         linewidth=0.7, **looks)  # fmt: skip
        for labels in dict.fromkeys(dot.labels for dot in dots):
            first = max((dot for dot in dots if dot.labels == labels), key=lambda dot: dot.final)
            plot.annotate(f"{labels}", (first.pseudo, first.final), textcoords="offset points", xytext=(0, 5),
                          ha="center", fontsize=7)  # fmt: skip
        plot.set_xlabel("Dice of the pseudo-labels, unlabelled cases (%)")
        plot.set_ylabel("Dice after re-training, test cases (%)")
        plot.set_aspect("equal", adjustable="datalim")
        sheet.legend(loc="outside right center", frameon=False, title="number: labelled volumes", title_fontsize=7)
        plain_axes(plot)


def draw_curves(
    methods: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]], title: str, path: Path
) -> None:
    """The training loss over steps, a panel for each method: ``methods[title][variant] = (steps, losses)``."""
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    with figure((min(PAGE, 0.7 + 2.15 * columns), 0.6 + 1.8 * rows), title, path) as sheet:
        panels = sheet.subplots(rows, columns, squeeze=False)
        for plot in panels.flat[len(methods) :]:
            plot.set_axis_off()
        for plot, (name, forms) in zip(panels.flat, methods.items(), strict=False):
            for variant, (steps, losses) in forms.items():
                label = "with guidance" if variant == "cfr" else "without"
                look = {key: LOOKS[variant][key] for key in ("color", "linestyle")}
                plot.plot(steps, smoothed(losses), label=label, linewidth=1.2, **look)
            plot.set_title(name)
            plot.set_xlabel("step")
            plain_axes(plot)
        for row in panels:
            row[0].set_ylabel("loss, all terms")
        panels[0, 0].legend(frameon=False)


def smoothed(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """The running mean over a fiftieth of the steps, shorter at both ends; equally many values."""
    width = max(1, len(values) // 50)
    ones = np.ones(width)
    sums: np.ndarray[Any, Any] = np.convolve(values, ones, "same")
    return sums / np.convolve(np.ones(len(values)), ones, "same")


def draw_ranks(samples: Mapping[str, np.ndarray[Any, Any]], title: str, path: Path) -> None:
    """How often a method takes each rank when cases are drawn anew: circles whose area is that share.

    ``samples[method]``: its rank in each draw; equal methods share the mean of their ranks.
    """
    with figure((COLUMN + 1.0, 0.9 + 0.23 * len(samples)), title, path) as sheet:
        plot = sheet.subplots()
        for row, own in enumerate(samples.values()):
            ranks, counts = np.unique(own, return_counts=True)
            plot.hlines(row, ranks[0], ranks[-1], color=LIGHT, linewidth=1, zorder=1)
            colours = [DARK if place == counts.argmax() else LIGHT for place in range(len(ranks))]
            plot.scatter(ranks, [row] * len(ranks), s=130 * counts / len(own), color=colours, edgecolor=LINE,
                         linewidth=0.5, zorder=2)  # fmt: skip
        plot.set_yticks(range(len(samples)), list(samples))
        plot.set_xticks(range(1, 1 + len(samples)))
        plot.set_xlabel("rank by Dice (1 = best); area: share of bootstrap draws")
        plot.set_xlim(0.4, len(samples) + 0.6)
        plot.invert_yaxis()
        plain_axes(plot)
