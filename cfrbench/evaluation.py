"""Score anybody's masks, or anybody's published weights, by the protocol of the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench import registry
from cfrbench.config import RunConfig, Settings, override, validate
from cfrbench.errors import DataError, WeightsError
from cfrbench.images import find_images, image_stem, read_label

if TYPE_CHECKING:
    import pandas as pd

    from cfrbench.pipeline import Bench

METRICS = ("dice", "jaccard", "asd", "hd95")


def of_folders(predictions: Path, truths: Path, values: Mapping[str, Any]) -> tuple[pd.DataFrame, str]:
    """Scores of a folder of masks under ``scoring.*`` values, and the unit of their distances."""
    settings = override(Settings(), values)
    return score_folders(predictions, truths, settings), settings.scoring.unit


def of_checkpoint(
    weights: Path, dataset: str, root: Path | None, net: str, preset: str, values: Mapping[str, Any]
) -> tuple[pd.DataFrame, str]:
    """Scores of published weights on a data set's test volumes, and the unit of their distances."""
    from cfrbench.pipeline import Bench
    from cfrbench.recipes import open_source

    config = validate(RunConfig, {"dataset": dataset, "preset": preset, "set": dict(values)}, "the command line")
    source = open_source(dataset, root, values)
    settings = config.settings(source.protocol(preset))
    cls = registry.load("net", net)
    options = validate(cls.Config, settings.options.get(f"net.{cls.name}", {}), f"the options of net.{cls.name}")
    return score_checkpoint(weights, Bench.of(source, settings), cls(options)), settings.scoring.unit


def as_json(frame: pd.DataFrame, unit: str) -> dict[str, Any]:
    """Rows and means as plain values; non-finite is None."""
    rows = [{k: _finite(v) for k, v in row.items()} for row in frame.to_dict("records")]
    means = {name: _finite(float(frame[name].mean())) for name in METRICS}
    return {"rows": rows, "mean": means, "unit": unit, "empty": int((frame["empty"] != "").sum())}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def score_folders(predictions: Path, truths: Path, settings: Settings, classes: int | None = None) -> pd.DataFrame:
    """Score masks against masks of the same file names; columns case, class, dice, jaccard, asd, hd95, empty."""
    import pandas as pd

    from cfrbench.metrics import score_case, score_case_medpy

    section = settings.scoring
    compare = {"native": score_case, "medpy": score_case_medpy}[section.backend]
    rows: list[dict[str, Any]] = []
    for name, (prediction, truth) in _pairs(predictions, truths).items():
        found, wanted = read_label(prediction), read_label(truth)
        if found.array.shape != wanted.array.shape:
            raise DataError(f"{prediction} has shape {found.array.shape}, {truth} has {wanted.array.shape}. Both must "
                            "be on one grid.")  # fmt: skip
        count = classes or 1 + max(int(found.array.max()), int(wanted.array.max()), 1)
        spacing = wanted.spacing_mm if section.unit == "mm" else (1.0, 1.0, 1.0)
        for number, scores in compare(found.array, wanted.array, count, spacing, section.empty).items():
            rows.append({"case": name, "class": str(number), "dice": scores.dice, "jaccard": scores.jaccard,
                         "asd": scores.asd, "hd95": scores.hd95, "empty": scores.empty})  # fmt: skip
    return pd.DataFrame(rows)


def _pairs(predictions: Path, truths: Path) -> dict[str, tuple[Path, Path]]:
    found = {image_stem(path): path for path in find_images(predictions)}
    wanted = {image_stem(path): path for path in find_images(truths)}
    if len(found) == len(wanted) == 1:
        return {next(iter(wanted)): (next(iter(found.values())), next(iter(wanted.values())))}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise DataError(f"{predictions} has no mask for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. "
                        "Predictions and truth are paired by file name.")  # fmt: skip
    return {name: (found[name], wanted[name]) for name in wanted}


def score_checkpoint(weights: Path, bench: Bench, segmenter: Any) -> pd.DataFrame:
    """Score somebody's network weights (.pth or .safetensors) on the test volumes of a data set."""
    import pandas as pd

    from cfrbench import pipeline
    from cfrbench.weights import read_checkpoint

    network = segmenter.build(1, bench.source.num_classes)
    state = {key.removeprefix("module."): tensor for key, tensor in read_checkpoint(weights).items()}
    expected = network.state_dict()
    wrong = sorted(k for k in {*expected, *state} if k not in state or k not in expected
                   or state[k].shape != expected[k].shape)  # fmt: skip
    if wrong:
        raise WeightsError(f"{weights} does not fit the segmenter '{segmenter.name}' with {bench.source.num_classes} "
                           f"classes: {len(wrong)} tensors differ, the first is '{wrong[0]}'. Check --net, its width "
                           f"(--set net.{segmenter.name}.width=16) and the data set.")  # fmt: skip
    network.load_state_dict(state)
    bench.compute.place(network)
    rows: list[dict[str, Any]] = []
    for case in bench.source.split().test:
        rows += pipeline.score(bench, pipeline.predict(bench, network, [case]))
    return pd.DataFrame(rows)
