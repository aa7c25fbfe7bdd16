"""SAM-Med2D: an adapter with a channel gate and a convolution beside every MLP of SAM's image encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from cfrbench.contracts import FineTuner, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.med2d import add_adapters, drop_adapters
from cfrbench.promptable import freeze
from cfrbench.prompting import PromptedTuner, PromptOptions
from cfrbench.tuners import CONSTANT, VIT, train_only, trainable


class SamMed2dAdapter(PromptedTuner):
    """Adapters, prompt encoder and decoder train (OpenGVLab/SAM-Med2D ``train.py``).

    On the foundation model ``sam-med2d`` its own adapters go on training; on other ViTs fresh ones are put in, which
    are no identity at first. The original trains on boxes or points (``prompt``) and repeats each step eight times with
    points where the mask was wrong; those repetitions are not here.
    """

    name = "sam-med2d-adapter"
    encoders = (VIT,)
    place = "its adapters stand beside the MLPs"
    halves = True
    best_mask = True
    published = (
        Published("SAM-Med2D, as SAM", input_size=256, num_classes=4),
        Published("SAM-Med2D, no prompt, 1 class", input_size=256),
    )

    original: ClassVar[Mapping[str, Any]] = CONSTANT | {"tuning.lr": 1e-4}

    class Config(PromptOptions):
        """The network is the original's."""

        drop: bool = Field(
            False, description="predict without the adapters: an official option, of which generality is claimed"
        )

    config: Config

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Put adapters in unless there are some; they, prompt encoder and decoder train."""
        freeze(model)
        if not any(name.endswith("Adapter") for name, _ in model.image_encoder.named_modules()):
            add_adapters(model.image_encoder)
        train_only(model.image_encoder, "Adapter")
        model.prompt_encoder.requires_grad_(True)
        model.mask_decoder.requires_grad_(True)
        self.prompt(model)
        return trainable(model)

    def merge(self, model: Promptable) -> None:
        """Take the adapters out again, if that was asked for."""
        if self.config.drop:
            drop_adapters(model.image_encoder)


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """SAM-Med2D."""
    return [SamMed2dAdapter]
