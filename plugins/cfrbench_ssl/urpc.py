"""URPC, uncertainty-rectified pyramid consistency: the scales of one decoder agree with their mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.backbone import make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice
from cfrbench.teachers import ConsistencyOptions


def mean_and_divergences(heads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the softmaxes ``(S, B, C, ...)`` of S logit maps, their mean, and D ``(S, B, 1, ...)``.

    D_s = sum over c of pbar_c (log pbar_c - log p_s,c). The official code takes the logarithm of probabilities, which
    fails where one underflows; from log-softmaxes the value is the same and finite.
    """
    logarithms = torch.stack([head.float().log_softmax(dim=1) for head in heads])
    log_mean = logarithms.logsumexp(dim=0) - math.log(len(heads))
    mean = log_mean.exp()
    divergences = (mean * (log_mean - logarithms)).sum(dim=2, keepdim=True)
    return logarithms.exp(), mean, divergences


def rectified_distances(heads: Sequence[Tensor]) -> Tensor:
    """Return the loss ``(S,)`` of each head: squared distance from the mean where D is low, plus the mean of D.

    Neither the mean nor the weights exp(-D) are detached.
    """
    softmaxes, mean, divergences = mean_and_divergences(heads)
    weights = (-divergences).exp()
    everything = tuple(range(1, softmaxes.ndim))
    distances = ((mean - softmaxes).square() * weights).mean(everything)
    return distances / (weights.mean(everything) + 1e-8) + divergences.mean(everything)


class URPC(SSLMethod):
    """One network whose decoder is read at several scales, each raised to full resolution."""

    name = "urpc"
    title = "URPC"
    reference = (
        "Luo et al., Semi-supervised medical image segmentation via uncertainty rectified pyramid consistency, Medical "
        "Image Analysis 2022; HiLab-git/SSL4MIS code/train_uncertainty_rectified_pyramid_consistency_3D.py"
    )
    formulas: ClassVar = {
        "supervised": "mean over the S scales s of 0.5 (CE(z_s,l, y) + Dice(p_s,l, y))",
        "consistency": "w(t) mean over s of (mean((pbar - p_s)^2 exp(-D_s)) / mean(exp(-D_s)) + mean(D_s)), "
        "D_s = sum_c pbar_c log(pbar_c / p_s,c), pbar = mean over s of p_s, on unlabelled crops",
    }
    differences = (
        "The official 3D network is net.unet3d with form=deep-supervision, whose scales are raised trilinearly "
        "(upsample 'trilinear'); on the V-Net voxels are repeated, as ShumengLI/CFR hierarchical_vnet.py does.",
        "The official 3D script ramps over 400 epochs of 150 steps (N = 60000, poly-a, lr 0.1) on another data set.",
        "The 2D network also disturbs the features before each head; the 3D one only drops channels.",
    )
    configs: ClassVar = {"original": {"ramp_length": 400, "epoch_steps": 150, "upsample": "trilinear"}}

    class Config(ConsistencyOptions):
        """Without a teacher, without noise."""

        scales: int = Field(4, ge=2, description="S, fewer if the network has fewer levels")
        upsample: Literal["nearest", "trilinear"] = Field(
            "nearest", description="how coarse heads are raised to full size"
        )

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_backbone(make_net, self.name, levels=2)
        scales = min(self.config.scales, len(self.net.widths) - 1)
        deepest_first = reversed(self.net.widths[1:scales])  # the official order of creation
        self.heads = nn.ModuleList(nn.Conv3d(width, num_classes, kernel_size=1) for width in deepest_first)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass."""
        outputs = self.outputs(batch.image)
        known = batch.labelled
        rectified = rectified_distances([logits[known:] for logits in outputs])
        losses = {
            "supervised": torch.stack([ce_dice(logits[:known], batch.label) for logits in outputs]).mean(),
            "consistency": self.config.weight(progress) * rectified.mean(),
        }
        return StepOutput(losses, guided=(outputs[0][known:],))

    def outputs(self, image: Tensor) -> list[Tensor]:
        """Logits of every scale at full resolution, the main head first, then 1/2, 1/4, 1/8."""
        maps = self.net.decode(self.net.encode(image))
        outputs = [self.net.out_conv(self.net.drop(maps[0]))]
        for level, head in enumerate(reversed(self.heads), start=1):
            # Each head drops channels of its own; the way up is not touched.
            logits = head(self.net.drop(maps[level]))
            outputs.append(F.interpolate(logits, size=image.shape[2:], mode=self.config.upsample))
        return outputs

    def predictor(self) -> nn.Module:
        """The network with its main head."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """URPC."""
    return [URPC]
