"""What the scores of a run show: each gain with its uncertainty, the rows of each budget ranked. Frames in, frames out.

Rows are paired by seed, case and class; what one of them lacks is left out of both. A case's difference is the mean
over its classes, then over the seeds (with several choices of labelled cases: over "choice/seed"); cases are the unit
of the tests, and each test of a table counts for Holm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cfrbench.report import frames, statistics
from cfrbench.report.statistics import Array

ALPHA = 0.05
HIGHER_IS_BETTER = {"dice": True, "jaccard": True, "asd": False, "hd95": False}
PERCENTAGES = ("dice", "jaccard")
#: what a method shares with its twin, and what only the twin has
SHARED, GUIDED = ("dataset", "net", "ssl", "labels"), ("title", "unlabelled", "concat", "model", "tune")


@dataclass(frozen=True)
class Paired:
    """Differences of two cells ``(seeds, cases)``, their seeds and cases; ``dropped`` cases were not in both."""

    differences: Array
    seeds: tuple[int | str, ...]
    cases: tuple[str, ...]
    dropped: int


def paired(left: pd.DataFrame, right: pd.DataFrame, metric: str = "dice") -> Paired:
    """``right`` minus ``left``, two cells of a tidy frame, over the seeds and cases that both have."""
    first, second = _scores(left, metric), _scores(right, metric)
    both = (second - first).dropna()
    table = both.groupby(["seed", "case"]).mean().unstack("case").dropna(axis=1)
    everything = {*first.index.get_level_values("case"), *second.index.get_level_values("case")}
    return Paired(table.to_numpy(float), tuple(table.index), tuple(table.columns), len(everything) - table.shape[1])


def _scores(cell: pd.DataFrame, metric: str) -> pd.Series[float]:
    return _repeats(cell[cell["metric"] == metric]).set_index(["seed", "case", "class"])["value"]


def _repeats(cases: pd.DataFrame) -> pd.DataFrame:
    """Another choice of labelled cases is a repeat as another seed is; folds test other cases, so they are none."""
    if "choice" not in cases or not (cases["choice"].notna() & cases["choice"].ne("")).any():
        return cases
    return cases.assign(seed=cases["choice"].astype(str) + "/" + cases["seed"].astype(str))


def described(pair: Paired, metric: str = "dice") -> dict[Any, Any]:
    """The mean difference, its intervals, wins and the p of its test; `gains` says what each is."""
    differences = pair.differences
    names = ("difference", "low_cases", "high_cases", "low_seeds", "high_seeds", "low_both", "high_both", "p")
    found: dict[Any, Any] = dict.fromkeys(names, float("nan"))
    found |= {"wins": 0, "losses": 0, "ties": 0, "n_cases": len(pair.cases), "seeds": pair.seeds,
              "dropped": pair.dropped}  # fmt: skip
    if not differences.size:
        return found
    of_cases, of_seeds = differences.mean(0), differences.mean(1)
    intervals = {"cases": statistics.mean_interval(of_cases), "seeds": statistics.mean_interval(of_seeds),
                 "both": statistics.crossed_interval(differences)}  # fmt: skip
    limit = 100.0 if metric in PERCENTAGES else np.inf
    for name, interval in intervals.items():
        low, high = np.clip(interval, -limit, limit)
        found |= {f"low_{name}": float(low), f"high_{name}": float(high)}
    wins, losses, ties = statistics.wins(of_cases if HIGHER_IS_BETTER[metric] else -of_cases)
    return found | {"difference": float(differences.mean()), "wins": wins, "losses": losses, "ties": ties,
                    "p": statistics.signed_rank_p(of_cases)}  # fmt: skip


def gains(cases: pd.DataFrame, metric: str = "dice") -> pd.DataFrame:
    """One row per CFR cell whose baseline is there, in the order of tables.

    Columns: those of `SHARED` and `GUIDED`; ``baseline`` (its title); ``difference`` (CFR minus baseline, mean over
    cases and seeds); 95 % intervals ``low_cases``, ``high_cases`` (other cases, these seeds), ``low_seeds``,
    ``high_seeds`` (other seeds, these cases), ``low_both``, ``high_both`` (other seeds and cases), NaN where there is
    one only; ``wins``, ``losses``, ``ties`` (cases in which CFR is better, worse, equal); ``n_cases``, ``seeds``,
    ``dropped`` (cases that one of the two lacks); ``p`` (signed rank over cases) and ``p_holm`` (over the rows).
    """
    shared = [*SHARED, *(["protocol"] if "protocol" in cases else [])]
    plain = dict(iter(cases[cases["variant"] == "baseline"].groupby(shared, sort=False)))
    guided = cases[cases["variant"] == "cfr"].groupby([*shared, *GUIDED], sort=False)
    rows = []
    for key, cell in guided:
        baseline = plain.get(key[: len(shared)])
        if baseline is not None:
            names = dict(zip([*shared, *GUIDED], key, strict=True)) | {"variant": "cfr"}
            rows.append(
                names | {"baseline": baseline["title"].iloc[0]} | described(paired(baseline, cell, metric), metric)
            )
    columns = [*shared, *GUIDED, "variant", "baseline", *described(paired(cases[:0], cases[:0])), "p_holm"]
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"] = statistics.holm(table["p"].to_numpy(float))
    return frames.ordered(table, list(cases["ssl"].unique()))


# ---------------------------------------------------------------------------------------------------------------------
# all rows of a budget


@dataclass(frozen=True)
class Group:
    """Rows that can be compared: their cells, their scores ``(rows, cases)`` and the seeds these are means over."""

    rows: tuple[dict[Any, Any], ...]
    values: Array
    seeds: tuple[int | str, ...]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Each two rows, the upper one first."""
        return itertools.combinations(range(len(self.rows)), 2)

    def differences(self) -> Array:
        """Of each two rows ``(pairs, cases)``."""
        found = [self.values[one] - self.values[other] for one, other in self.pairs()]
        return np.array(found).reshape(len(found), self.values.shape[1])


