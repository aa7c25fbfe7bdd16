"""Only the mask decoder trains: MedSAM's first version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from cfrbench.contracts import FineTuner, Promptable, Published
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze
from cfrbench.prompting import PromptedTuner
from cfrbench.tuners import CONSTANT, UNAUGMENTED, trainable


class DecoderOnly(PromptedTuner):
    """Image encoder and prompt encoder frozen, so no gradient is computed in them (bowang-lab/MedSAM, ``train.py``).

    The original is prompted with one box and answers with one mask; here, as in the comparisons of CFR, there is no
    prompt and one mask a class. ``prompt=box`` gives the original's form.
    """

    name = "decoder-only"
    published = (
        Published("MedSAM v1, as SAM", num_classes=4),
        Published("MedSAM v1, no prompt, 1 class"),
    )
    #: the first trainer reads embeddings that were stored once, so it augments nothing
    original: ClassVar[Mapping[str, Any]] = {
        **CONSTANT,
        **UNAUGMENTED,
        "tuning.lr": 1e-5,
        "tuning.loss_at": "logits",
        "tuning.batch_size": 8,
    }

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze all but the decoder."""
        freeze(model)
        model.mask_decoder.requires_grad_(True)
        self.prompt(model)
        return trainable(model)


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """MedSAM's first version."""
    return [DecoderOnly]
