"""One table model, what fills it, and its writers: rich for terminals, Markdown, CSV.

Everything here is a pure function of a `summary` (or `per_class`) frame and a `Context`; equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from cfrbench.published import NET_TITLES, PaperValue, paper_value
from cfrbench.report.context import Context
from cfrbench.report.frames import CELL, EMPTIES, SUPERVISED, gains

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MISSING = "–"
Row = Mapping[Hashable, Any]


@dataclass(frozen=True)
class Table:
    """Text as it is shown: a title, column heads, rows of equal length, notes."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# frames -> table


def main_table(summary: pd.DataFrame, context: Context) -> Table:
    """The paper's kind of table: bounds, each method with its CFR twin and the gain, pseudo-labels, the paper's Dice.

    Columns that would be empty in every row (spread over seeds of one seed, gain, paper) are left out.
    """
    gained = {_twin(row): row["dice_gain"] for row in gains(summary).to_dict("records")}
    rows = summary.to_dict("records")
    papers = [_paper(row) for row in rows]
    columns = {
        "Method": [_name(row, context) for row in rows],
        "Lab./unlab.": [f"{row['labels']}/{row['unlabelled']}" for row in rows],
        "Dice (%)": [_dice(row) for row in rows],
        "± seeds": [_number(row["dice_std_seeds"]) for row in rows],
        "± cases": [_number(row["dice_std_cases"]) for row in rows],
        "Jaccard (%)": [_number(row["jaccard"]) for row in rows],
        f"ASD ({context.unit})": [_number(row["asd"]) for row in rows],
        f"95HD ({context.unit})": [_number(row["hd95"]) for row in rows],
        "Gain (Dice)": [_gain(row, gained) for row in rows],
        "Paper's Dice": [_paper_text(paper) for paper in papers],
    }
    shown = {head: cells for head, cells in columns.items() if set(cells) != {MISSING}}
    notes = [
        *_measured(summary),
        *_empties(rows, context),
        *_standing(rows, context),
        *_paper_notes(rows, papers, context),
    ]
    return Table(_title(context), tuple(shown), tuple(zip(*shown.values(), strict=True)), tuple(notes))


def class_table(per_class: pd.DataFrame, context: Context) -> Table:
    """Dice of every class, one column each, in the order of the data set; ``0*`` for a class never found."""
    classes = list(dict.fromkeys(per_class["class"]))
    rows = []
    for _, cell in per_class.groupby(list(CELL), sort=False):
        found = {row["class"]: row for row in cell.to_dict("records")}
        first = next(iter(found.values()))
        texts = [_dice(found[name]) if name in found else MISSING for name in classes]
        mean = _number(float(cell["dice"].mean()))
        rows.append((_name(first, context), f"{first['labels']}/{first['unlabelled']}", mean, *texts))
    columns = ("Method", "Lab./unlab.", "Mean Dice (%)", *classes)
    scores = per_class.to_dict("records")
    notes = (*_zero_star(scores), *_standing(scores, context))
    return Table(f"{_title(context)}, Dice of each class", columns, tuple(rows), notes)


def _title(context: Context) -> str:
    return f"{context.dataset} (phantom)" if context.synthetic else context.dataset


def _name(row: Row, context: Context) -> str:
    if row["variant"] == "pseudo-label":
        return f"{row['title']} pseudo-labels, on unlabelled cases"
    if row["ssl"] != SUPERVISED:
        return f"{row['title']} + CFR" if row["variant"] == "cfr" else str(row["title"])
    net = NET_TITLES.get(row["net"], row["net"])
    if row["variant"] == "cfr":
        return f"{net} + CFR"
    everything = row["labels"] == context.train_cases
    return f"{net}, upper bound, all {row['labels']} labels" if everything else f"{net}, lower bound"


def _dice(row: Row) -> str:
    return "0*" if row["never_found"] else _number(row["dice"])


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else MISSING


def _twin(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("dataset", "net", "ssl", "labels", "concat", "model", "tune"))


def _gain(row: Row, gained: Mapping[tuple[Any, ...], float]) -> str:
    gain = gained.get(_twin(row), math.nan) if row["variant"] == "cfr" else math.nan
    return f"{gain:+.2f}" if math.isfinite(gain) else MISSING


def _paper(row: Row) -> PaperValue | None:
    """The paper's Dice where a cell matches: data set, segmenter, method, budget, and its concatenation and tuning."""
    if row["variant"] != "baseline" and (row["concat"], row["tune"]) != ("grid", "lora"):
        return None
    name = SUPERVISED if row["ssl"] == SUPERVISED else row["title"]
    return paper_value(row["dataset"], name, row["variant"], row["labels"], net=row["net"])


