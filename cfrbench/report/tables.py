"""One table model and what fills it; `cfrbench.report.writers` turns it into text.

Tables are pure functions of the tidy frame of scores and the facts of the run that `cfrbench.sweep.facts` states (data
set, preset, protocol, notes of the weights). Equal input gives equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from cfrbench.published import NET_TITLES, PaperValue, paper_value
from cfrbench.report import evidence, frames, wording

MISSING = "–"
FOREIGN = " †"
SPREAD = "± is the sample standard deviation, of the seeds' means or of the cases within a seed."
#: how tables call a fine-tuner; others print their name
TUNE_TITLES = {
    "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "decoder-only": "decoder only (MedSAM v1)",
    "encoder-decoder": "encoder and decoder (MedSAM v2)", "linear-probe": "linear probe", "msa-adapter": "MSA",
    "msa-adapter-3d": "MSA 3D", "samus": "SAMUS", "sam-med2d-adapter": "SAM-Med2D adapter",
    "sam3d-adapter": "3DSAM-adapter", "none": "no fine-tuning",
}  # fmt: skip
Row = Mapping[Hashable, Any]
Facts = Mapping[str, Any]


class Mark(NamedTuple):
    """How a cell stands out: its row's number, its column's head, and as what."""

    row: int
    head: str
    kind: str  #: "best", "second" or "significant"


@dataclass(frozen=True)
class Table:
    """Text as it is shown: a title, column heads, rows of equal length, notes, and the cells that stand out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    marks: frozenset[Mark] = frozenset()

    def marks_at(self, row: int, column: int) -> frozenset[str]:
        """The kinds of marks of one cell."""
        head = self.columns[column]
        return frozenset(mark.kind for mark in self.marks if (mark.row, mark.head) == (row, head))


# ---------------------------------------------------------------------------------------------------------------------
# frames -> table


def comparison(cases: pd.DataFrame, facts: Facts) -> Table:
    """The paper's kind of table: bounds, each method with its CFR twin and the gain, pseudo-labels, the paper's Dice.

    Columns that would be empty in every row (spread over seeds of one seed, gain, paper) are left out.
    """
    summary = frames.summary(cases)
    gained = {_twin(row): row["dice_gain"] for row in frames.gains(summary).to_dict("records")}
    rows = summary.to_dict("records")
    papers = [paper_of(row) for row in rows]
    columns = {
        "Method": [row_name(row, facts) for row in rows],
        "Lab./unlab.": [budget(row) for row in rows],
        **quality(rows, facts),
        "Gain (Dice)": [_gain(row, gained) for row in rows],
        "Paper's Dice": [_paper_text(paper) for paper in papers],
    }
    found = evidence.gains(cases)
    notes = (*wording.gains_sentence(found, evidence.detectable(evidence.groups(cases))), *_measured(summary),
             *empty_notes(rows, facts), *standing_notes(rows, facts), *_paper_notes(rows, papers, facts))  # fmt: skip
    heads = dict(zip(frames.METRICS, [head for head in quality([], facts) if "±" not in head], strict=True))
    marks = [mark for metric, head in heads.items() for mark in best_marks(rows, metric, head)]
    return filled(heading(facts), columns, notes, [*marks, *_significant(rows, found)])


def quality(rows: Sequence[Row], facts: Facts) -> dict[str, list[str]]:
    """The columns of scores of a `frames.summary`, by head."""
    return {
        "Dice (%)": [dice_text(row) for row in rows],
        "± seeds": [number(row["dice_std_seeds"]) for row in rows],
        "± cases": [number(row["dice_std_cases"]) for row in rows],
        "Jaccard (%)": [number(row["jaccard"]) for row in rows],
        f"ASD ({facts['unit']})": [number(row["asd"]) for row in rows],
        f"95HD ({facts['unit']})": [number(row["hd95"]) for row in rows],
    }


def filled(
    title: str, columns: Mapping[str, Sequence[str]], notes: tuple[str, ...], marks: Iterable[Mark] = ()
) -> Table:
    """A table of these columns, without those that have nothing to say in any row."""
    shown = {head: cells for head, cells in columns.items() if set(cells) != {MISSING}}
    kept = frozenset(mark for mark in marks if mark.head in shown)
    return Table(title, tuple(shown), tuple(zip(*shown.values(), strict=True)), notes, kept)


