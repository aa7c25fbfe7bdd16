"""Two sets of scores of the same cases, row by row: a run against another run, or against somebody's own scores."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from cfrbench.errors import DataError, UsageError
from cfrbench.report import evidence, frames, statistics, tables, wording
from cfrbench.report.findings import certainty, metric_words, signed
from cfrbench.report.tables import FOREIGN, Facts, Mark, Row, Table, filled, number

MEAN = "mean of classes"
#: what makes two rows the same one, if both sides state it
IDENTITY = ("ssl", "variant", "labels")
HOW = ("concat", "model", "tune", "net")


@dataclass(frozen=True)
class Side:
    """One of two sets of scores: tidy ``cases`` that state at least ``stated`` of `frames.CELL`, and what is known.

    ``facts`` is empty for scores that are no run; ``fingerprints`` names the content of each case, as far as known.
    """

    name: str
    cases: pd.DataFrame
    facts: Facts = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    stated: tuple[str, ...] = frames.CELL


@dataclass(frozen=True)
class Comparison:
    """Rows that both sides have, B minus A (`evidence.described`, p_holm and names), and what kept others apart."""

    left: Side
    right: Side
    metric: str
    rows: list[dict[Hashable, Any]]
    only: dict[str, list[str]]
    protocols: dict[str, list[str]]
    notes: tuple[str, ...]
    detectable: float


def compared(left: Side, right: Side, metric: str = "dice") -> Comparison:
    """Compare the rows of two sides, paired by case; DataError if their cases differ, UsageError if no row is in both.

    ``left`` is a run. Seeds are paired too where both sides have the same; otherwise each side's mean is taken.
    """
    _check_data(left, right, metric)
    first, second, notes = _same_classes(left, right, left.facts)
    keys = _keys(left, right)
    ours, theirs = _cells(first, keys, metric), _cells(second, keys, metric)
    matches = [(key, ours[key], theirs[key]) for key in ours if key in theirs]
    if not right.facts and not keys:
        matches = [((), cell, theirs[()]) for cell in _cells(first, list(frames.CELL), metric).values()]
    matches = _on_equal_cases(matches, left, right)
    only = {"a": [] if not keys else [_title(ours[key], left) for key in ours if key not in theirs],
            "b": [_title(theirs[key], right) for key in theirs if keys and key not in ours]}  # fmt: skip
    if not matches:
        raise UsageError(f"{left.name} and {right.name} have no row in common. A has: {_listed(ours, left)}. B has: "
                         f"{_listed(theirs, right)}. Compare runs of the same methods and budgets.")  # fmt: skip
    rows = [_row(cell, other, left, right, metric) for _, cell, other in matches]
    for row, p in zip(rows, statistics.holm(np.array([row["p"] for row in rows])), strict=True):
        row["p_holm"] = float(p)
    differences = [row.pop("differences") for row in rows]
    limits = [statistics.detectable(one.mean(0)[None]) for one in differences if one.size]
    limit = float(np.median(limits)) if limits else math.nan
    return Comparison(left, right, metric, rows, only, _protocols(left, right), (*notes, *_seed_notes(rows)), limit)


# ---------------------------------------------------------------------------------------------------------------------
# what belongs together


def _check_data(left: Side, right: Side, metric: str) -> None:
    for side in (left, right):
        if side.cases.empty:
            raise UsageError(f"{side.name} has no finished row. Give its command again to finish it, then compare.")
        if metric not in set(side.cases["metric"]):
            known = ", ".join(dict.fromkeys(side.cases["metric"]))
            raise DataError(f"{side.name} has no scores of {metric}, only of {known}. Choose one with --metric.")
    if not left.facts or not right.facts:
        return
    for fact, words in (
        ("dataset", "data sets"),
        *([("unit", "units of distances")] if metric in ("asd", "hd95") else []),
    ):
        if left.facts[fact] != right.facts[fact]:
            raise DataError(f"{left.name} and {right.name} have different {words}: {left.facts[fact]} and "
                            f"{right.facts[fact]}. Such scores cannot be paired.")  # fmt: skip
    changed = [case for case, content in left.fingerprints.items() if right.fingerprints.get(case, content) != content]
    if changed:
        raise DataError(f"{left.name} and {right.name} have cases of equal names and different content: "
                        f"{_some(changed)}. They are different test sets, whose scores cannot be paired.")  # fmt: skip


def _same_classes(left: Side, right: Side, facts: Facts) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Both sides' scores with the same classes, numbers of classes turned into names."""
    first, second = left.cases, right.cases
    if "class" not in second:
        if first["class"].nunique() > 1:
            return (
                _mean_of_classes(first),
                second.assign(**{"class": MEAN}),
                [f"{right.name} states no classes: {MEAN}."],
            )
        return first, second.assign(**{"class": first["class"].iloc[0]}), []
    names = {str(number): name for number, name in enumerate(facts.get("classes", ()))}
    second = second.assign(**{"class": second["class"].astype(str).map(lambda name: names.get(name, name))})
    if set(first["class"]) != set(second["class"]):
        raise DataError(f"{left.name} has the classes {_some(first['class'])}, {right.name} has "
                        f"{_some(second['class'])}. Both must be scored on the same ones.")  # fmt: skip
    return first, second, []


