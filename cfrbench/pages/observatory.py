"""The pseudo-label observatory: how good what the networks learned from is, case by case and class by class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfrbench.archive.cells import Scored
from cfrbench.pages.material import Material
from cfrbench.report.tables import MISSING, Table, number

#: a pseudo-label that misses half of a structure, or invents as much again, teaches a wrong size
DRIFT_PERCENT = 50.0


@dataclass(frozen=True)
class Seen:
    """One class of one pseudo-labelled case; volumes in millilitres, NaN where the truth could not be read."""

    labels: int
    seed: int
    title: str
    case: str
    class_name: str
    dice: float
    truth_ml: float
    pseudo_ml: float
    empty: str

    @property
    def drift_percent(self) -> float:
        """How much larger (+) or smaller (-) the pseudo-label is than the truth."""
        return 100.0 * (self.pseudo_ml / self.truth_ml - 1.0) if self.truth_ml > 0 else math.nan

    @property
    def collapsed(self) -> bool:
        """Whether a class that is there was not labelled at all."""
        return self.empty == "prediction"


def observe(material: Material) -> list[Seen]:
    """Every class of every pseudo-labelled case of the run, as scored."""
    return [seen for one in material.pseudo_cells for seen in _observed(material, one)]


def _observed(material: Material, one: Scored) -> list[Seen]:
    about, names = one.record.about, list(material.result.facts["classes"])
    cases = material.result.cases
    rows = cases[(cases["metric"] == "dice") & (cases["variant"] == about["variant"])]
    for name in ("labels", "seed", "title"):
        rows = rows[rows[name] == about[name]]
    masks = one.label_maps()
    counts = {case: _millilitres(material, case, masks[case], len(names)) for case in rows["case"].unique()
              if case in masks}  # fmt: skip
    found = []
    for row in rows.to_dict("records"):
        truth, pseudo = counts.get(row["case"], (None, None))
        place = names.index(row["class"])
        found.append(Seen(int(about["labels"]), int(about["seed"]), str(about["title"]), row["case"], row["class"],
                          float(row["value"]), math.nan if truth is None else truth[place],
                          math.nan if pseudo is None else pseudo[place], row["empty"]))  # fmt: skip
    return found


def _millilitres(material: Material, case: str, mask: Any, classes: int) -> tuple[Any, Any]:
    """Volume of each class, of the truth and of the pseudo-label."""
    if material.source is None:
        return None, None
    voxel_ml = math.prod(material.spacing_mm(case)) / 1000.0
    truth, pseudo = (np.bincount(array.ravel(), minlength=classes) * voxel_ml for array in (material.truth(case), mask))
    return truth, pseudo


def by_case(seen: list[Seen]) -> Table:
    """One row per case and class: Dice, volumes, drift, and a word where something went wrong."""
    columns = ("Case", "Class", "Labelled", "Seed", "Dice (%)", "Truth (ml)", "Pseudo-label (ml)", "Drift (%)", "Note")
    rows = tuple(
        (one.case, one.class_name, str(one.labels), str(one.seed), number(one.dice), number(one.truth_ml),
         number(one.pseudo_ml), _signed(one.drift_percent), _note(one))
        for one in seen
    )  # fmt: skip
    notes = (
        f"Drift: volume of the pseudo-label over that of the truth, minus 1. Off by more than {DRIFT_PERCENT:.0f} % is "
        "noted. Collapsed: a class that is there was not labelled at all.",
    )  # fmt: skip
    return Table("Pseudo-labels, case by case", columns, rows, notes)


def by_class(seen: list[Seen]) -> Table:
    """One row per budget, seed and class: means, spread of the drift, and how many cases collapsed."""
    groups: dict[tuple[str, int, int, str], list[Seen]] = {}
    for one in seen:
        groups.setdefault((one.title, one.labels, one.seed, one.class_name), []).append(one)
    columns = ("Pseudo-labels of", "Labelled", "Seed", "Class", "Cases", "Dice (%)", "Lowest Dice", "Drift (%)",
               "|Drift| (%)", "Collapsed in", "State")  # fmt: skip
    rows = []
    for (title, labels, seed, name), group in groups.items():
        drifts = [one.drift_percent for one in group if math.isfinite(one.drift_percent)]
        collapsed = sum(one.collapsed for one in group)
        there = sum(one.empty not in ("truth", "both") for one in group)
        rows.append((title, str(labels), str(seed), name, str(len(group)), number(_mean([one.dice for one in group])),
                     number(min(one.dice for one in group)), _signed(_mean(drifts)),
                     number(_mean([abs(drift) for drift in drifts])), f"{collapsed} of {there}",
                     "collapsed" if there and collapsed == there else "found"))  # fmt: skip
    notes = ("Scored on the unlabelled training cases, whose truth no training sees.",)
    return Table("Pseudo-labels, class by class", columns, tuple(rows), notes)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _signed(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else MISSING


def _note(one: Seen) -> str:
    if one.collapsed:
        return "collapsed"
    if one.empty == "truth":
        return "invented"
    drift = one.drift_percent
    if math.isfinite(drift) and abs(drift) > DRIFT_PERCENT:
        return "too large" if drift > 0 else "too small"
    return ""