def best_marks(rows: Sequence[Row], column: str, head: str, metric: str | None = None) -> Iterator[Mark]:
    """Best and second best, as printed, of the methods of each budget and protocol; no second among two.

    ``column`` of the rows is compared, as ``metric`` (by default what it is called); bounds and pseudo-labels stand
    apart.
    """
    budgets: dict[Any, dict[int, float]] = {}
    for place, row in enumerate(rows):
        rival = row["variant"] != "pseudo-label" and row["ssl"] != frames.SUPERVISED
        if rival and math.isfinite(row[column]):
            budgets.setdefault((row["labels"], row.get("protocol")), {})[place] = round(row[column], 2)
    for values in budgets.values():
        ranked = sorted(set(values.values()), reverse=evidence.HIGHER_IS_BETTER[metric or column])
        wanted = dict(zip(ranked, ("best", "second") if len(values) > 2 else ("best",), strict=False))
        if len(ranked) > 1:
            yield from (Mark(place, head, wanted[value]) for place, value in values.items() if value in wanted)


def _significant(rows: Sequence[Row], found: pd.DataFrame) -> list[Mark]:
    """A star at each gain that holds after Holm."""
    certain = {_twin(row) for row in found.to_dict("records") if row["p_holm"] < evidence.ALPHA}
    return [Mark(place, "Gain (Dice)", "significant") for place, row in enumerate(rows)
            if row["variant"] == "cfr" and _twin(row) in certain]  # fmt: skip


def by_class(cases: pd.DataFrame, facts: Facts) -> Table:
    """Dice of every class, one column each, in the order of the data set; ``0*`` for a class never found."""
    scores = frames.per_class(cases)
    classes = list(dict.fromkeys(scores["class"]))
    rows: list[dict[Hashable, Any]] = []
    texts: list[tuple[str, ...]] = []
    for _, cell in scores.groupby(list(frames.CELL), sort=False):
        found = {row["class"]: row for row in cell.to_dict("records")}
        first = next(iter(found.values()))
        dice = {name: found[name]["dice"] if name in found else math.nan for name in classes}
        rows.append({**first, **dice, "mean": float(cell["dice"].mean())})
        shown = [dice_text(found[name]) if name in found else MISSING for name in classes]
        texts.append((row_name(first, facts), budget(first), number(rows[-1]["mean"]), *shown))
    heads = {"mean": "Mean Dice (%)", **{name: name for name in classes}}
    records = scores.to_dict("records")
    notes = (*_zero_star(records), *standing_notes(records, facts))
    marks = frozenset(mark for name, head in heads.items() for mark in best_marks(rows, name, head, "dice"))
    columns = ("Method", "Lab./unlab.", *heads.values())
    return Table(f"{heading(facts)}, Dice of each class", columns, tuple(texts), notes, marks)


def heading(facts: Facts) -> str:
    """The data set's title, which says phantom where it is one."""
    phantom = facts["synthetic"] and "phantom" not in facts["title"].casefold()
    return f"{facts['title']} (phantom)" if phantom else str(facts["title"])


def row_name(row: Row, facts: Facts) -> str:
    """How tables call a row; a dagger marks one of another protocol than the table's."""
    return _named(row, facts) + FOREIGN * is_foreign(row, facts)


def is_foreign(row: Row, facts: Facts) -> bool:
    """Whether the row states a protocol that is not the table's."""
    return bool(row.get("protocol", protocol_line(facts)) != protocol_line(facts))


def protocol_line(facts: Facts) -> str:
    """What makes the numbers of a table comparable, in one line."""
    return f"preset {facts['preset']}; {facts['protocol']}"


def _named(row: Row, facts: Facts) -> str:
    if "ablation" in facts:
        return str(row["title"])
    if row["variant"] == "pseudo-label":
        model = facts["model_title"] if row["model"] == facts["model"] else row["model"]
        return f"{model} + {TUNE_TITLES.get(row['tune'], row['tune'])} pseudo-labels, on unlabelled cases"
    if row["ssl"] != frames.SUPERVISED:
        return f"{row['title']} + CFR" if row["variant"] == "cfr" else str(row["title"])
    net = NET_TITLES.get(row["net"], row["net"])
    everything = row["labels"] == facts["train_cases"]
    return f"{net}, upper bound, all {row['labels']} labels" if everything else f"{net}, lower bound"


def budget(row: Row) -> str:
    """Labelled and unlabelled cases."""
    return f"{row['labels']}/{row['unlabelled']}"


