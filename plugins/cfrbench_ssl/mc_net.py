"""MC-Net, mutual consistency: decoders that step up in different ways learn each other's sharpened predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.decoders import SharedEncoder, raised_then_convolved
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import linear_dice_loss, mutual_distances, sharpened
from cfrbench.teachers import ConsistencyOptions


class MCNet(SSLMethod):
    """One encoder with two decoders, or the three of MC-Net+; the first decoder is tested."""

    name = "mc-net"
    title = "MC-Net"
    reference = (
        "Wu et al., Semi-supervised left atrium segmentation with mutual consistency training, MICCAI 2021, and Mutual "
        "consistency learning for semi-supervised medical image segmentation, Medical Image Analysis 2022 (MC-Net+); "
        "ycwu1997/MC-Net mcnet/train_mcnet_3d.py"
    )
    formulas: ClassVar = {
        "dice": "beta sum over the decoders k and mean over foreground classes c of "
        "1 - 2 sum(p_k,c [y = c]) / (sum(p_k,c) + sum([y = c])), on labelled crops",
        "consistency": "w(t) sum over pairs j != k of mean((p_k - sharp(p_j))^2) on all crops, "
        "sharp(p) = p^(1/T) / sum_c p^(1/T)",
    }
    differences = (
        "The official script trains two decoders unless told otherwise; config=plus has the three of MC-Net+: steps up "
        "by transposed convolution, trilinear, nearest, the last two followed by a convolution of 3x3x3.",
        "Officially gradients flow into the sharpened predictions as well (detach_target false).",
        "Official code is for two classes: a Dice term of class 1, sharpened against the other. For more, the mean "
        "over foreground classes, and sharpening over all classes; for two these are its terms.",
        "It computes and logs a cross-entropy, of probabilities taken for logits, and does not add it.",
        "The ramp counts steps from 1, as officially, and takes the first 40 % of the run: 6000 of its 15000 "
        "iterations. Its learning rate is constant, and its checkpoint the best on the test list.",
        "On the 3D U-Net, which has no transposed convolutions, the decoders differ in their weights alone.",
    )
    configs: ClassVar = {"original": {"epoch_steps": 150, "ramp_length": 40}, "plus": {"decoders": 3}}

    class Config(ConsistencyOptions):
        """The weight of the consistency is ten times that of other methods."""

        consistency: float = Field(1.0, ge=0, description="weight of the consistency loss after its ramp")
        ramp_length: float = Field(16, ge=0, description="ramp epochs until the full weight")
        decoders: Literal[2, 3] = Field(2, description="of MC-Net, or of MC-Net+")
        temperature: float = Field(0.1, gt=0, description="T that sharpens the other decoders' softmax")
        beta: float = Field(0.5, ge=0, description="weight of the Dice loss")
        detach_target: bool = Field(False, description="give the decoder that is learnt from no gradient")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        steps_up = (raised_then_convolved("trilinear"), raised_then_convolved("nearest"))
        self.shared = SharedEncoder(make_net, self.name, steps_up[: self.config.decoders - 1])

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass through the encoder, one through each decoder."""
        known = batch.labelled
        logits = [values.float() for values in self.shared(batch.image)]
        softmaxes = [values.softmax(dim=1) for values in logits]
        sources = [values.detach() for values in logits] if self.config.detach_target else logits
        targets = [sharpened(values, self.config.temperature) for values in sources]
        weight = self.config.weight(replace(progress, step=progress.step + 1))
        dices = torch.stack([self._dice(values[:known], batch.label) for values in softmaxes])
        losses = {
            "dice": self.config.beta * dices.sum(),
            "consistency": weight * mutual_distances(softmaxes, targets).sum(),
        }
        return StepOutput(losses, guided=tuple(values[known:] for values in logits))

    def _dice(self, probabilities: Tensor, label: Tensor) -> Tensor:
        foreground = enumerate(probabilities.unbind(1)[1:], start=1)
        return torch.stack([linear_dice_loss(score, label == name, smooth=1e-10) for name, score in foreground]).mean()

    def predictor(self) -> nn.Module:
        """The encoder with its first decoder."""
        return self.shared.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """MC-Net."""
    return [MCNet]
