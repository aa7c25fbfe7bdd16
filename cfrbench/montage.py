"""The qualitative picture of a finished run: fetches what `cfrbench.report.pictures` draws."""

from __future__ import annotations

from pathlib import Path

from cfrbench import sweep
from cfrbench.artifact import Artifact
from cfrbench.errors import StoreError, UsageError
from cfrbench.formats import read_labels
from cfrbench.recipes import open_source
from cfrbench.report import pictures
from cfrbench.store import Store


def draw_run(
    reference: str, store: Path, output: Path, *, ssl: str | None, labels: int | None, seed: int | None
) -> str:
    """Draw the test case of median gain of one method and budget (the run's first ones by default); its case id."""
    home = Store(store)
    result = sweep.recall(reference, store)
    if "ablation" in result.facts:
        raise UsageError(f"{result.name} is an ablation, which draws its own pictures. Give its command again.")
    pairs = [c for c in home.run(reference)["cells"] if c["variant"] in ("baseline", "cfr") and c["unlabelled"]]
    wanted = {"ssl": ssl, "labels": labels, "seed": seed}
    pairs = [c for c in pairs if all(v is None or c[k] == v for k, v in wanted.items())]
    if not pairs:
        raise UsageError(f"The run {reference} has no method with these --ssl, --labels and --seed to draw.")
    first = pairs[0]
    twins = {c["variant"]: c for c in pairs if all(c[k] == first[k] for k in wanted)}
    case = pictures.median_gain_case(result.cases, first["ssl"], first["labels"], first["seed"])
    config = result.config
    volume = open_source(config.dataset, config.data_root, config.set).load(case)
    if volume.label is None:
        raise UsageError(f"The case {case} has no label to draw.")
    dice = result.cases[(result.cases["case"] == case) & (result.cases["metric"] == "dice")]
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


def _masks(home: Store, cell: dict[str, object]) -> Artifact:
    keys = cell["keys"]
    assert isinstance(keys, list)
    found = home.find_any("predict", keys)
    if found is None:
        raise StoreError("The predictions of this run are no longer in the store. Give the run's command again.")
    return found
