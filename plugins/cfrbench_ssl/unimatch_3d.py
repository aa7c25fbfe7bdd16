"""UniMatch in 3D: what the network is sure of it must say of two strong views, and behind dropped features too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.backbone import Backbone, make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, confident_class_map, cross_entropy
from cfrbench.volume import IGNORE
from cfrbench_ssl.fixmatch import FixMatch


class UniMatch3D(FixMatch):
    """FixMatch with two strong views instead of one, and a third stream: the weak view behind dropped features."""

    name = "unimatch-3d"
    title = "UniMatch"
    reference = (
        "Yang et al., Revisiting weak-to-strong consistency in semi-supervised semantic segmentation, CVPR 2023; "
        "LiheYoung/UniMatch more-scenarios/medical/unimatch.py (2D)"
    )
    formulas: ClassVar = {
        "supervised": "0.5 * 0.5 (CE(z_l, y) + Dice(p_l, y))",
        "strong-views": "0.5 weight strong_weight mean over two views s of mean([max p_u >= threshold] CE(z(s(x_u)), "
        "argmax p_u))",
        "feature-dropout": "0.5 weight feature_weight mean([max p_u >= threshold] CE(z of dropped F_u, argmax p_u)); "
        "with loss=ce_dice, both are (1 - dice_weight) CE + dice_weight Dice over the confident voxels",
    }
    differences = (
        "Paper and official code are 2D. Threshold 0.95, both weights 0.5, the half of the sum of supervised and "
        "unsupervised losses, and dropping half the channels of the encoder's features at every level are kept.",
        "The official medical (ACDC) script takes Dice alone over the confident voxels (config=medical).",
        "Strong views are those of FixMatch here: gamma, contrast, brightness, noise and emptied boxes, drawn twice, "
        "in one pass with the other crops. The original also pastes boxes of other crops into them (CutMix) with their "
        "labels, and gives them a pass of their own, which tells in the statistics of batch norm.",
        "Guidance is given on the weak view.",
    )
    configs: ClassVar = {"medical": {"loss": "ce_dice", "dice_weight": 1.0}}

    class Config(FixMatch.Config):
        """The paper's values; strengths are those of FixMatch."""

        dice_weight: float = Field(0.5, ge=0, le=1, description="loss=ce_dice: share of Dice, cross-entropy the rest")
        strong_weight: float = Field(0.5, ge=0, description="of the two strong views together")
        feature_weight: float = Field(0.5, ge=0, description="of the view behind dropped features")
        feature_dropout: float = Field(0.5, ge=0, lt=1, description="share of the features' channels that is dropped")

    config: Config
    net: Backbone

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(lambda: make_backbone(make_net, self.name), num_classes, config)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass through the encoder over all views, and one through the decoder, with the dropped features too."""
        first, options, image = batch.labelled, self.config, batch.image
        hidden = image[first:]
        levels = self.net.encode(torch.cat([image, self._strong(hidden), self._strong(hidden)]))
        dropped = [F.dropout3d(level[first : len(image)], options.feature_dropout) for level in levels]
        logits = self.net.segment([torch.cat(both) for both in zip(levels, dropped, strict=True)])
        cuts = [first + crops * len(hidden) for crops in range(4)]
        known, weak, one, two, bare = logits.tensor_split(cuts)
        target = confident_class_map(weak.detach().float().softmax(dim=1), options.threshold)
        confident = (target != IGNORE).unsqueeze(1)
        strong = 0.5 * (self._pseudo(one, target) + self._pseudo(two, target))
        losses = {
            "supervised": 0.5 * ce_dice(known, batch.label),
            "strong-views": 0.5 * options.weight * options.strong_weight * strong,
            "feature-dropout": 0.5 * options.weight * options.feature_weight * self._pseudo(bare, target),
        }
        masks = dict.fromkeys(("strong-views", "feature-dropout"), confident)
        return StepOutput(losses, guided=(weak,), masks=masks)

    def _pseudo(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of one stream against the confident labels; 255 marks the other voxels."""
        if self.config.loss == "ce_dice":
            return ce_dice(logits, target, only_labelled=True, dice_weight=self.config.dice_weight)
        return cross_entropy(logits, target) * (target != IGNORE).float().mean()  # of all voxels, as in the paper


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """UniMatch."""
    return [UniMatch3D]
