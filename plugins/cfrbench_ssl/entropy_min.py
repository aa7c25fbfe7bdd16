"""Entropy minimisation: be right on labelled crops, be sure on unlabelled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, entropy_map
from cfrbench.teachers import ConsistencyOptions


class EntropyMinimisation(SSLMethod):
    """One network; the mean entropy of its softmax is a loss."""

    name = "entropy-min"
    title = "EntMin"
    reference = (
        "Grandvalet & Bengio, Semi-supervised learning by entropy minimization, NeurIPS 2004; "
        "HiLab-git/SSL4MIS code/train_entropy_minimization_3D.py"
    )
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "entropy": "w(t) mean(e(p_u)), e(p) = -sum_c p_c log p_c / ln C",
    }
    differences = (
        "The paper minimises the entropy of unlabelled data; the SSL4MIS script that of the whole batch (crops=all).",
        "The script ramps over 200 epochs of 150 steps (N = 30000, poly-a) on BraTS.",
    )
    configs: ClassVar = {"original": {"crops": "all", "ramp_length": 200, "epoch_steps": 150}}

    class Config(ConsistencyOptions):
        """The weight of SSL4MIS."""

        crops: Literal["unlabelled", "all"] = Field("unlabelled", description="crops whose entropy falls")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_net()

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass over all crops."""
        logits = self.net(batch.image)
        first = 0 if self.config.crops == "all" else batch.labelled
        entropy = entropy_map(logits[first:].float().softmax(dim=1)).mean()
        losses = {
            "supervised": ce_dice(logits[: batch.labelled], batch.label),
            "entropy": self.config.weight(progress) * entropy,
        }
        return StepOutput(losses, guided=(logits[batch.labelled :],))

    def predictor(self) -> nn.Module:
        """The network."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """Entropy minimisation."""
    return [EntropyMinimisation]
