"""Entropy minimisation: be right on labelled crops, be sure on unlabelled ones (Grandvalet & Bengio, NeurIPS 2004)."""

from __future__ import annotations

from torch import nn

from cfrbench.config import Frozen
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice


class Toy(SSLMethod):
    name = "toy"
    title = "toy"
    reference = "Grandvalet & Bengio, Semi-supervised learning by entropy minimization, NeurIPS 2004"

    class Config(Frozen):
        weight: float = 0.1  # --set ssl.toy.weight=0.2

    def __init__(self, make_net, num_classes, config=None):
        super().__init__(make_net, num_classes, config)
        self.net = make_net()

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        logits = self.net(batch.image)
        labelled, unlabelled = logits[: batch.labelled], logits[batch.labelled :]
        entropy = -(unlabelled.softmax(1) * unlabelled.log_softmax(1)).sum(1).mean()
        losses = {"supervised": ce_dice(labelled, batch.label), "entropy": self.config.weight * entropy}
        return StepOutput(losses, guided=(unlabelled,))  # what guidance may teach: this gives "toy + CFR"

    def predictor(self) -> nn.Module:
        return self.net


@hookimpl
def ssl_methods():
    return [Toy]
