"""Tables of what the scores show: gains with their uncertainty, ranks, ours beside the paper's, what it all took."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from cfrbench.errors import UsageError, suggest
from cfrbench.report import ablations, evidence, frames, tables, wording
from cfrbench.report.tables import MISSING, Facts, Mark, Row, Table, budget, filled, number, row_name

#: what `costs` shows beside the parameters: column of the frame -> head
SECONDS = {
    "seconds_tune": "Tune (s)",
    "seconds_pseudo": "Label (s)",
    "seconds_train": "Train (s)",
    "seconds_predict": "Predict (s)",
}
METRIC_WORDS = {"dice": "Dice (%)", "jaccard": "Jaccard (%)", "asd": "ASD ({unit})", "hd95": "95HD ({unit})"}


def gains(cases: pd.DataFrame, facts: Facts, metric: str = "dice") -> Table:
    """Each method with and without CFR: the gain, where it may lie for other cases and seeds, wins, and its test."""
    found = evidence.gains(cases, metric)
    rows = found.to_dict("records")
    columns = {
        "Method": [row_name(row, facts) for row in rows],
        "Lab./unlab.": [budget(row) for row in rows],
        f"Gain ({METRIC_WORDS[metric].split()[0]})": [signed(row["difference"]) for row in rows],
        **certainty(rows),
    }
    marks = [Mark(place, "p (Holm)", "significant") for place, row in enumerate(rows) if row["p_holm"] < evidence.ALPHA]
    groups = evidence.groups(cases, metric)
    sentence = wording.gains_sentence(found, evidence.detectable(groups)) if metric == "dice" else []
    notes = (*sentence, *_kept_seeds(rows), *_dropped(rows, facts), *tables.standing_notes(rows, facts))
    return filled(f"{tables.heading(facts)}, what CFR adds", columns, notes, marks)


def ranking(cases: pd.DataFrame, facts: Facts, metric: str = "dice") -> Table:
    """The rows of each budget by rank, and how far the ranks hold when cases are drawn again."""
    standings = evidence.standings(cases, metric)
    head = metric_words(metric, facts)
    names = ("Method", "Lab./unlab.", "Rank", "95 % of ranks", "First in (%)", "Mean rank of cases", head,
             "Significantly above")  # fmt: skip
    columns: dict[str, list[str]] = {name: [] for name in names}
    rows: list[Row] = []
    for standing in standings:
        for place in standing.ranking.rank.argsort(kind="stable"):
            row, ranks = standing.group.rows[place], standing.ranking
            texts = (row_name(row, facts), budget(row), f"{ranks.rank[place]:g}",
                     f"{ranks.low[place]:g}–{ranks.high[place]:g}", f"{100 * ranks.first[place]:.0f}",
                     f"{ranks.of_cases[place]:.2f}", number(standing.group.values[place].mean()),
                     f"{len(standing.above(place))}/{len(ranks.rank) - 1}")  # fmt: skip
            rows.append(row)
            for name, text in zip(columns, texts, strict=True):
                columns[name].append(text)
    notes = (*_rank_notes(standings), *tables.standing_notes(rows, facts))
    return filled(f"{tables.heading(facts)}, ranks of each budget", columns, notes)


def paper(cases: pd.DataFrame, facts: Facts) -> Table:
    """Every number that the paper has too: ours, the paper's and the difference, over all classes and of each class."""
    rows = [*_paper_rows(cases, facts)]
    columns = {
        "Method": [row["name"] for row in rows],
        "Score": [row["score"] for row in rows],
        "Lab./unlab.": [row["budget"] for row in rows],
        "Ours": [number(row["ours"]) for row in rows],
        "Paper's": [number(row["paper"].value) for row in rows],
        "Difference": [signed(row["ours"] - row["paper"].value) for row in rows],
        "Paper's lab./unlab.": [tables.paper_budget(row["paper"]) for row in rows],
        "Paper's table": [str(row["paper"].table) for row in rows],
    }
    differ = ["The paper's protocol and hardware differ from this run's."] if facts["preset"] != "paper" else []
    notes = (*differ, *tables.standing_notes([row["row"] for row in rows], facts))
    return filled(f"{tables.heading(facts)}, beside the paper", columns, notes)


def costs(cases: pd.DataFrame, facts: Facts, measured: pd.DataFrame) -> Table:
    """Parameters and seconds of each row, means over its seeds, and how many predictions are empty.

    ``measured``: one row per cell (columns `frames.CELL`), with ``parameters``, ``foundation_parameters``,
    ``foundation_trained`` and those of `SECONDS`; NaN where nothing is known.
    """
    known = {_cell(row): row for row in measured.to_dict("records")}
    rows = frames.summary(cases).to_dict("records")
    nothing: Row = {}
    about = [known.get(_cell(row), nothing) for row in rows]
    columns = {
        "Method": [row_name(row, facts) for row in rows],
        "Lab./unlab.": [budget(row) for row in rows],
        "Network (M)": [_millions(one.get("parameters", math.nan)) for one in about],
        "Model (M)": [_millions(one.get("foundation_parameters", math.nan)) for one in about],
        "Trained (M)": [_millions(one.get("foundation_trained", math.nan)) for one in about],
        **{head: [_seconds(one.get(name, math.nan)) for one in about] for name, head in SECONDS.items()},
        "Empty": [f"{row['empty_prediction']}/{row['n_scores']}" for row in rows],
    }
    notes = ("Parameters in millions: of the network that predicts, of the foundation model that guides it, and of "
             "what fine-tuning trains of that. Seconds: of fine-tuning, pseudo-labels, training and prediction on the "
             "machine that ran them, longer where stages ran side by side; what rows share counts in each. Empty: "
             "predictions without a voxel, of all scores.", *tables.standing_notes(rows, facts))  # fmt: skip
    return filled(f"{tables.heading(facts)}, what it took", columns, notes)


