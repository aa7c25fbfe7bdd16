"""Image encoder and mask decoder train whole: MedSAM's second version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from cfrbench.contracts import FineTuner, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze
from cfrbench.prompting import PromptedTuner
from cfrbench.tuners import CONSTANT, UNAUGMENTED, trainable


class EncoderDecoder(PromptedTuner):
    """Only the prompt encoder is frozen (bowang-lab/MedSAM, ``train_one_gpu.py``).

    Batch norms of the encoder keep their statistics; their scales and shifts train. ``prompt=box`` gives the original's
    form, one box and one mask.
    """

    name = "encoder-decoder"
    published = (
        Published("MedSAM v2, as SAM", num_classes=4),
        Published("MedSAM v2, no prompt, 1 class"),
    )
    #: the current trainer, which augments nothing
    original: ClassVar[Mapping[str, Any]] = {
        **CONSTANT,
        **UNAUGMENTED,
        "tuning.lr": 1e-4,
        "tuning.weight_decay": 0.01,
    }

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze the prompt encoder and the statistics of batch norms."""
        freeze(model)
        model.image_encoder.requires_grad_(True)
        model.mask_decoder.requires_grad_(True)
        self.prompt(model)
        return trainable(model)


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """MedSAM's second version."""
    return [EncoderDecoder]