def _mean_of_classes(cases: pd.DataFrame) -> pd.DataFrame:
    keys = [name for name in cases.columns if name not in ("class", "value", "empty")]
    return cases.groupby(keys, as_index=False, sort=False)[["value"]].mean().assign(**{"class": MEAN})


def _keys(left: Side, right: Side) -> list[str]:
    """The columns that tell rows apart: identity, and how pseudo-labels are made where a side varies that."""
    stated = [name for name in IDENTITY if name in left.stated and name in right.stated]
    varied = [name for name in HOW if name in left.stated and name in right.stated
              and max(side.cases[name].nunique() for side in (left, right)) > 1]  # fmt: skip
    keys = [*stated, *varied]
    titled = "title" in left.stated and "title" in right.stated
    several = (
        any(side.cases.groupby(keys)["title"].nunique().gt(1).any() for side in (left, right)) if titled else False
    )
    return [*keys, *(["title"] if several else [])]


def _cells(cases: pd.DataFrame, keys: Sequence[str], metric: str) -> dict[tuple[Any, ...], pd.DataFrame]:
    scores = cases[cases["metric"] == metric]
    if not keys:
        return {(): scores}
    return {key if isinstance(key, tuple) else (key,): cell for key, cell in scores.groupby(list(keys), sort=False)}


Match = tuple[tuple[Any, ...], pd.DataFrame, pd.DataFrame]


def _on_equal_cases(matches: Sequence[Match], left: Side, right: Side) -> list[Match]:
    """The pairs with equal cases; DataError with the names of what differs if a pair differs that should not."""
    equal = [match for match in matches if set(match[1]["case"]) == set(match[2]["case"])]
    loose = not right.facts and not _keys(left, right)  # one list of scores against every row of a run
    wrong = [match for match in matches if not any(match is one for one in equal)]
    if wrong and not (loose and equal):
        _, cell, other = wrong[0]
        ours, theirs = set(cell["case"]), set(other["case"])
        raise DataError(
            f"{left.name} and {right.name} are scored on different cases ({_title(cell, left)}): only in {left.name}: "
            f"{_some(ours - theirs)}; only in {right.name}: {_some(theirs - ours)}. Scores are paired by case: both "
            "must have the same."
        )
    return equal


def _some(names: Iterable[str], most: int = 8) -> str:
    found = sorted(dict.fromkeys(map(str, names)))
    return (", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")) or "none"


def _listed(cells: Mapping[tuple[Any, ...], pd.DataFrame], side: Side) -> str:
    return "; ".join(_title(cell, side) for cell in cells.values())


def _title(cell: pd.DataFrame, side: Side) -> str:
    """The name of a row as tables print it, with its budget, as far as the side states them."""
    row = cell.iloc[0].to_dict()
    if not side.facts:
        return ", ".join(str(row[name]) for name in side.stated if name in (*IDENTITY, "title")) or side.name
    return f"{tables.row_name(row, side.facts)} ({tables.budget(row)})"


# ---------------------------------------------------------------------------------------------------------------------
# one row


def _row(cell: pd.DataFrame, other: pd.DataFrame, left: Side, right: Side, metric: str) -> dict[Hashable, Any]:
    seeds = tuple(tuple(sorted(set(side["seed"]))) for side in (cell, other))
    one, two = (cell, other) if seeds[0] == seeds[1] else (_mean_of_seeds(cell), _mean_of_seeds(other))
    pair = evidence.paired(one, two, metric)
    means = (float(one["value"].mean()), float(two["value"].mean()))
    first: Row = cell.iloc[0].to_dict()
    return {
        "name_a": tables.row_name(first, left.facts),
        "name_b": tables.row_name(other.iloc[0].to_dict(), right.facts) if right.facts else "B",
        "budget": tables.budget(first),
        "labels": int(first["labels"]),
        "a": means[0],
        "b": means[1],
        "seeds_a": seeds[0],
        "seeds_b": seeds[1],
        "differences": pair.differences,
    } | evidence.described(pair, metric)


