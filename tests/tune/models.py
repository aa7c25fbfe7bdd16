"""Small foundation models of each encoder family, and images for whatever a fine-tuner takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfrbench import registry
from cfrbench.contracts import FineTuner, FoundationModel, Promptable

#: models whose weights come with the package, one of each encoder family, at the smallest useful size
SIDES = {"tiny": 64, "lite-medsam": 32}


def foundation(name: str, side: int | None = None) -> FoundationModel:
    plugin = registry.load("model", name)
    model: FoundationModel = plugin(plugin.Config(input_size=side or SIDES[name]))
    return model


def tuner_of(name: str, **options: Any) -> FineTuner:
    plugin = registry.load("tune", name)
    tuner: FineTuner = plugin(plugin.Config(**options))
    return tuner


def adapted(tuner: FineTuner, model: FoundationModel, classes: int, seed: int = 0) -> Promptable:
    torch.manual_seed(seed)
    network = tuner.build(model, classes)
    tuner.adapt(network)
    return network


def images(tuner: FineTuner, network: Promptable, model: FoundationModel) -> Tensor:
    """Two images, or two volumes of three slices."""
    side = network.input_size or model.input_size
    shape = (2, 3, side, side) if tuner.takes == "canvas" else (2, 3, 3, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


FORMS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in registry.names("tune")),
    ("lora", {"preset": "samed_s"}),
    ("lora", {"preset": "msa"}),
    ("decoder-only", {"prompt": "box"}),
    ("encoder-decoder", {"prompt": "click"}),
    ("msa-adapter", {"prompt": "click", "image_size": 32}),
    ("msa-adapter", {"rel_pos": "pretrained"}),
    ("samus", {"prompt": "click"}),
    ("sam-med2d-adapter", {"prompt": "box"}),
    ("sam3d-adapter", {"clicks": True}),
]


def words(value: Any) -> str:
    return "-".join(map(str, value.values())) or "default" if isinstance(value, dict) else str(value)
