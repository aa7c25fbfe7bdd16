"""Predict anybody's scans with a trained segmenter; each mask keeps the geometry of its scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfrbench.config import Settings
from cfrbench.errors import DataError, UsageError
from cfrbench.images import ImageFile, find_images, image_stem, read_image, write_label
from cfrbench.recipes import WEIGHTS
from cfrbench.store import Store

if TYPE_CHECKING:
    from torch import nn

    from cfrbench.pipeline import Bench

Chosen = dict[str, Any]


def choose_cell(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> Chosen:
    """The one trained model of a run that ``wanted`` names; UsageError with the choices if it is not one."""
    cells = [cell for cell in record["cells"] if cell["variant"] != "pseudo-label"]
    hits = [cell for cell in cells if all(cell.get(k, "") == v for k, v in wanted.items() if v is not None)]
    if len(hits) == 1:
        chosen: Chosen = hits[0]
        return chosen
    listed = "; ".join(_options(cell) for cell in hits or cells)
    problem = "matches no model" if not hits else "matches several models"
    raise UsageError(f"The request {problem} of the run {record['name']}. Choose one: {listed}.")


def _options(cell: Mapping[str, Any]) -> str:
    """The options that choose a cell."""
    names = {"ssl": "ssl", "labels": "labels", "seed": "seed", "variant": "variant", "fold": "fold",
             "choice": "label-seed"}  # fmt: skip
    return " ".join(f"--{option} {cell[key]}" for key, option in names.items() if cell.get(key, "") != "")


def open_model(store: Path, reference: str, wanted: Mapping[str, Any]) -> tuple[nn.Module, Bench]:
    """The network of one cell of a run, ready to predict, with the settings it was trained under."""
    from cfrbench import pipeline, stages

    home = Store(store)
    cell = choose_cell(home.run(reference), wanted)
    scored = home.find_verified("score", cell["score"])
    predicted = scored and home.find_verified("predict", scored.manifest["recipe"]["from"]["key"])
    trained = predicted and home.find_verified("train", predicted.manifest["recipe"]["from"]["key"])
    if predicted is None or trained is None:
        raise UsageError(f"The weights of {cell['title']} ({cell['variant']}, {cell['labels']} labels, seed "
                         f"{cell['seed']}) are no longer in {store}. Give the run's command again.")  # fmt: skip
    recipe = trained.manifest["recipe"]
    settings = Settings.model_validate({**recipe["settings"], **predicted.manifest["recipe"]["settings"]})
    bench = pipeline.Bench.of(stages.make("data", recipe["data"], None), settings)
    return stages.trained_network(recipe, trained.path(WEIGHTS), bench), bench


def predict_files(
    network: nn.Module, bench: Bench, source: Path, output: Path, on_file: Callable[[Path], None] | None = None
) -> list[Path]:
    """Segment a scan or a folder of scans; each mask has the shape, affine and orientation of its scan."""
    from cfrbench.pipeline import for_prediction

    files = find_images(source)
    targets = _targets(files, source, output)
    network = for_prediction(bench.compute, network)
    for file, target in zip(files, targets, strict=True):
        image = read_image(file, bench.source.axcodes)
        write_label(target, segment(network, bench, image), image)
        if on_file:
            on_file(target)
    return targets


def segment(network: nn.Module, bench: Bench, image: ImageFile) -> Any:
    """The uint8 label map ``(H, W, D)`` of one scan, on the scan's own voxels."""
    import torch

    from cfrbench.pipeline import probabilities_of
    from cfrbench.prepare import to_stored, to_working
    from cfrbench.volume import checked_volume

    classes = bench.source.num_classes
    try:
        placed = bench.source.scan_steps.place(image.array, image.spacing_mm)
    except DataError as error:
        raise DataError(f"{image.path}: {error}") from error
    volume = checked_volume(str(image.path), torch.from_numpy(placed.image), None, classes, placed.spacing_mm)
    working = to_working(image.path.name, volume, bench.settings.grid, classes)
    found = to_stored(probabilities_of(bench, network, working.image), volume.shape).numpy()
    return placed.placement.restored(found)


def _targets(files: Sequence[Path], source: Path, output: Path) -> list[Path]:
    if source.is_dir() or output.is_dir():
        if output.is_file():
            raise UsageError(f"{source} is a folder, but the output {output} is a file. Give a folder with -o.")
        output.mkdir(parents=True, exist_ok=True)
        targets = [output / f"{image_stem(file)}.nii.gz" for file in files]
    else:
        targets = [output]
    for file, target in zip(files, targets, strict=True):
        if target.resolve() == file.resolve():
            raise UsageError(f"The mask would overwrite the scan {file}. Give another output with -o.")
    return targets
