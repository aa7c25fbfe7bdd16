"""The tables of an exhibit: one row for every cell that its recipe asks for, missing ones too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cfrbench import registry
from cfrbench.exhibits.planning import FINE_TUNED, Exhibit, Part, Row
from cfrbench.exhibits.recipe import MADE_OF, Experiment, TableSpec
from cfrbench.exhibits.running import Finished
from cfrbench.published import paper_value
from cfrbench.report import ablations, findings, frames, tables
from cfrbench.report.tables import MISSING, Table
from cfrbench.reporting import remember

#: kinds of tables that are the same for every run
FINDINGS = ("gains", "ranking", "paper", "costs")


def all_tables(exhibit: Exhibit, finished: Sequence[Finished]) -> dict[str, Table]:
    """File name without its ending -> table; the first one is called like the exhibit."""
    found: dict[str, Table] = {}
    for spec in exhibit.recipe.table:
        if spec.kind == "stages":
            found[_free(exhibit.name, spec.kind, found)] = _stages(exhibit, finished)
            continue
        for one in finished:
            if one.part.experiment.kind not in MADE_OF[spec.kind]:
                continue
            table = _finding(exhibit, one, spec) if spec.kind in FINDINGS else _planned(exhibit, one, spec)
            if table.rows:
                found[_free(exhibit.name, stem_words(exhibit, one.part, spec.kind), found)] = table
    return found


def stem_words(exhibit: Exhibit, part: Part, kind: str) -> str:
    """What tells this part's tables or figures from those of the exhibit's other parts, and from other kinds."""
    experiments = [other.experiment for other in exhibit.parts]
    differing = [name for name in ("kind", "dataset", "net") if len({getattr(e, name) for e in experiments}) > 1]
    words = [kind, *(str(getattr(part.experiment, name)).replace(":", ".") for name in differing)]
    return "-".join(dict.fromkeys(words))


def _free(name: str, words: str, taken: Mapping[str, Any]) -> str:
    """A file name nobody has: the exhibit's own, then with words, then with a number."""
    if not taken:
        return name
    stem, count = f"{name}-{words}", 2
    while stem in taken:
        stem, count = f"{name}-{words}-{count}", count + 1
    return stem


def _finding(exhibit: Exhibit, one: Finished, spec: TableSpec) -> Table:
    """A table of what the finished cells show (`cfrbench.report.findings`): missing ones have no row there."""
    run = remember(one.plan.name, one.plan.store)
    (table, *_) = [*findings.tables_of(run.cases, run.facts, run.costs, [spec.kind]), Table("", (), ())]
    return replace(table, title=f"{exhibit.recipe.title}: {table.title}")


def _planned(exhibit: Exhibit, one: Finished, spec: TableSpec) -> Table:
    """A table of one part, with the rows of the recipe, its title and its notes."""
    make = {"comparison": tables.comparison, "by-class": tables.by_class, "ablation": ablations.comparison}[spec.kind]
    cases, facts = one.result.cases, one.result.facts
    leads = [(row.title,) if spec.kind == "ablation" else _lead(row, one) for row in one.part.rows]
    table = tables.with_metrics(tables.with_rows(make(cases, facts), list(dict.fromkeys(leads))), spec.metrics)
    notes = (*table.notes, *exhibit.recipe.notes, *one.part.notes, *_missing_notes(one))
    return replace(table, title=f"{exhibit.recipe.title}: {table.title}", notes=tuple(dict.fromkeys(notes)))


def _lead(row: Row, one: Finished) -> tuple[str, ...]:
    """The first cells of a row's line, as `tables.comparison` writes them."""
    config = one.part.config
    known: dict[Any, Any] = {
        "ssl": row.ssl, "title": row.title, "variant": row.variant, "labels": row.labels, "net": config.net,
        "unlabelled": "?" if row.unlabelled is None else row.unlabelled, "model": config.model_name,
        "tune": config.tune,
    }  # fmt: skip
    return tables.leading_cells(known, one.result.facts)


def _missing_notes(one: Finished) -> Iterator[str]:
    yield from (f"Missing: {words}" for words in one.part.missing)
    for title, reason in one.result.failures.items():
        yield f"Failed: {title}. {reason}"
    waiting = sum(one.artifact("score", cell) is None for cell in one.plan.chains) - len(one.result.failures)
    if waiting > 0:
        yield f"Unfinished: {waiting} of {len(one.plan.chains)} cells are not computed yet."


# ---------------------------------------------------------------------------------------------------------------------
# fine-tuning beside re-training (Table IX)