def _mean_of_seeds(cell: pd.DataFrame) -> pd.DataFrame:
    means = cell.groupby(["case", "class", "metric"], as_index=False, sort=False)[["value"]].mean()
    return means.assign(seed=0)


def _seed_notes(rows: Sequence[Row]) -> list[str]:
    for row in rows:
        if row["seeds_a"] != row["seeds_b"]:
            mine, yours = (", ".join(map(str, row[name])) for name in ("seeds_a", "seeds_b"))
            return [f"The seeds differ (A: {mine}; B: {yours}): each side is the mean over its own."]
    return []


def _protocols(left: Side, right: Side) -> dict[str, list[str]]:
    """What only one side's protocol says; empty for scores that are no run."""
    if not left.facts or not right.facts:
        return {"a": [], "b": []}
    ours, theirs = (tables.protocol_line(side.facts).split("; ") for side in (left, right))
    return {"a": [part for part in ours if part not in theirs], "b": [part for part in theirs if part not in ours]}


# ---------------------------------------------------------------------------------------------------------------------
# what is shown


def table_of(found: Comparison) -> Table:
    """The comparison as a table; rows of different protocols carry a dagger."""
    facts, rows = found.left.facts, found.rows
    dagger = FOREIGN if any(found.protocols.values()) else ""
    columns = {
        "Row": [_both_names(row) + dagger for row in rows],
        "Lab./unlab.": [row["budget"] for row in rows],
        "A": [number(row["a"]) for row in rows],
        "B": [number(row["b"]) for row in rows],
        "B - A": [signed(row["difference"]) for row in rows],
        **certainty(rows),
    }
    marks = [Mark(place, "B - A", "significant") for place, row in enumerate(rows) if row["p_holm"] < evidence.ALPHA]
    return filled(f"{tables.heading(facts)}, {metric_words(found.metric, facts)} of two runs", columns,
                  tuple(_notes(found)), marks)  # fmt: skip


def _both_names(row: Row) -> str:
    """One name where B calls the row the same, or where B is a single list of scores that the notes name."""
    return str(row["name_a"]) if row["name_b"] in (row["name_a"], "B") else f"{row['name_a']} / {row['name_b']}"


def _notes(found: Comparison) -> list[str]:
    rows, facts = found.rows, found.left.facts
    unit = "points" if found.metric in evidence.PERCENTAGES else str(facts["unit"])
    facing = [("B" if row["name_b"] == "B" else f"{row['name_b']} of B", f"{row['name_a']} of A", row)
              for row in rows if row["n_cases"]]  # fmt: skip
    notes = [f"A is {found.left.name}; B is {found.right.name}."]
    if facing:
        notes += [wording.one_sentence(facing, found.detectable, unit, "B"),
                  *wording.out_of_reach([row["n_cases"] for *_, row in facing]), wording.BRACKETS]  # fmt: skip
    direction = "higher" if evidence.HIGHER_IS_BETTER[found.metric] else "lower"
    notes += [f"Paired by case; wins are cases in which B is better ({direction})/worse.", *found.notes]
    notes.append(f"Protocol of A: {tables.protocol_line(facts)}.")
    if any(found.protocols.values()):
        mine, yours = ("; ".join(found.protocols[side]) or "nothing else" for side in ("a", "b"))
        notes.append(
            f"{FOREIGN.strip()} The protocols differ, so the rows are not comparable as methods. A: {mine}. B: {yours}."
        )
    elif not found.right.facts:
        notes.append(f"The protocol of {found.right.name} is not known.")
    for side, words in (("a", "A"), ("b", "B")):
        if found.only[side]:
            notes.append(f"Only in {words}: {'; '.join(found.only[side])}.")
    return notes


def as_json(found: Comparison) -> dict[str, Any]:
    """Everything as plain values; what is not finite is None."""
    return {
        "a": found.left.name,
        "b": found.right.name,
        "metric": found.metric,
        "rows": [{str(name): _plain(value) for name, value in row.items()} for row in found.rows],
        "protocol_differs": found.protocols,
        "only": found.only,
        "notes": _notes(found),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [int(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
