"""The tidy frame of scores and what is computed from it; every table and picture is a function of these frames.

Tidy: one row per case, class and metric (`COLUMNS`). Missing is missing (NaN), never 0. ``value`` is a percentage for
dice and jaccard and a distance in the protocol's unit for asd and hd95.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cfrbench.errors import DataError

METRICS = ("dice", "jaccard", "asd", "hd95")
#: one point of a sweep without its seed; ``labels`` and ``unlabelled`` count cases
CELL = ("dataset", "concat", "model", "tune", "net", "ssl", "title", "variant", "labels", "unlabelled")
#: ``empty``: "" or which mask was empty: "prediction", "truth", "both"
COLUMNS = (*CELL, "seed", "case", "class", "metric", "value", "empty")
VARIANTS = ("baseline", "cfr", "pseudo-label")
SUPERVISED = "supervised"
EMPTIES = ("prediction", "truth", "both")


def tidy(scores: pd.DataFrame, cell: Mapping[str, Any]) -> pd.DataFrame:
    """Turn the scores of one cell (columns case, class, empty and one per metric) into the tidy frame.

    ``cell`` gives a value for each of `CELL` and the seed; supervised cells have ``unlabelled`` 0.
    """
    long = scores.melt(["case", "class", "empty"], list(METRICS), var_name="metric", value_name="value")
    constant = {name: cell[name] for name in (*CELL, "seed")}
    return long.astype({"value": float}).assign(**constant)[list(COLUMNS)]


def nothing() -> pd.DataFrame:
    """The tidy frame of a run without a finished cell."""
    numbers = {"labels": int, "unlabelled": int, "seed": int, "value": float}
    return pd.DataFrame({name: pd.Series(dtype=numbers.get(name, object)) for name in COLUMNS})


def summary(cases: pd.DataFrame, order: Sequence[str] = ()) -> pd.DataFrame:
    """One row per cell: means over cases, then classes, then seeds.

    ``order`` names the SSL methods as asked for; without it they stand as they first appear in ``cases``.

    For each metric: ``dice``; ``dice_std_seeds``, the sample deviation of the seeds' means (NaN for one seed);
    ``dice_std_cases``, that of the cases (their mean over classes) within a seed, averaged over seeds, as the official
    testers report it (ddof 1). Further: ``seeds`` (tuple), ``n_cases``, ``n_scores`` (seeds x cases x classes),
    ``empty_prediction``, ``empty_truth``, ``empty_both`` (how many of these), ``never_found`` (no class of any case was
    predicted although there was one). Rows: supervised bounds, methods (baseline before cfr), pseudo-labels. If
    ``cases`` says the ``protocol`` of each score, so does the row; DataError if a row would mix two.
    """
    columns = [_means(cases), _counts(cases, list(CELL)), *_protocols(cases, list(CELL))]
    table = pd.concat(columns, axis=1).reset_index()
    return ordered(table, [*order, *cases["ssl"].unique()])


def per_class(cases: pd.DataFrame, order: Sequence[str] = ()) -> pd.DataFrame:
    """One row per cell and class: each metric's mean over cases, then seeds, and the counts of `summary`."""
    keys = [*CELL, "class"]
    means = _wide(_mean(_mean(cases, [*keys, "metric", "seed"]), [*keys, "metric"]), keys)
    table = pd.concat([means, _counts(cases, keys), *_protocols(cases, keys)], axis=1).reset_index()
    as_in_data = list(cases["class"].unique())
    table = table.sort_values("class", key=lambda names: names.map(as_in_data.index), kind="stable")
    return ordered(table, [*order, *cases["ssl"].unique()])


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """What guidance changed, per method and budget: cfr minus baseline of each metric of a `summary`.

    Columns: dataset, net, ssl, title, labels, concat, model, tune, and for each metric ``dice_baseline``,
    ``dice_cfr``, ``dice_gain``. A cell without its twin has no row.
    """
    keys = ["dataset", "net", "ssl", "title", "labels", *(["protocol"] if "protocol" in table else [])]
    # Baselines do not depend on how pseudo-labels are made: a sweep over strategies shares one.
    plain = table[table["variant"] == "baseline"].drop_duplicates(keys)[[*keys, *METRICS]]
    guided = table[table["variant"] == "cfr"]
    both = guided[[*keys, "concat", "model", "tune", *METRICS]].merge(plain, on=keys, suffixes=("_cfr", "_baseline"))
    for metric in METRICS:
        both[f"{metric}_gain"] = both[f"{metric}_cfr"] - both[f"{metric}_baseline"]
    return both


