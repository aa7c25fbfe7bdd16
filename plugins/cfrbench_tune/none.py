"""No fine-tuning: SAM as released, told by boxes where to look. The reference that every fine-tuner must beat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from cfrbench.config import Frozen
from cfrbench.contracts import FineTuner, Promptable
from cfrbench.hookspecs import hookimpl
from cfrbench.promptable import freeze
from cfrbench.prompting import PromptedTuner


class NoTuning(PromptedTuner):
    """Zero-shot: one box for each class and slice, answered by the released decoder's first mask.

    Boxes come from the truth of labelled cases, the only truth there is: from where the classes were in their crops
    (`cfrbench.prompting.Prior`). A person would draw better ones, so this is what SAM does without a person. On the
    labelled cases themselves, with the boxes of their own labels, the stage's summary states what the model reaches.
    """

    name = "none"
    trains = False
    jitter = 0.0

    class Config(Frozen):
        """How the model is asked."""

        prompt: Literal["box", "click"] = Field("box", description="one box, or one click, for each class and slice")

    config: Config

    def adapt(self, model: Promptable) -> list[nn.Parameter]:
        """Freeze everything."""
        freeze(model)
        self.prompt(model)
        return []


@hookimpl
def fine_tuners() -> list[type[FineTuner]]:
    """No fine-tuning."""
    return [NoTuning]