def _paper_text(paper: PaperValue | None) -> str:
    if paper is None:
        return MISSING
    unlabelled = "?" if paper.unlabelled is None else paper.unlabelled
    return f"{paper.value:.2f} ({paper.labelled}/{unlabelled})"


def _measured(summary: pd.DataFrame) -> list[str]:
    tested = summary[summary["variant"] != "pseudo-label"]
    if tested.empty:
        return []
    counts = " or ".join(str(n) for n in sorted(set(tested["n_cases"])))
    seeds = sorted({seed for seeds in tested["seeds"] for seed in seeds})
    return [
        f"Means over {counts} test cases and seeds {', '.join(map(str, seeds))}; ± is the sample standard deviation, "
        "of the seeds' means or of the cases within a seed."
    ]


def _empties(rows: list[dict[Hashable, Any]], context: Context) -> list[str]:
    words = {"prediction": "empty predictions", "truth": "empty truth", "both": "both empty"}
    found = []
    for row in rows:
        counts = [f"{row[f'empty_{kind}']} {words[kind]}" for kind in EMPTIES if row[f"empty_{kind}"]]
        if counts:
            where = f"{_name(row, context)} ({row['labels']}/{row['unlabelled']})"
            found.append(f"{where}: {', '.join(counts)} of {row['n_scores']} scores")
    notes = [f"Empty masks: {'; '.join(found)}."] if found else []
    return [*notes, *_zero_star(rows)]


def _zero_star(rows: list[dict[Hashable, Any]]) -> list[str]:
    return ["0*: never found in any case."] if any(row["never_found"] for row in rows) else []


def _standing(rows: list[dict[Hashable, Any]], context: Context) -> list[str]:
    """Notes that every table carries: the protocol, synthetic data, what the weights may have seen."""
    notes = [f"Protocol: {context.protocol}"]
    if context.synthetic:
        notes.append("Phantom: synthetic volumes made from a seed, not patients.")
    if context.model_note and any(row["variant"] != "baseline" for row in rows):
        notes.append(context.model_note)
    return notes


def _paper_notes(rows: list[dict[Hashable, Any]], papers: list[PaperValue | None], context: Context) -> list[str]:
    shown = [(row, paper) for row, paper in zip(rows, papers, strict=True) if paper]
    if not shown:
        return []
    tables = ", ".join(f"table {number}" for number in sorted({paper.table for _, paper in shown}))
    notes = [f"Paper's Dice: as printed ({tables}), with its labelled/unlabelled cases."]
    if context.preset != "paper":
        notes[0] += " Its protocol and hardware differ from this run's."
    if any(row["variant"] == "pseudo-label" for row, _ in shown):
        notes.append("The paper's fine-tuned SAM stands beside test scores; ours is scored on the unlabelled cases.")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# table -> text


def to_rich(table: Table) -> RichTable:
    """A rich table whose caption holds the notes; text is shown as it is, never read as markup."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    caption = Text("\n".join(table.notes)) if table.notes else None
    result = RichTable(title=Text(table.title), caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=0)
    # Eighty columns must do: cells stand one space apart, only names wrap, heads and brackets stack.
    result.add_column(Text(table.columns[0]), overflow="fold", min_width=14)
    for column in table.columns[1:]:
        result.add_column(Text(_stacked(column)), justify="right", no_wrap=True)
    for name, *cells in table.rows:
        result.add_row(Text(name), *(Text(_stacked(cell)) for cell in cells))
    return result


def _stacked(text: str) -> str:
    return text.replace("/unlab", "/\nunlab").replace(" ", "\n")


def to_markdown(table: Table) -> str:
    """A heading, a pipe table, the notes as a list."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ("---", *("---:" for _ in table.columns[1:]))
    body = [line(table.columns), line(rule), *(line(row) for row in table.rows)]
    notes = ["", *(f"- {note}" for note in table.notes)] if table.notes else []
    return "\n".join([f"### {table.title}", "", *body, *notes]) + "\n"


def to_csv(table: Table) -> str:
    """Comma-separated values, missing ones empty; title and notes follow as lines that begin with ``#``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(["" if cell == MISSING else cell for cell in row] for row in table.rows)
    text.writelines(f"# {line}\n" for line in (table.title, *table.notes))
    return text.getvalue()