def json_rows(table: pd.DataFrame, unit: str = "voxel") -> list[dict[str, Any]]:
    """Rows of a `summary` as plain values with fixed keys, results only, so that two runs compare equal.

    ``empty`` counts empty predictions of something that was there; a number that is not finite is None.
    """
    return [
        {
            "dataset": row["dataset"],
            "ssl": row["ssl"],
            "variant": row["variant"],
            "labels": int(row["labels"]),
            "seeds": [int(seed) for seed in row["seeds"]],
            "dice": _finite(row["dice"]),
            "jaccard": _finite(row["jaccard"]),
            f"asd_{unit}": _finite(row["asd"]),
            f"hd95_{unit}": _finite(row["hd95"]),
            "empty": int(row["empty_prediction"]),
        }
        for row in table.to_dict("records")
    ]


def _mean(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return frame.groupby(keys, as_index=False)[["value"]].mean()


def _means(cases: pd.DataFrame) -> pd.DataFrame:
    keys = [*CELL, "metric"]
    of_seeds = _mean(_mean(cases, [*keys, "seed", "class"]), [*keys, "seed"])  # over cases, then over classes
    of_cases = _mean(cases, [*keys, "seed", "case"]).groupby([*keys, "seed"], as_index=False)[["value"]].std()
    by_seed = of_seeds.groupby(keys, as_index=False)[["value"]]
    columns = {"": by_seed.mean(), "_std_seeds": by_seed.std(), "_std_cases": _mean(of_cases, keys)}
    return pd.concat([_wide(frame, list(CELL)).add_suffix(suffix) for suffix, frame in columns.items()], axis=1)


def _wide(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    return frame.pivot(index=keys, columns="metric", values="value").reindex(columns=list(METRICS))


def _counts(cases: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    scores = cases.drop_duplicates([*keys, "seed", "case", "class"])
    flags = scores.assign(**{f"empty_{kind}": scores["empty"] == kind for kind in EMPTIES})
    groups = flags.groupby(keys)
    counts = groups[[f"empty_{kind}" for kind in EMPTIES]].sum()
    counts["seeds"] = [tuple(sorted(set(seeds))) for _, seeds in groups["seed"]]
    counts["n_cases"] = groups["case"].nunique()
    counts["n_scores"] = groups.size()
    there = counts["n_scores"] - counts["empty_truth"] - counts["empty_both"]
    counts["never_found"] = (there > 0) & (counts["empty_prediction"] == there)
    return counts


def _protocols(cases: pd.DataFrame, keys: list[str]) -> list[pd.Series[str]]:
    """The protocol of each row, where it is stated."""
    if "protocol" not in cases:
        return []
    found = cases.drop_duplicates([*keys, "protocol"]).set_index(keys)["protocol"]
    if not found.index.is_unique:
        first = found[found.index.duplicated(keep=False)]
        name = dict(zip(keys, first.index[0], strict=True))
        raise DataError(
            f"Scores of {name['title']} ({name['variant']}, {name['labels']} labels) come from several protocols, "
            f"which must not be averaged: {' | '.join(first.unique())}. Take the scores of one of them."
        )
    return [found]


def ordered(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Sort rows of cells: bounds, methods by ``order``, pseudo-labels; within these by budget, then variant."""
    asked = list(dict.fromkeys(order))
    group = table["variant"].eq("pseudo-label") * 2 + table["ssl"].ne(SUPERVISED).astype(int)
    keyed = table.assign(
        _group=group, _method=table["ssl"].map(asked.index), _variant=table["variant"].map(VARIANTS.index)
    )
    ordered = keyed.sort_values(["_group", "_method", "labels", "_variant"], kind="stable", ignore_index=True)
    return ordered.drop(columns=["_group", "_method", "_variant"])


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
