"""FixMatch: what the network is sure of in a crop, it must say of the crop with other intensities too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, confident_class_map, cross_entropy
from cfrbench.perturbations import bend_intensity, empty_boxes
from cfrbench.teachers import noisy
from cfrbench.volume import IGNORE


class FixMatch(SSLMethod):
    """One network; its confident labels of the weak view are the truth of the strong view."""

    name = "fixmatch"
    title = "FixMatch"
    reference = (
        "Sohn et al., FixMatch: simplifying semi-supervised learning with consistency and confidence, NeurIPS 2020; "
        "HiLab-git/SSL4MIS code/train_fixmatch_standard_augs.py (2D)"
    )
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "pseudo-label": "weight mean([max p_u >= threshold] CE(z(strong(x_u)), argmax p_u)), argmax p_u fixed; with "
        "loss=ce_dice, 0.5 (CE + Dice) over the confident voxels",
    }
    differences = (
        "The paper classifies images; here each voxel is one. Threshold 0.95, weight 1 and no ramp are kept.",
        "The weak view is the crop as all methods see it (quarter turns and flips); the strong view adds gamma, "
        "contrast, brightness and noise, and empties boxes. Nothing moves a voxel, so labels stay in place.",
        "SSL4MIS has 2D scripts only, with other losses: threshold 0.8 of a rescaled softmax, voxels below it taken "
        "for background, complementary labels, and a ramp to 0.1. That form is not offered.",
        "Guidance is given on the weak view.",
    )

    class Config(Frozen):
        """The paper's values; strengths are ours, for standardised intensities."""

        threshold: float = Field(0.95, ge=0, le=1, description="least probability of a voxel that teaches")
        weight: float = Field(1.0, ge=0, description="of the pseudo-label loss")
        loss: Literal["ce", "ce_dice"] = Field(
            "ce", description="cross-entropy over all voxels, or 0.5 (CE + Dice) over the confident ones")  # fmt: skip
        strength: float = Field(1.0, ge=0, description="of the intensity change; 0 = none")
        boxes: int = Field(2, ge=0, description="emptied boxes in each strong view")
        box_side: float = Field(0.25, ge=0, le=1, description="side of a box, as a share of the crop's")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_net()

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass over labelled crops, weak and strong views, which share the statistics of batch norm."""
        first, options = batch.labelled, self.config
        views = torch.cat([batch.image, self._strong(batch.image[first:])])
        known, weak, other = self.net(views).tensor_split([first, len(batch.image)])
        target = confident_class_map(weak.detach().float().softmax(dim=1), options.threshold)
        confident = (target != IGNORE).unsqueeze(1)
        if options.loss == "ce_dice":
            pseudo = ce_dice(other, target, only_labelled=True)
        else:
            pseudo = cross_entropy(other, target) * confident.float().mean()  # of all voxels, as in the paper
        losses = {"supervised": ce_dice(known, batch.label), "pseudo-label": options.weight * pseudo}
        return StepOutput(losses, guided=(weak,), masks={"pseudo-label": confident})

    def _strong(self, image: Tensor) -> Tensor:
        """The strong view: other intensities, noise, and boxes filled with the mean of the volume, which is 0."""
        options, crops = self.config, len(image)
        gamma, contrast, brightness = options.strength * (2.0 * torch.rand(3, crops, device=image.device) - 1.0)
        bent = bend_intensity(image, 2.0**gamma, 1.0 + 0.3 * contrast, 0.3 * brightness)
        corners = torch.rand(crops, options.boxes, 3, device=image.device)
        return empty_boxes(noisy(bent, 0.1 * options.strength, 0.2 * options.strength), corners, options.box_side)

    def predictor(self) -> nn.Module:
        """The network."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """FixMatch."""
    return [FixMatch]