def _stages(exhibit: Exhibit, finished: Sequence[Finished]) -> Table:
    """A row for the fine-tuned model and each guided method at each budget, a column for each data set."""
    sweeps = [part for part in exhibit.parts if part.experiment.kind == "sweep"]
    results = {id(one.part): one for one in finished}
    lines = list(dict.fromkeys((place, line) for part in sweeps for place, line in _lines(part.experiment)))
    leads = {line: _name(sweeps, *line) for line in sorted(lines)}
    columns: dict[str, list[str]] = {"Budget, model": list(leads.values())}
    columns["Params (M)"] = [_parameters([results.get(id(part)) for part in sweeps], *line) for line in leads]
    for part in sweeps:
        title = _column(part, results.get(id(part)), columns)
        columns[title] = [_dice(part, results.get(id(part)), *line) for line in leads]
        paper = [_paper(part, *line) for line in leads]
        if set(paper) != {MISSING}:
            columns[f"{title}, paper"] = paper
    title = f"{exhibit.recipe.title}: Dice (%) of the fine-tuned model, and of networks re-trained with its labels"
    return Table(title, tuple(columns), tuple(zip(*columns.values(), strict=True)), _stage_notes(exhibit, finished))


def _lines(experiment: Experiment) -> Iterator[tuple[int, int]]:
    """Place of the budget, and of the model: 0 is the fine-tuned one, then the guided methods."""
    for place in range(len(experiment.labels)):
        yield from ((place, model) for model in range(1 + len(experiment.guided)))


def _name(parts: Sequence[Part], place: int, model: int) -> str:
    """``moderate, MT + CFR``; methods that stand in one row of several data sets are named side by side."""
    labels = [str(p.experiment.labels[place]) for p in parts if place < len(p.experiment.labels)]
    if model == 0:
        return f"{'/'.join(dict.fromkeys(labels))}, fine-tuned"
    guided = [p.experiment.guided[model - 1] for p in parts if model <= len(p.experiment.guided)]
    titles = dict.fromkeys(_title(name) for name in guided)
    return f"{'/'.join(dict.fromkeys(labels))}, {' or '.join(titles)} + CFR"


def _title(ssl: str) -> str:
    known = ssl in registry.names("ssl")
    return str(registry.load("ssl", ssl).title) if known else ssl


def _line_rows(one: Finished | None, place: int, model: int) -> list[dict[Any, Any]]:
    """The rows of the summary (one, or none) that stand in a line of the table."""
    if one is None or place >= len(one.part.budgets) or one.result.cases.empty:
        return []
    guided = one.part.experiment.guided
    ssl, variant = (FINE_TUNED, "baseline") if model == 0 else (guided[model - 1], "cfr")
    rows = frames.summary(one.result.cases).to_dict("records")
    labels = one.part.budgets[place]
    return [r for r in rows if (r["ssl"], r["variant"], r["labels"]) == (ssl, variant, labels)]


def _column(part: Part, one: Finished | None, taken: Mapping[str, Any]) -> str:
    title = tables.heading(one.result.facts) if one else part.config.dataset
    if title in taken:
        title = f"{title}, {part.config.net}"
    return title if title not in taken else f"{title}, {'/'.join(map(_title, part.experiment.guided))}"


def _dice(part: Part, one: Finished | None, place: int, model: int) -> str:
    rows = _line_rows(one, place, model)
    if not rows:
        return MISSING
    text, tuned = tables.dice_text(rows[0]), _line_rows(one, place, 0)
    return f"{text} ({rows[0]['dice'] - tuned[0]['dice']:+.2f})" if model and tuned else text


def _parameters(finished: Sequence[Finished | None], place: int, model: int) -> str:
    """Millions of parameters, as the manifests say; several where data sets differ."""
    counts = []
    for one in finished:
        for row in _line_rows(one, place, model):
            assert one is not None
            (cell, *_) = one.cells(ssl=row["ssl"], variant=row["variant"], labels=row["labels"])
            artifact = one.artifact("train" if model else "tune", cell)
            counts += [artifact.manifest["summary"]["parameters"] / 1e6] if artifact else []
    return "/".join(sorted({f"{count:.2f}" for count in counts}, key=float)) or MISSING


def _paper(part: Part, place: int, model: int) -> str:
    experiment = part.experiment
    if place >= len(experiment.labels) or model > len(experiment.guided):
        return MISSING
    variant = "cfr" if model else "pseudo-label"
    labels = int(experiment.paper_budget(place)) if str(experiment.paper_budget(place)).isdigit() else -1
    title = _title(experiment.guided[model - 1]) if model else ""
    found = paper_value(experiment.dataset, title, variant, labels)
    return MISSING if found is None else f"{found.value:.2f}"


def _stage_notes(exhibit: Exhibit, finished: Sequence[Finished]) -> tuple[str, ...]:
    seeds = sorted({seed for one in finished for seed in one.part.config.seeds})
    notes = [
        f"Means over test cases, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; in brackets: against the "
        "fine-tuned model, which is scored on the same cases.",
        *exhibit.recipe.notes,
    ]
    for one in finished:
        rows = [dict(row) for row in frames.summary(one.result.cases).to_dict("records")]
        notes += [*one.part.notes, *tables.standing_notes(rows, one.result.facts), *_missing_notes(one)]
    notes += [f"Missing: {part.config.dataset}. {part.reason}" for part in exhibit.parts if part.reason]
    return tuple(dict.fromkeys(notes))
