"""The lower and the upper bound of every table: the segmenter alone, trained on labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from cfrbench.config import Frozen
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import SUPERVISED_LOSSES


class Supervised(SSLMethod):
    """One network and the labelled crops; unlabelled ones are never shown to it."""

    name = "supervised"
    title = "V-Net"
    reference = (
        "Milletari et al., V-Net, 3DV 2016; "
        "yulequan/UA-MT code/train_LA.py, HiLab-git/SSL4MIS code/train_fully_supervised_3D.py"
    )
    uses_unlabelled = False
    formulas: ClassVar = {"supervised": "0.5 (CE(z, y) + Dice(p, y))"}
    differences = (
        "Officially the batch is all labelled; here its size is the number of crops, labelled or not, of the protocol.",
        "UA-MT counts Dice of class 1 alone (loss=ce_foreground_dice), which is fit for LA only.",
    )

    class Config(Frozen):
        """One choice."""

        loss: Literal["ce_dice", "ce_foreground_dice"] = Field(
            "ce_dice", description="Dice over all classes (SSL4MIS, CFR), or of class 1 alone (UA-MT)"
        )

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_net()
        self._loss = SUPERVISED_LOSSES[self.config.loss]

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """0.5 (CE + Dice) on the labelled crops."""
        logits = self.net(batch.image[: batch.labelled])
        return StepOutput({"supervised": self._loss(logits, batch.label)})

    def predictor(self) -> nn.Module:
        """The network."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """The supervised bounds."""
    return [Supervised]
