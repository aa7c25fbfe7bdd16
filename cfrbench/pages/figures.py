"""The figures of a page, as pictures inside it: bars of Dice, montages of cases chosen by rule."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cfrbench.files import read_log
from cfrbench.pages.material import PSEUDO, Group, Material, best_median_worst
from cfrbench.report import charts, frames, pictures, plots, tables


@dataclass(frozen=True)
class Figure:
    """A picture with what stands under it. source: a ``data:`` address."""

    caption: str
    source: str


def results(material: Material) -> list[Figure]:
    """Dice of every row of the table, a chart for each budget that leaves something unlabelled, bounds included."""
    rows = frames.summary(material.result.cases).to_dict("records") if len(material.result.cases) else []
    facts = material.result.facts
    found = []
    for labels in sorted({row["labels"] for row in rows if row["unlabelled"]} or {row["labels"] for row in rows}):
        own = [row for row in rows if row["labels"] in (labels, facts["train_cases"])]
        bars = [charts.Bar(_bar_name(row, facts), row["dice"], charts.spread_of(row), row["variant"] == "cfr")
                for row in own]  # fmt: skip
        title = f"{tables.heading(facts)}, {labels} labelled"
        spread = f"{len(own[0]['seeds'])} seeds" if len(own[0]["seeds"]) > 1 else "cases"
        axis = f"Dice (%), ± {spread}; pseudo-labels on unlabelled cases, all else on test cases"
        found.append(_drawn(f"Dice with {labels} labelled cases.", partial(charts.draw_bars, bars, title, axis)))
    return found


def _bar_name(row: Mapping[Any, Any], facts: tables.Facts) -> str:
    if "ablation" in facts:
        return str(row["title"])
    if row["variant"] == "cfr":
        return f"{row['title']} + CFR"
    if row["variant"] == PSEUDO:
        return "pseudo-labels"
    upper = row["labels"] == facts["train_cases"]
    return f"upper bound, {row['labels']} labels" if upper else str(row["title"])


def sweep(material: Material) -> Iterator[Figure]:
    """Dice over budgets, pseudo-labels against what was learned from them, training curves; where a run has them."""
    facts, rows = material.result.facts, frames.summary(material.result.cases).to_dict("records")
    if "ablation" in facts or not rows:
        return
    title, methods = tables.heading(facts), [row for row in rows if row["variant"] != PSEUDO and row["unlabelled"]]
    budgets: dict[str, dict[str, dict[int, plots.Score]]] = {}
    for row in methods:
        spread = charts.spread_of(row)
        score = plots.Score(row["dice"], math.nan if spread is None else spread)
        budgets.setdefault(row["title"], {}).setdefault(row["variant"], {})[row["labels"]] = score
    if len({row["labels"] for row in methods}) > 1:
        yield _drawn("Dice over labelled cases.", partial(plots.draw_budgets, budgets, title, "Dice (%)"))
    pseudo = {row["labels"]: row["dice"] for row in rows if row["variant"] == PSEUDO}
    dots = [plots.Dot(row["title"], row["labels"], pseudo[row["labels"]], row["dice"]) for row in methods
            if row["variant"] == "cfr" and row["labels"] in pseudo]  # fmt: skip
    if dots:
        yield _drawn("Pseudo-labels, and what was learned from them.", partial(plots.draw_quality, dots, title))
    for labels, curves in _curves(material).items():
        words = f"{title}, {labels} labelled, first seed"
        yield _drawn(f"Training with {labels} labelled cases, first seed.", partial(plots.draw_curves, curves, words))


def _curves(material: Material) -> dict[int, dict[str, dict[str, tuple[list[int], list[float]]]]]:
    """Budget -> method -> variant -> steps and losses of its training, as logged, of the first seed."""
    found: dict[int, dict[str, dict[str, tuple[list[int], list[float]]]]] = {}
    first = min(cell["seed"] for cell in material.record["cells"])
    for cell in material.record["cells"]:
        trained = material.home.find_any("train", cell["keys"])
        if trained is None or not cell["unlabelled"] or cell["seed"] != first:
            continue
        steps = {event["step"]: event["loss"] for event in read_log(trained.path("log.jsonl"))
                 if event["event"] == "step" and event.get("loss") is not None}  # fmt: skip
        forms = found.setdefault(cell["labels"], {}).setdefault(cell["title"], {})
        forms[cell["variant"]] = (list(steps), list(steps.values()))
    return found


def telling_cases(material: Material, groups: Sequence[Group]) -> Iterator[Figure]:
    """The test cases of best, median and worst gain of each pair of the first seed."""
    first = min((group.seed for group in groups), default=0)
    for group in groups:
        gains = group.gains() if group.seed == first else {}
        for case, word in best_median_worst(gains).items():
            yield montage(material, group, case, f"{word} gain ({gains[case]:+.1f} Dice)")


def montage(material: Material, group: Group, case: str, words: str = "") -> Figure:
    """Image, truth and every form of a group on the slice with most truth."""
    masks = {"truth": material.truth(case)}
    masks |= {f"{layer.name}, Dice {layer.dice[case]:.1f}": layer.masks[case] for layer in group.layers
              if case in layer.masks}  # fmt: skip
    caption = f"{group.title}: {case}{f', {words}' if words else ''}."
    image = material.volume(case).image.numpy()
    return _drawn(caption, partial(pictures.draw, image, masks, f"{group.title}: {case}"))


def pseudo_cases(material: Material) -> Iterator[Figure]:
    """The pseudo-labelled cases of best, median and worst Dice, at each budget of the first seed."""
    first = min((one.record.about["seed"] for one in material.pseudo_cells), default=0)
    for one in material.pseudo_cells:
        if one.record.about["seed"] != first or material.source is None:
            continue
        maps, dice = one.label_maps(), one.dice()
        for case, word in best_median_worst({case: value for case, value in dice.items() if case in maps}).items():
            masks = {"truth": material.truth(case), f"{PSEUDO}, Dice {dice[case]:.1f}": maps[case]}
            title = f"{one.words}: {case}"
            image = material.volume(case).image.numpy()
            yield _drawn(f"{title}, {word} Dice.", partial(pictures.draw, image, masks, title))


def _drawn(caption: str, draw: Callable[[Path], None]) -> Figure:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return Figure(caption, f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}")
