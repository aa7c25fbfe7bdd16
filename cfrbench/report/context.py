"""What a table must say beside its numbers: data set, protocol, what the weights have seen."""

from __future__ import annotations

from dataclasses import dataclass

from cfrbench.config import PRESET_WORDS, Settings


@dataclass(frozen=True)
class Context:
    """Everything the notes under a table are made from.

    protocol: one line, from `protocol_line`. unit: of distances. train_cases: how many labels the upper bound has.
    model_note: the foundation model's note (what its weights may have seen before).
    """

    dataset: str
    preset: str
    protocol: str
    unit: str
    train_cases: int
    synthetic: bool = False
    model_note: str = ""


def protocol_line(preset: str, settings: Settings) -> str:
    """What makes the numbers of a table comparable, in one line."""
    training, scoring, inference = settings.training, settings.scoring, settings.inference
    grid = "" if settings.grid.downsample == 1 else f" on a grid {settings.grid.downsample} times coarser"
    parts = [
        f"preset {preset} ({PRESET_WORDS.get(preset, 'own settings')})",
        f"crops {'x'.join(map(str, training.patch))}{grid}",
        f"{training.steps} steps, batch {training.labelled_batch}+{training.unlabelled_batch}, last checkpoint",
        f"pseudo-labels per {'volume' if settings.pseudo.mode == 'volume' else 'crop (online)'}",
        f"strides {inference.stride_xy}/{inference.stride_z}",
        f"scored on the original grid, distances in {scoring.unit}",
        f"empty masks: {scoring.empty}",
        f"post-processing: {scoring.postprocess}",
        settings.compute.precision,
    ]
    return "; ".join(parts) + "."