def dice_text(row: Row) -> str:
    """A mean Dice; ``0*`` for what was never found."""
    return "0*" if row["never_found"] else number(row["dice"])


def number(value: float) -> str:
    """Two decimals; a dash for what is missing."""
    return f"{value:.2f}" if math.isfinite(value) else MISSING


def _twin(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("dataset", "net", "ssl", "labels", "concat", "model", "tune"))


def _gain(row: Row, gained: Mapping[tuple[Any, ...], float]) -> str:
    gain = gained.get(_twin(row), math.nan) if row["variant"] == "cfr" else math.nan
    return f"{gain:+.2f}" if math.isfinite(gain) else MISSING


def paper_of(row: Row, metric: str = "dice", class_name: str | None = None) -> PaperValue | None:
    """The paper's number where a cell matches: data set, segmenter, method, budget, its concatenation and tuning."""
    if row["variant"] != "baseline" and (row["concat"], row["tune"]) != ("grid", "lora"):
        return None
    name = frames.SUPERVISED if row["ssl"] == frames.SUPERVISED else row["title"]
    return paper_value(row["dataset"], name, row["variant"], row["labels"], metric, net=row["net"],
                       class_name=class_name)  # fmt: skip


def paper_budget(paper: PaperValue) -> str:
    """The paper's labelled and unlabelled cases; ``?`` where it does not say."""
    return f"{paper.labelled}/{'?' if paper.unlabelled is None else paper.unlabelled}"


def _paper_text(paper: PaperValue | None) -> str:
    return MISSING if paper is None else f"{paper.value:.2f} ({paper_budget(paper)})"


def _measured(summary: pd.DataFrame) -> list[str]:
    tested = summary[summary["variant"] != "pseudo-label"]
    if tested.empty:
        return []
    counts = " or ".join(str(n) for n in sorted(set(tested["n_cases"])))
    seeds = sorted({seed for seeds in tested["seeds"] for seed in seeds})
    named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return [f"Means over {counts} test cases and {named}; {SPREAD}"]


def empty_notes(rows: Sequence[Row], facts: Facts) -> list[str]:
    """Which rows hold scores of empty masks, and how many."""
    words = {"prediction": "empty predictions", "truth": "empty truth", "both": "both empty"}
    found = []
    for row in rows:
        counts = [f"{row[f'empty_{kind}']} {words[kind]}" for kind in frames.EMPTIES if row[f"empty_{kind}"]]
        if counts:
            found.append(f"{row_name(row, facts)} ({budget(row)}): {', '.join(counts)} of {row['n_scores']} scores")
    notes = [f"Empty masks: {'; '.join(found)}."] if found else []
    return [*notes, *_zero_star(rows)]


def _zero_star(rows: Sequence[Row]) -> list[str]:
    return ["0*: never found in any case."] if any(row["never_found"] for row in rows) else []


def standing_notes(rows: Sequence[Row], facts: Facts) -> list[str]:
    """Notes that every table carries: the protocol, synthetic data, what the weights may have seen."""
    notes = [f"Protocol: {protocol_line(facts)}."]
    others = dict.fromkeys(row["protocol"] for row in rows if is_foreign(row, facts))
    notes += [f"{FOREIGN.strip()} Of another protocol, not comparable: {other}." for other in others]
    if facts.get("missing"):
        notes.append(f"Not finished, rows or seeds are missing: {'; '.join(facts['missing'])}.")
    if facts["split"]:
        notes.append(f"Split: {facts['split']}")
    if facts["synthetic"]:
        notes.append("Phantom: synthetic volumes made from a seed, not patients.")
    if facts["model_note"] and any(row["variant"] != "baseline" for row in rows):
        notes.append(facts["model_note"])
    return notes


def _paper_notes(rows: list[dict[Hashable, Any]], papers: list[PaperValue | None], facts: Facts) -> list[str]:
    shown = [(row, paper) for row, paper in zip(rows, papers, strict=True) if paper]
    if not shown:
        return []
    tables = ", ".join(f"table {number}" for number in sorted({paper.table for _, paper in shown}))
    notes = [f"Paper's Dice: as printed ({tables}), with its labelled/unlabelled cases."]
    if facts["preset"] != "paper":
        notes[0] += " Its protocol and hardware differ from this run's."
    if any(row["variant"] == "pseudo-label" for row, _ in shown):
        notes.append("The paper's fine-tuned SAM stands beside test scores; ours is scored on the unlabelled cases.")
    return notes
