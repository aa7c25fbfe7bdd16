"""Tables of ablations, and which tables a run has: functions of the scores and of what the run says of its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from cfrbench.report import frames, tables
from cfrbench.report.tables import MISSING, Facts, Row, Table

#: kind -> what its rows are
HEADS = {"concat": "Strategy", "scale": "Scale", "pseudo": "Pseudo-labels", "tune": "Fine-tuner"}


def all_tables(cases: pd.DataFrame, facts: Facts) -> list[Table]:
    """The tables of a run or of an ablation; with several organs one more, their Dice one by one."""
    found = [comparison(cases, facts) if "ablation" in facts else tables.comparison(cases, facts)]
    if cases["class"].nunique() < 2:
        return found
    by_class = tables.by_class(cases, facts)
    return [*found, _in_order(by_class, facts) if "ablation" in facts else by_class]


def comparison(cases: pd.DataFrame, facts: Facts) -> Table:
    """One row per finished variant, as they were asked for: the quality of its labels and what they cost."""
    rows, about = scored(cases, facts)
    kind = facts["ablation"]["kind"]
    columns = {HEADS[kind]: [row["title"] for row in rows], **tables.quality(rows, facts), **COSTS[kind](rows, about)}
    notes = (*_measured(rows, facts), *_budget(about), *COST_NOTES[kind](about, facts), *_refused(facts),
             *tables.empty_notes(rows, facts), *tables.standing_notes(rows, facts))  # fmt: skip
    return tables.filled(f"{tables.heading(facts)}, ablation: {kind}", columns, notes)


def scored(cases: pd.DataFrame, facts: Facts) -> tuple[list[dict[Any, Any]], list[Mapping[str, Any]]]:
    """Rows of the summary in the order of the variants, and beside each what is known of its variant."""
    found = {row["title"]: row for row in frames.summary(cases).to_dict("records")}
    about = [one for one in facts["ablation"]["rows"] if one["label"] in found]
    return [found[one["label"]] for one in about], about


def json_rows(cases: pd.DataFrame, facts: Facts) -> list[dict[str, Any]]:
    """The rows as plain values: scores with fixed keys, then everything known and measured of the variant."""
    rows, about = scored(cases, facts)
    plain = frames.json_rows(pd.DataFrame(rows), facts["unit"]) if rows else []
    return [{"label": one["label"], **row, **one} for row, one in zip(plain, about, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# columns of one kind


def _canvas_costs(rows: Sequence[Row], about: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        "Canvases per volume": [_short(one["canvases_per_volume"]) for one in about],
        "s per volume": [_short(one["seconds_per_volume"]) for one in about],
        "Tokens per slice": [_short(tokens_per_slice(one)) for one in about],
        "Slices seen": [_short(one["slices_seen"]) for one in about],
    }


def _tuner_costs(rows: Sequence[Row], about: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        "Parameters (M)": [_millions(one["parameters"]) for one in about],
        "Trainable (M)": [_millions(one["trainable_parameters"]) for one in about],
        "Peak memory (MiB)": [_short(one["peak_mib"]) for one in about],
        "s per step": [_short(one["seconds_per_step"]) for one in about],
    }


def _gains(rows: Sequence[Row], about: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    plain = [row["dice"] for row in rows if row["variant"] == "baseline"]
    gains = [f"{row['dice'] - plain[0]:+.2f}" if plain and row["variant"] == "cfr" else MISSING for row in rows]
    return {"Gain (Dice)": gains}


def tokens_per_slice(one: Mapping[str, Any]) -> float | None:
    """Image tokens of one input divided by the slices on one canvas; None where the tokens were not recorded."""
    if one["tokens"] is None or not one["slices_per_canvas"]:
        return None
    return float(one["tokens"] / one["slices_per_canvas"])


def _millions(count: float | None) -> str:
    return MISSING if count is None else f"{count / 1e6:.3f}"


def _short(value: float | None) -> str:
    """Three digits, whole numbers whole."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# notes


def _measured(rows: Sequence[Row], facts: Facts) -> list[str]:
    if not rows:
        return []
    pseudo = rows[0]["variant"] == "pseudo-label"
    what = "Pseudo-labels of" if pseudo else "Predictions for"
    which = "unlabelled" if pseudo else "test"
    seeds = f"seed{'s' * (len(rows[0]['seeds']) > 1)} {', '.join(map(str, rows[0]['seeds']))}"
    labels = facts["ablation"]["labels"]
    count = rows[0]["n_cases"]
    return [f"{what} {count} {which} case{'s' * (count != 1)}, {labels} labelled, {seeds}; {tables.SPREAD}"]


def _budget(about: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = {one["steps"] for one in about if one["steps"]}
    untrained = ", ".join(one["label"] for one in about if not one["steps"])
    notes = [f"Equal budget: {steps.pop()} optimiser steps of fine-tuning each."] if len(steps) == 1 else []
    return [*notes, f"Not fine-tuned: {untrained}."] if untrained else notes


def _canvas_notes(about: Sequence[Mapping[str, Any]], facts: Facts) -> list[str]:
    crop = " x ".join(map(str, facts["ablation"]["crop"]))
    return [
        f"Tokens per slice: image tokens of the encoder's input / slices on one canvas (a crop is {crop} voxels). "
        "Slices seen: those on the canvases that fine-tuning drew, counted each time.",
        "Canvases and seconds per volume: of the pseudo-label stage, all overlapping crops included; "
        "seconds are the median over cases, and longer where other work shared the machine.",
    ]  # fmt: skip


def _tuner_notes(about: Sequence[Mapping[str, Any]], facts: Facts) -> list[str]:
    prompted = [(one["label"], one["labelled_dice"]) for one in about if one["labelled_dice"] is not None]
    return [
        "Trainable: parameters flagged so, whether a gradient reaches them or not. Peak memory: of the whole "
        "process while it fine-tuned (on a GPU, of its tensors). Seconds: median over steps.",
        *(f"{label}: {dice:.2f} Dice on the labelled cases, prompted by their own labels." for label, dice in prompted),
    ]  # fmt: skip


def _gain_notes(about: Sequence[Mapping[str, Any]], facts: Facts) -> list[str]:
    return ["Pseudo-labels per volume are made once, online ones anew for each crop; a decaying weight is the line "
            "1 - t/N. Gain: over the same method without guidance."]  # fmt: skip


def _refused(facts: Facts) -> list[str]:
    return [f"Not run: {label}. {reason}" for label, reason in facts["ablation"]["refused"].items()]


def _in_order(table: Table, facts: Facts) -> Table:
    place = {one["label"]: index for index, one in enumerate(facts["ablation"]["rows"])}
    return Table(table.title, table.columns, tuple(sorted(table.rows, key=lambda row: place[row[0]])), table.notes)


Costs = Callable[[Sequence[Row], Sequence[Mapping[str, Any]]], dict[str, list[str]]]
Notes = Callable[[Sequence[Mapping[str, Any]], Facts], list[str]]
COSTS: dict[str, Costs] = {"concat": _canvas_costs, "scale": _canvas_costs, "pseudo": _gains, "tune": _tuner_costs}
COST_NOTES: dict[str, Notes] = {
    "concat": _canvas_notes, "scale": _canvas_notes, "pseudo": _gain_notes, "tune": _tuner_notes
}  # fmt: skip
