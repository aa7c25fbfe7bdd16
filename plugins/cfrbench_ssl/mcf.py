"""MCF, mutual correction: two unlike networks attend to where they differ, and the better one teaches the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.backbone import make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import (
    cross_entropy,
    disagreement,
    masked_mean,
    mean_foreground_dice_loss,
    one_hot,
    sharpened,
)
from cfrbench.teachers import ConsistencyOptions
from cfrbench.volume import IGNORE
from cfrbench_segmenter.resvnet import ResVNet


class SoftmaxMean(nn.Module):
    """Several networks as one, whose softmax is the mean of theirs."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, channels, H, W, D) -> (B, C, H, W, D)`` logarithms of the mean probabilities."""
        logarithms = torch.stack([network(image).float().log_softmax(dim=1) for network in self.networks])
        return logarithms.logsumexp(dim=0) - math.log(len(logarithms))


class MCF(SSLMethod):
    """The chosen network and one with a ResNet-34 encoder; in each step the better one labels for the other."""

    name = "mcf"
    title = "MCF"
    reference = (
        "Wang et al., MCF: mutual correction framework for semi-supervised medical image segmentation, CVPR 2023; "
        "WYC-321/MCF code/train_MCF.py"
    )
    formulas: ClassVar = {
        "supervised": "sum over both networks k of CE(z_k,l, y) + D_k, D_k = mean over foreground classes of Dice",
        "rectification": "rectification sum over k of the mean of (p_k,l - [y = c])^2 over the voxels where "
        "argmax z_1,l differs from argmax z_2,l",
        "consistency": "w(t) mean((p_w,u - sharp(p_b,u))^2), b the network of smaller D in this step, w the other, "
        "sharp(p) = p^(1/T) / sum_c p^(1/T) fixed",
    }
    differences = (
        "Official code is for two classes. For more, both networks differ where their labels do, squares are averaged "
        "over classes, and D over foreground classes decides which network is better; for two these are its terms.",
        "The second network has the width and depth of the chosen one, the V-Net officially, and a dropout of its own.",
        "The official V-Net starts Kaiming-normal (initialisation 'original'). By default it starts as the segmenter "
        "does, so it starts like that of every method; the other network is Kaiming-normal in both.",
        "Voxels labelled 255 are not rectified.",
        "Officially crops are neither turned nor flipped, and the learning rate falls one step later than here.",
    )
    configs: ClassVar = {"original": {"epoch_steps": 150, "initialisation": "original"}}

    class Config(ConsistencyOptions):
        """The values of the official LA script."""

        rectification: float = Field(0.5, ge=0, description="weight of the squared error where the networks differ")
        temperature: float = Field(0.1, gt=0, description="T that sharpens the better network's softmax")
        dropout: float = Field(0.5, ge=0, lt=1, description="channel dropout of the network with the ResNet encoder")
        initialisation: Literal["segmenter", "original"] = Field(
            "segmenter", description="initial weights of the chosen network: the segmenter's, or Kaiming-normal"
        )

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        first = make_backbone(make_net, self.name)
        if self.config.initialisation == "original":
            for module in first.modules():
                if isinstance(module, nn.Conv3d):  # transposed ones and biases keep PyTorch's default
                    nn.init.kaiming_normal_(module.weight)
        depth = len(first.widths) - 1
        second = ResVNet(1, num_classes, first.widths[0], depth, self.config.dropout)
        self.both = SoftmaxMean([first, second])

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Both networks see the same crops."""
        known, label = batch.labelled, batch.label
        logits = [network(batch.image).float() for network in self.both.networks]
        softmaxes = [values[:known].softmax(dim=1) for values in logits]
        dices = torch.stack([mean_foreground_dice_loss(values, label) for values in softmaxes])
        entropies = torch.stack([cross_entropy(values[:known], label) for values in logits])
        differ = disagreement(logits[0][:known], logits[1][:known]) & (label != IGNORE).unsqueeze(1)
        truth = one_hot(label, self.num_classes).float()
        errors = torch.stack([masked_mean((values - truth).square(), differ) for values in softmaxes])
        better = 0 if bool(dices[0] < dices[1]) else 1
        unknown = [values[known:] for values in logits]
        target = sharpened(unknown[better].detach(), self.config.temperature)
        distance = (unknown[1 - better].softmax(dim=1) - target).square().mean()
        losses = {
            "supervised": (entropies + dices).sum(),
            "rectification": self.config.rectification * errors.sum(),
            "consistency": self.config.weight(progress) * distance,
        }
        return StepOutput(losses, guided=tuple(unknown))

    def predictor(self) -> nn.Module:
        """Both networks; their mean softmax is tested."""
        return self.both


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """MCF."""
    return [MCF]
