"""The qualitative picture of a finished run, and of a data set: fetches what `cfrbench.report.pictures` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfrbench import sweep
from cfrbench.artifact import Artifact
from cfrbench.contracts import DataSource
from cfrbench.errors import StoreError, UsageError, suggest
from cfrbench.formats import read_labels
from cfrbench.recipes import open_source
from cfrbench.report import pictures
from cfrbench.store import Store
from cfrbench.volume import Volume

#: cases of a data set that are drawn if none are named
SHOWN = 12
#: what tells pairs of twins apart
CHOSEN = ("ssl", "labels", "seed", "fold", "choice")


def draw_run(reference: str, store: Path, output: Path, wanted: Mapping[str, Any]) -> str:
    """Draw the test case of median gain of one pair of cells (the first that matches ``wanted``); its case id.

    wanted: values of `CHOSEN`; None = any.
    """
    home = Store(store)
    result = sweep.recall(reference, store)
    if "ablation" in result.facts:
        raise UsageError(f"{result.name} is an ablation, which draws its own pictures. Give its command again.")
    pairs = [c for c in home.run(reference)["cells"] if c["variant"] in ("baseline", "cfr") and c["unlabelled"]]
    pairs = [c for c in pairs if all(v is None or c.get(k, "") == v for k, v in wanted.items())]
    if not pairs:
        asked = ", ".join(f"{k} {v}" for k, v in wanted.items() if v is not None)
        raise UsageError(f"The run {reference} has no method with {asked or 'a guided twin'} to draw.")
    first = {key: pairs[0].get(key, "") for key in CHOSEN}
    twins = {c["variant"]: c for c in pairs if all(c.get(k, "") == v for k, v in first.items())}
    cases = result.cases[(result.cases["fold"] == first["fold"]) & (result.cases["choice"] == first["choice"])]
    case = pictures.median_gain_case(cases, first["ssl"], first["labels"], first["seed"])
    config = result.config
    volume = open_source(config.dataset, config.data_root, config.set).load(case)
    if volume.label is None:
        raise UsageError(f"The case {case} has no label to draw.")
    dice = cases[(cases["case"] == case) & (cases["metric"] == "dice")]
    masks = {"truth": volume.label.numpy()}
    for variant, cell in twins.items():
        rows = dice[(dice["ssl"] == cell["ssl"]) & (dice["variant"] == variant) & (dice["labels"] == cell["labels"])
                    & (dice["seed"] == cell["seed"])]  # fmt: skip
        name = cell["title"] + (" + CFR" if variant == "cfr" else "")
        masks[f"{name}, Dice {rows['value'].mean():.1f}"] = read_labels(_masks(home, cell).path("labels.npz"))[
            case
        ].numpy()
    title = f"{result.facts['title']} {case}, {first['labels']} labelled"
    pictures.draw(volume.image.numpy(), masks, title, output)
    return case


def draw_cases(source: DataSource, cases: Sequence[str] | None, output: Path) -> list[str]:
    """Draw a slice of each of ``cases`` (the first `SHOWN` without any) with the lines of its label; their ids."""
    split = source.split()
    listed = [*split.train, *split.val, *split.test]
    unknown = [case for case in cases or () if case not in listed]
    if unknown:
        raise UsageError(f"{source.title} has no case '{unknown[0]}'. {suggest(unknown[0], listed[:50])}")
    chosen = list(cases or listed[:SHOWN])
    panels = [_panel(case, source.load(case)) for case in chosen]
    pictures.draw_canvases(panels, f"{source.title}: {len(chosen)} of {len(listed)} cases", output,
                           source.class_names)  # fmt: skip
    return chosen


def _panel(case: str, volume: Volume) -> pictures.Panel:
    """The slice with most labelled voxels, or the middle one; first axis to the right, as `pictures.draw` has it."""
    label = None if volume.label is None else volume.label.numpy()
    index = volume.shape[2] // 2 if label is None else pictures.best_slice(label)
    image = volume.image[:, :, index].numpy().T
    return pictures.Panel(f"{case}, slice {index}", image, prediction=None if label is None else label[:, :, index].T,
                          aspect=volume.spacing_mm[1] / volume.spacing_mm[0])  # fmt: skip


def _masks(home: Store, cell: dict[str, object]) -> Artifact:
    keys = cell["keys"]
    assert isinstance(keys, list)
    found = home.find_any("predict", keys)
    if found is None:
        raise StoreError("The predictions of this run are no longer in the store. Give the run's command again.")
    return found