def groups(cases: pd.DataFrame, metric: str = "dice") -> list[Group]:
    """The rows of each budget (and protocol) that two or more share: SSL methods and their twins, or pseudo-labels.

    Bounds are left out: they are no competitors. Scores are means over the classes, seeds and cases that all rows have.
    """
    rivals = _repeats(cases[(cases["ssl"] != frames.SUPERVISED) & (cases["metric"] == metric)])
    keys = ["labels", *(["protocol"] if "protocol" in cases else [])]
    found = []
    for _, budget in rivals.groupby([rivals["variant"] == "pseudo-label", *keys], sort=True):
        table = budget.pivot_table(index=["seed", "case", "class"], columns=list(frames.CELL), values="value")
        if table.shape[1] > 1:
            of_cases = table.dropna().groupby(["seed", "case"]).mean().unstack("case")
            long = pd.DataFrame(of_cases.stack(list(frames.CELL), future_stack=True))
            found.append(_group(long.dropna(axis=1), budget))
    return [group for group in found if group.values.size]


def _group(scores: pd.DataFrame, budget: pd.DataFrame) -> Group:
    """``scores``: a row for each seed and cell, a column for each case."""
    seeds = tuple(scores.index.get_level_values("seed").unique())
    means = scores.groupby(list(frames.CELL)).mean()
    extra = ["protocol"] if "protocol" in budget else []
    cells = budget.drop_duplicates([*frames.CELL])[[*frames.CELL, *extra]]
    ordered = frames.ordered(cells, list(budget["ssl"].unique())).to_dict("records")
    values = [means.loc[tuple(row[name] for name in frames.CELL)] for row in ordered]
    return Group(tuple(ordered), np.array(values, dtype=float), seeds)


@dataclass(frozen=True)
class Standing:
    """A group ranked: p of each two of its rows ``(rows, rows)``, adjusted over all groups of the table."""

    group: Group
    ranking: statistics.Ranking
    p_holm: Array

    def above(self, row: int) -> list[int]:
        """The rows that this one is significantly better than."""
        rank = self.ranking.rank
        return [other for other in range(len(rank)) if self.p_holm[row, other] < ALPHA and rank[row] < rank[other]]


def standings(cases: pd.DataFrame, metric: str = "dice") -> list[Standing]:
    """Each of the `groups` ranked by its means over cases, with Holm over all pairs of all of them."""
    found = groups(cases, metric)
    raw = [statistics.signed_rank_p(one) for group in found for one in group.differences()]
    adjusted = iter(statistics.holm(np.array(raw, dtype=float)))
    result = []
    for group in found:
        p = np.full((len(group.rows), len(group.rows)), np.nan)
        for one, other in group.pairs():
            p[one, other] = p[other, one] = next(adjusted)
        ranking = statistics.ranking(group.values, higher_is_better=HIGHER_IS_BETTER[metric])
        result.append(Standing(group, ranking, p))
    return result


def detectable(found: Sequence[Group]) -> float:
    """The difference under which two rows of these groups cannot be told apart: the median over all pairs."""
    each = [statistics.detectable(one[None]) for group in found for one in group.differences()]
    return float(np.median(each)) if each else float("nan")
