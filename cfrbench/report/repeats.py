"""What a table says of its lists: their hash, which cases were labelled, and how much that choice matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

Facts = Mapping[str, Any]
#: more labelled cases than these are counted, not named; so are more repeats
_NAMED, _TOLD = 4, 10


def split_note(facts: Facts) -> list[str]:
    """The split's own words, and the hash by which equal lists are known."""
    hashes = list(dict.fromkeys(split["sha256"][:12] for split in facts.get("splits", [])))
    words = facts["split"]
    if len(hashes) == 1:
        return [f"Split {hashes[0]}{': ' if words else '.'}{words}"]
    return [f"Split: {words}"] if words else []


def notes(cases: pd.DataFrame, facts: Facts) -> list[str]:
    """Which cases were labelled, and how far apart their choices lie; nothing of a run on one choice."""
    splits = facts.get("splits", [])
    if len(splits) < 2:
        return []
    budgets = {int(budget): None for split in splits for budget in split["labelled"]}
    return [*(_named(splits, budget) for budget in budgets), *_spreads(cases)]


def _named(splits: list[Mapping[str, Any]], budget: int) -> str:
    head = f"Labelled with {budget} label{'s' * (budget != 1)}"
    if budget > _NAMED or len(splits) > _TOLD:
        return f"{head}: {len(splits)} choices, named in the run's record (facts.splits)."
    told = [f"{_where(split)} {', '.join(split['labelled'][str(budget)])}" for split in splits]
    return f"{head}: {'; '.join(told)}."


def _where(split: Mapping[str, Any]) -> str:
    parts = [f"fold {split['fold']}" * bool(split["fold"]), f"choice {split['choice']}" * bool(split["choice"])]
    return " ".join(filter(None, parts))


def _spreads(cases: pd.DataFrame) -> Iterator[str]:
    """For each budget: how far Dice moves with the labelled cases, beside how far with the method."""
    rows = cases[(cases["metric"] == "dice") & (cases["ssl"] != "supervised") & (cases["choice"] != "")]
    rows = rows[rows["variant"] != "pseudo-label"]
    for budget, group in rows.groupby("labels"):
        names = group["title"].where(group["variant"] == "baseline", group["title"] + " + CFR").rename("row")
        means = group.groupby([names, "fold", "choice", "class"], sort=False, as_index=False)[["value"]].mean()
        table = means.pivot_table("value", "row", "choice", sort=False)
        if table.shape[1] < 2:
            continue
        low, high, middle = table.min(axis=1), table.max(axis=1), table.mean(axis=1)
        told = ", ".join(f"{row} {low[row]:.2f} to {high[row]:.2f}" for row in table.index)
        sentence = f"With {budget} label{'s' * (budget != 1)}, Dice over {table.shape[1]} choices of them: {told}."
        if len(table) > 1:
            choice, method = float((high - low).max()), float(middle.max() - middle.min())
            most = "more" if choice > method else "not more"
            sentence += (f" Which cases are labelled moves Dice by up to {choice:.2f}, {most} than the {method:.2f} "
                         "between these rows' means.")  # fmt: skip
        yield sentence
