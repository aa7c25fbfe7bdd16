"""What a table shows, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cfrbench.report import evidence, statistics

Found = Mapping[Any, Any]
BRACKETS = "Brackets: 95 % intervals. Significant (a star): p of the signed-rank test, after Holm, under 0.05."
UNITS = {"dice": "points", "jaccard": "points", "asd": "voxels", "hd95": "voxels"}


def gains_sentence(found: pd.DataFrame, detectable: float) -> list[str]:
    """One sentence on a frame of `evidence.gains`, and one on what cannot be significant; empty without a gain."""
    rows = [row for row in found.to_dict("records") if row["n_cases"]]
    if not rows:
        return []
    facing = [(f"{row['title']} + CFR", str(row["baseline"]), row) for row in rows]
    return [one_sentence(facing, detectable), *out_of_reach([row["n_cases"] for row in rows]), BRACKETS]


def one_sentence(
    facing: Sequence[tuple[str, str, Found]], detectable: float, unit: str = "points", what: str = "CFR"
) -> str:
    """All comparisons of a table in a sentence: upper name, lower name, what `evidence.described` says, and p_holm."""
    cases = min(row["n_cases"] for *_, row in facing)
    limit = f"; with {_cases(cases)} differences under {detectable:.1f} {unit} can't be told apart"
    limit = limit if math.isfinite(detectable) else ""
    upper, lower, largest = max(facing, key=lambda one: (_certain(one[2]), abs(one[2]["difference"])))
    if len(facing) == 1:
        return f"{_one(upper, lower, largest, unit)}{limit}."
    above = sum(row["difference"] > 0 for *_, row in facing)
    certain = sum(_certain(row) for *_, row in facing)
    labels = f" at {largest['labels']} label{'s' * (largest['labels'] != 1)}" if "labels" in largest else ""
    return (f"{what} is higher in {above} of {len(facing)} comparisons, significantly different in "
            f"{certain or 'none'}; largest{' of these' * (certain > 1)}{labels}: "
            f"{_one(upper, lower, largest, unit)}{limit}.")  # fmt: skip


def out_of_reach(cases: Sequence[int]) -> list[str]:
    """A note if so few cases cannot make any of the comparisons significant after Holm."""
    smallest = statistics.smallest_p(max(cases), len(cases))
    if smallest <= evidence.ALPHA:
        return []
    times = f", times {len(cases)} comparisons {smallest:.3g}" if len(cases) > 1 else ""
    return [f"Nothing here can be significant at {evidence.ALPHA}: the smallest p of a signed-rank test of "
            f"{_cases(max(cases))} is {statistics.smallest_p(max(cases)):.3g}{times} (Holm)."]  # fmt: skip


def interval(row: Found, over: str, digits: int = 1) -> str:
    """``[24.0, 38.1]``, or nothing where there is no interval over ``cases``, ``seeds`` or ``both``."""
    low, high = row[f"low_{over}"], row[f"high_{over}"]
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) and math.isfinite(high) else ""


def _one(upper: str, lower: str, row: Found, unit: str) -> str:
    certain, below = _certain(row), row["difference"] < 0
    turned = _turned(row) if certain and below else row
    over_cases, over_both = interval(turned, "cases"), interval(turned, "both")
    sign = "" if certain else "+"
    shown = f"{turned['difference']:{sign}.1f} {unit} {over_cases}".rstrip()
    shown += f" over cases, {over_both} over seeds and cases" if over_both else ""
    wins = f"{row['wins']} of {_cases(row['n_cases'])}"
    if certain:
        return f"{upper} is {'below' if below else 'above'} {lower} by {shown}, {wins}"
    return f"{upper} and {lower} are not significantly different: {shown}, better in {wins}"


def _turned(row: Found) -> Found:
    """The same comparison read from the other side."""
    ends = {f"low_{over}": -row[f"high_{over}"] for over in ("cases", "both")}
    ends |= {f"high_{over}": -row[f"low_{over}"] for over in ("cases", "both")}
    return {"difference": -row["difference"], **ends}


def _certain(row: Found) -> bool:
    return bool(row["p_holm"] < evidence.ALPHA)


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count != 1)}"
