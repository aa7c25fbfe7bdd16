"""DTC, dual-task consistency: a segmentation and the distance to its surface, predicted side by side, must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.backbone import make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.distance_maps import signed_distance_maps
from cfrbench.errors import ConfigError
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import cross_entropy, dice_loss
from cfrbench.teachers import ConsistencyOptions


class AgainstZero(nn.Module):
    """One logit ``(B, 1, ...)`` becomes those of two classes, whose softmax is its sigmoid."""

    def forward(self, logit: Tensor) -> Tensor:
        """``(B, 2, ...)``: 0 for the background."""
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


class DTC(SSLMethod):
    """One network with a second head: the signed distance map of every foreground class."""

    name = "dtc"
    title = "DTC"
    reference = (
        "Luo et al., Semi-supervised medical image segmentation through dual-task consistency, AAAI 2021; "
        "HiLab-git/DTC code/train_la_dtc.py"
    )
    formulas: ClassVar = {
        "dice": "mean over foreground classes c of 1 - 2 sum(p_c [y = c]) / (sum(p_c^2) + sum([y = c])), on labelled "
        "crops",
        "level-set": "beta mean((h - phi)^2), phi the signed distance map of [y = c], on labelled crops",
        "consistency": "w(t) mean((sigmoid(-k h) - p)^2) over all crops and foreground classes",
        "cross-entropy": "ce_weight CE(z_l, y), if ce_weight is not 0",
    }
    differences = (
        "Official code is for one class: a head of one sigmoid. For more classes (form 'softmax') there is one map for "
        "each foreground class, and every mean runs over those; for two classes both forms give the same losses.",
        "The official code computes and logs a cross-entropy and does not add it (ce_weight 0).",
        "A class that a crop lacks gets the map 0 officially, which asks for a probability of one half there; absent "
        "'outside' gives it 1, far from any surface, and is the default of the softmax form.",
        "Official LA scores keep the largest component (scoring.postprocess); the benchmark does not.",
    )
    configs: ClassVar = {"original": {"epoch_steps": 150}}

    class Config(ConsistencyOptions):
        """The weight of the consistency is ten times that of other methods."""

        consistency: float = Field(1.0, ge=0, description="weight of the consistency loss after its ramp")
        form: Literal["auto", "sigmoid", "softmax"] = Field(
            "auto", description="of the segmentation head; auto = sigmoid, the official one, for two classes"
        )
        beta: float = Field(0.3, ge=0, description="weight of the level-set loss")
        steepness: float = Field(1500.0, gt=0, description="k that turns a level set into a mask")
        absent: Literal["auto", "zero", "outside"] = Field(
            "auto", description="map of a class that a crop lacks: 0 (official), or 1; auto = 0 for the sigmoid form"
        )
        ce_weight: float = Field(0.0, ge=0, description="weight of the cross-entropy of the segmentation head")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        single = self.config.form == "sigmoid" or (self.config.form == "auto" and num_classes == 2)
        if single and num_classes != 2:
            raise ConfigError(f"ssl.dtc.form=sigmoid is for two classes, here are {num_classes}. Use softmax or auto.")
        self.net = make_backbone(make_net, self.name)
        width = self.net.widths[0]
        if single:
            self.net.out_conv = nn.Sequential(nn.Conv3d(width, 1, kernel_size=1), AgainstZero())
        self.level_set = nn.Sequential(nn.Conv3d(width, num_classes - 1, kernel_size=1), nn.Tanh())
        outside = self.config.absent == "outside" or (self.config.absent == "auto" and not single)
        self._absent = 1.0 if outside else 0.0

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass; both heads read the same features after the same dropout."""
        known, classes = batch.labelled, self.num_classes
        features = self.net.drop(self.net.decode(self.net.encode(batch.image))[0])
        logits, level_set = self.net.out_conv(features).float(), self.level_set(features).float()
        probabilities = logits.softmax(dim=1)
        agreement = (self._masks(level_set) - probabilities[:, 1:]).square().mean()
        foreground = [0.0] + [classes / (classes - 1)] * (classes - 1)
        losses = {
            "dice": dice_loss(probabilities[:known], batch.label, weights=foreground),
            "level-set": self.config.beta * (level_set[:known] - self._distances(batch.label)).square().mean(),
            "consistency": self.config.weight(progress) * agreement,
        }
        if self.config.ce_weight:
            losses["cross-entropy"] = self.config.ce_weight * cross_entropy(logits[:known], batch.label)
        return StepOutput(losses, guided=(logits[known:],))

    def _masks(self, level_set: Tensor) -> Tensor:
        """Level sets as soft masks; the slope is such that only voxels next to the surface have a gradient."""
        return torch.sigmoid(-self.config.steepness * level_set)

    def _distances(self, label: Tensor) -> Tensor:
        """Signed distance maps ``(L, C - 1, H, W, D)`` of the foreground classes."""
        masks = torch.stack([label == index for index in range(1, self.num_classes)], dim=1)
        return signed_distance_maps(masks, self._absent)

    def predictor(self) -> nn.Module:
        """The network with its segmentation head."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """DTC."""
    return [DTC]
