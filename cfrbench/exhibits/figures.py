"""The figures of an exhibit: what each kind shows is taken from scores, manifests and logs of the store, and drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfrbench.errors import UsageError
from cfrbench.exhibition import PSEUDO_DICE, bars_of, points_of, spread_words, title_of
from cfrbench.exhibits import montages
from cfrbench.exhibits.planning import FINE_TUNED, Exhibit, Row
from cfrbench.exhibits.recipe import DRAWN_OF, FigureSpec
from cfrbench.exhibits.running import Finished
from cfrbench.exhibits.tables import stem_words
from cfrbench.files import read_log
from cfrbench.report import ablations, charts, frames, pictures, plots, tables
from cfrbench.report.plots import Dot, Pair, Score

#: draws one kind of figure of one part; UsageError if there is nothing to draw
Draw = Callable[[Finished, FigureSpec, str, Path, bool], None]


def draw_all(
    exhibit: Exhibit, finished: Sequence[Finished], folder: Path, *, compute: bool
) -> tuple[list[Path], dict[str, str]]:
    """Draw every figure; what was written, and the reason for each that was not.

    ``compute`` allows the fine-tuned model to label the few test cases that a montage shows.
    """
    written: list[Path] = []
    omitted: dict[str, str] = {}
    for spec in exhibit.recipe.figure:
        for one in finished:
            if one.part.experiment.kind not in DRAWN_OF[spec.kind]:
                continue
            stem = f"{exhibit.name}-{stem_words(exhibit, one.part, spec.kind)}"
            while any(path.stem == stem for path in written):
                stem += "-2"
            title = f"{exhibit.recipe.title}: {tables.heading(one.result.facts)}"
            try:
                DRAW[spec.kind](one, spec, title, folder / stem, compute)
                written += pictures.files_of(folder / stem)
            except UsageError as error:
                omitted[stem] = str(error)
    return written, omitted


# ---------------------------------------------------------------------------------------------------------------------
# scores of a sweep


def _scores(one: Finished) -> dict[tuple[str, str, int | str], Score]:
    """(method, variant, budget) -> mean Dice with spread; UsageError if nothing is finished."""
    return {(row["ssl"], row["variant"], row["labels"]): _score(row) for row in _summary(one)}


def _summary(one: Finished) -> list[dict[Any, Any]]:
    if one.result.cases.empty:
        raise UsageError("No cell is finished.")
    return frames.summary(one.result.cases).to_dict("records")


def _score(row: dict[Any, Any]) -> Score:
    spread = charts.spread_of(row)
    return Score(float(row["dice"]), math.nan if spread is None else spread)


def _axis(one: Finished) -> str:
    return f"Dice (%), {spread_words(_summary(one))}"


def _methods(one: Finished) -> dict[str, list[Row]]:
    """The rows of each semi-supervised method, by name."""
    found: dict[str, list[Row]] = {}
    for row in one.part.rows:
        if row.variant in ("baseline", "cfr") and row.ssl not in (frames.SUPERVISED, FINE_TUNED):
            found.setdefault(row.ssl, []).append(row)
    return found


def _budgets(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    scores = _scores(one)
    methods: dict[str, dict[str, dict[int, Score]]] = {}
    for rows in _methods(one).values():
        for row in rows:
            if isinstance(row.labels, int):
                score = scores.get((row.ssl, row.variant, row.labels), Score(math.nan))
                methods.setdefault(row.title, {}).setdefault(row.variant, {})[row.labels] = score
    plots.draw_budgets(methods, title, _axis(one), path)


def _bars(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    scores = _scores(one)
    budgets = list(dict.fromkeys(row.labels for rows in _methods(one).values() for row in rows))
    pairs = []
    for labels in budgets:
        for rows in _methods(one).values():
            forms = {row.variant: scores.get((row.ssl, row.variant, labels), Score(math.nan))
                     for row in rows if row.labels == labels}  # fmt: skip
            name = rows[0].title if len(budgets) == 1 else f"{rows[0].title}, {labels} labelled"
            pairs.append(Pair(name, forms.get("baseline"), forms.get("cfr")))
    total = one.result.facts["train_cases"]
    bounds = {"upper bound" if row.labels == total else "lower bound": scores[key].value for row in one.part.rows
              if row.ssl == frames.SUPERVISED and (key := (row.ssl, "baseline", row.labels)) in scores}  # fmt: skip
    labelled = f", {budgets[0]} labelled" if len(budgets) == 1 else ""
    plots.draw_methods(pairs, bounds, title + labelled, _axis(one), path)


def _quality(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    scores = _scores(one)
    pseudo = {labels: score.value for (_, variant, labels), score in scores.items() if variant == "pseudo-label"}
    titles = {row.ssl: row.title for row in one.part.rows}
    dots = [Dot(titles[ssl], int(labels), pseudo[labels], score.value)
            for (ssl, variant, labels), score in scores.items() if variant == "cfr" and labels in pseudo]  # fmt: skip
    if not dots:
        raise UsageError("No guided network and the pseudo-labels it learned from are both finished.")
    plots.draw_quality(dots, title, path)


def _curves(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    """The first budget and seed."""
    methods: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    labels = one.part.config.labels[0]
    for cell in one.cells(labels=labels, seed=one.first_seed):
        if cell.variant == "pseudo-label" or cell.ssl in (frames.SUPERVISED, FINE_TUNED):
            continue
        if (trained := one.artifact("train", cell)) is not None:
            steps = {e["step"]: e["loss"] for e in read_log(trained.path("log.jsonl"))
                     if e["event"] == "step" and e.get("loss") is not None}  # fmt: skip
            methods.setdefault(cell.title, {})[cell.variant] = (list(steps), list(steps.values()))
    if not methods:
        raise UsageError("No training is finished whose log could be drawn.")
    plots.draw_curves(methods, f"{title}, {labels} labelled, seed {one.first_seed}", path)


def _ranks(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    """Methods and twins of the first budget, ranked by the mean Dice over cases; seeds and classes averaged before."""
    from cfrbench.report.statistics import ranking

    labels, cases = one.part.config.labels[0], one.result.cases
    dice = cases[(cases["metric"] == "dice") & (cases["labels"] == labels) & cases["variant"].isin(["baseline", "cfr"])]
    wide = dice.pivot_table(index=["ssl", "variant"], columns="case", values="value", aggfunc="mean", sort=False)
    wide = wide.dropna(axis="columns")
    if len(wide) < 2 or wide.shape[1] < 2:
        raise UsageError("A ranking needs two finished methods and two test cases.")
    names = {(row.ssl, row.variant): f"{row.title} + CFR" if row.variant == "cfr" else row.title
             for row in one.part.rows}  # fmt: skip
    found = ranking(wide.to_numpy())
    order = np.argsort(found.rank, kind="stable")
    samples = {names[wide.index[place]]: found.samples[place] for place in order}
    plots.draw_ranks(samples, f"{title}, {labels} labelled, {wide.shape[1]} test cases", path)


# ---------------------------------------------------------------------------------------------------------------------
# ablations


def _scored(one: Finished) -> tuple[list[dict[Any, Any]], list[Mapping[str, Any]]]:
    rows, about = ablations.scored(one.result.cases, one.result.facts)
    if not rows:
        raise UsageError("No variant is finished.")
    return rows, about


def _variants(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    rows, _ = _scored(one)
    bars = {bar.label: bar for bar in bars_of(rows)}
    shown = [bars.get(row.title, charts.Bar(row.title, math.nan)) for row in one.part.rows]
    charts.draw_bars(shown, _titled(one, title), f"{PSEUDO_DICE}, {spread_words(rows)}", path)


def _scales(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    rows, about = _scored(one)
    bars = bars_of(rows)
    curve = [(place["scale"], bar) for place, bar in zip(about, bars, strict=True) if place["scale"]]
    if not curve:
        raise UsageError("No scale is finished.")
    grid = next((bar for bar in bars if bar.highlighted), None)
    charts.draw_curve(curve, grid, _titled(one, title), f"{PSEUDO_DICE}, {spread_words(rows)}", path)


def _parameters(one: Finished, spec: FigureSpec, title: str, path: Path, compute: bool) -> None:
    points = points_of(*_scored(one))
    if not points:
        raise UsageError("Of no finished variant the parameters were counted.")
    charts.draw_parameters(points, _titled(one, title), PSEUDO_DICE, path)


def _titled(one: Finished, title: str) -> str:
    return f"{title.partition(':')[0]}: {title_of(one.result)}"


DRAW: dict[str, Draw] = {
    "budgets": _budgets, "methods": _bars, "quality": _quality, "curves": _curves, "ranks": _ranks,
    "variants": _variants, "scales": _scales, "parameters": _parameters,
    "predictions": montages.draw_predictions, "pseudo": montages.draw_pseudo,
}  # fmt: skip