# ---------------------------------------------------------------------------------------------------------------------
# which tables

TABLES = ("scores", "classes", "gains", "ranking", "paper", "costs")


def tables_of(
    cases: pd.DataFrame, facts: Facts, measured: pd.DataFrame | None = None, wanted: Sequence[str] = TABLES
) -> list[Table]:
    """The ``wanted`` ones of `TABLES`, in that order, without those that have no row; UsageError for another name.

    ``classes`` is for data of several organs, ``costs`` needs what `costs` calls measured; an ablation has no table but
    the first two.
    """
    for name in wanted:
        if name not in TABLES:
            raise UsageError(f"There is no table '{name}'. {suggest(name, TABLES)}")
    scores, *classes = ablations.all_tables(cases, facts)
    if "ablation" in facts:  # its rows are variants of one choice, not methods and their twins
        wanted = [name for name in wanted if name in ("scores", "classes")]
    make: Mapping[str, Callable[[], list[Table]]] = {
        "scores": lambda: [scores],
        "classes": lambda: classes,
        "gains": lambda: [gains(cases, facts)],
        "ranking": lambda: [ranking(cases, facts)],
        "paper": lambda: [paper(cases, facts)],
        "costs": lambda: [] if measured is None else [costs(cases, facts, measured)],
    }
    found = [(name, table) for name in TABLES if name in wanted for table in make[name]()]
    return [table for name, table in found if table.rows or name == "scores"]


# ---------------------------------------------------------------------------------------------------------------------
# cells of a table


def metric_words(metric: str, facts: Facts) -> str:
    """A metric as heads print it, with its unit."""
    return METRIC_WORDS[metric].format(unit=facts["unit"])


def signed(value: float) -> str:
    """Two decimals with a sign; a dash for what is missing."""
    return f"{value:+.2f}" if math.isfinite(value) else MISSING


def p_text(value: float) -> str:
    """Two digits of a p value."""
    if not math.isfinite(value):
        return MISSING
    return "<0.0001" if value < 0.0001 else f"{value:.2g}"


def certainty(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The columns of intervals, wins and tests of rows that `evidence.described` describes, by head."""
    return {
        "other cases": [wording.interval(row, "cases", 2) or MISSING for row in rows],
        "other seeds": [wording.interval(row, "seeds", 2) or MISSING for row in rows],
        "both": [wording.interval(row, "both", 2) or MISSING for row in rows],
        "Wins": [_wins(row) for row in rows],
        "p": [p_text(row["p"]) for row in rows],
        "p (Holm)": [p_text(row["p_holm"]) for row in rows],
    }


def _wins(row: Row) -> str:
    """``7/1`` of wins and losses, with ties where there are some."""
    ties = f", {row['ties']} equal" if row["ties"] else ""
    return f"{row['wins']}/{row['losses']}{ties}"


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f}" if math.isfinite(count) else MISSING


def _seconds(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else MISSING


def _cell(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in frames.CELL)


# ---------------------------------------------------------------------------------------------------------------------
# rows and notes


def _paper_rows(cases: pd.DataFrame, facts: Facts) -> Iterator[dict[str, Any]]:
    several = cases["class"].nunique() > 1
    whole = [(row, None) for row in frames.summary(cases).to_dict("records")]
    parts = [(row, str(row["class"])) for row in frames.per_class(cases).to_dict("records")] if several else []
    for row, name in [*whole, *parts]:
        for metric in frames.METRICS:
            found = tables.paper_of(row, metric, name)
            if found is not None and math.isfinite(row[metric]):
                score = metric_words(metric, facts) + (f", {name}" if name else "")
                yield {"name": row_name(row, facts), "score": score, "budget": budget(row), "ours": row[metric],
                       "paper": found, "row": row}  # fmt: skip


def _rank_notes(standings: Sequence[evidence.Standing]) -> list[str]:
    if not standings:
        return []
    groups = [standing.group for standing in standings]
    pairs = [group.values.shape[1] for group in groups for _ in group.pairs()]
    stable = ", ".join(f"{one.ranking.stability:.2f} at {one.group.rows[0]['labels']}" for one in standings)
    limit = evidence.detectable(groups)
    return [
        "Ranks of the mean Dice; 95 % of ranks and how often first: over resamples of the cases. Significantly above: "
        f"how many others, by signed-rank tests of all {len(pairs)} pairs of this table, Holm under {evidence.ALPHA}.",
        f"Stability, the mean Kendall tau between these ranks and those of the resamples, by labelled cases: {stable}.",
        *([f"With {min(pairs)} cases differences under {limit:.1f} points can't be told apart."]
          if math.isfinite(limit) else []),
        *wording.out_of_reach(pairs),
    ]  # fmt: skip


def _kept_seeds(rows: Sequence[Mapping[Hashable, Any]]) -> list[str]:
    if not rows:
        return []
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    few = "" if len(seeds) > 1 else " One seed says nothing about other seeds."
    what = "choice of labels and seed" if isinstance(seeds[0], str) else f"seed{'s' * (len(seeds) > 1)}"
    named = f"{what} {', '.join(map(str, seeds))}"
    return [f"Gains and tests are of {named}, paired by case; wins are cases better/worse with CFR.{few}"]


def _dropped(rows: Sequence[Mapping[Hashable, Any]], facts: Facts) -> list[str]:
    lacking = [f"{row_name(row, facts)} ({budget(row)}): {row['dropped']}" for row in rows if row["dropped"]]
    return [f"Cases left out because one of the two has no score there: {'; '.join(lacking)}."] if lacking else []
