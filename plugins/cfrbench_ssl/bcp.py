"""BCP, bidirectional copy-paste: a box of an unlabelled crop in a labelled one, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.averaging import update_ema
from cfrbench.config import Frozen
from cfrbench.contracts import Batch, Phase, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import class_map
from cfrbench.pasting import (
    box_sides,
    copy_paste_loss,
    draw_corner,
    labelled_ce_dice,
    largest_components,
    only,
    outside_box,
    paste,
)

SELF_TRAINING = 15.0  # against which the share of pre-training counts


class BCP(SSLMethod):
    """Pre-training on pasted labelled crops, then a mean teacher labels what is pasted of unlabelled ones."""

    name = "bcp"
    title = "BCP"
    reference = (
        "Bai et al., Bidirectional copy-paste for semi-supervised medical image segmentation, CVPR 2023; "
        "DeepMed-Lab-ECNU/BCP code/LA_BCP_train.py"
    )
    formulas: ClassVar = {
        "pre-training": "phase 1 only: 0.5 (CE(z, y) + Dice1(p, y)) of x = M x_1 + (1 - M) x_2, both labelled, y "
        "likewise; M is 0 in a box and 1 around it, Dice1 the Dice of sums, not squares, crop by crop",
        "inward": "0.5 (CE(z, y_1) + Dice1(p, y_1)) where M = 1, plus unlabelled_weight times the same with yhat_1 "
        "where M = 0, of x = M x_1 + (1 - M) u_1; yhat = largest component of each class of argmax z'",
        "outward": "0.5 (CE(z, y_2) + Dice1(p, y_2)) where M = 0, plus unlabelled_weight times the same with yhat_2 "
        "where M = 1, of x = M u_2 + (1 - M) x_2",
    }
    differences = (
        "The code trains 2000 + 15000 steps; here the run is shared out as 2 to 15 (pretraining; 5 in the ACDC "
        "script).",
        "The code keeps the checkpoint of either stage that is best on the test list, and student and teacher start "
        "from that of the first; here they start from its last weights, and momentum goes on.",
        "The rate stays 0.01 in the code's first stage and falls six times in its second; here each stage has the "
        "protocol's schedule.",
        "The LA script takes what has a probability of 0.5 or more, for two classes the argmax but for ties. For more "
        "classes, as in the ACDC script, each class keeps its largest component, here in three dimensions.",
        "The pancreas script joins components by edges (neighbours=18), and trains an instance-norm V-Net by Adam. It "
        "states an unlabelled weight of 1.5 and computes with 0.5.",
        "Half of the labelled and of the unlabelled crops (x_1, u_1) go one way, the others (x_2, u_2) the other. Of "
        "an odd number the middle crop goes both ways; the shorter half is gone through again.",
        "Guidance is added on the mixed crops, where they are unlabelled, beside the teacher's labels; "
        "guidance=replaces leaves those out, so that a baseline learns nothing from unlabelled voxels. In "
        "pre-training no unlabelled crop is mixed, so guidance gets a student pass of its own after the loss.",
    )
    configs: ClassVar = {"pancreas": {"neighbours": 18}}

    class Config(Frozen):
        """The LA script's values."""

        pretraining: float = Field(2.0, gt=0, description="share of the run for pre-training, against 15 afterwards")
        box: float = Field(2 / 3, gt=0, lt=1, description="sides of the box, as a share of the crop's")
        unlabelled_weight: float = Field(0.5, ge=0, description="of unlabelled voxels, against 1 of labelled ones")
        decay: float = Field(0.99, ge=0, lt=1, description="of the teacher's moving average, from the first step")
        neighbours: Literal[6, 18, 26] = Field(26, description="voxels that are connected to one in a component")
        guidance: Literal["joins", "replaces"] = Field(
            "joins", description="whether guidance joins the teacher's labels or stands in their place"
        )

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.student = make_net()
        self.teacher = make_net().requires_grad_(False)

    def phases(self) -> tuple[Phase, ...]:
        """Labelled crops alone, then all."""
        return Phase("pre-training", self.config.pretraining), Phase("self-training", SELF_TRAINING)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass over pasted labelled crops; later one each over the crops that are pasted either way."""
        crop = batch.image.shape[2:]
        box = box_sides(crop, self.config.box)
        outside = outside_box(crop, draw_corner(crop, box), box, batch.image.device)
        if progress.phase == 0:
            return self._pretrain(batch, outside)
        if progress.phase_step == 0 and progress.part == 0:
            self.teacher.load_state_dict(self.student.state_dict())
        return self._self_train(batch, outside)

    def _pretrain(self, batch: Batch, outside: Tensor) -> StepOutput:
        """Labelled crops in labelled crops."""
        half, image = -(-batch.labelled // 2), batch.image[: batch.labelled]
        logits = self.student(paste(image[:half], image[-half:], outside))
        loss = labelled_ce_dice(logits, paste(batch.label[:half], batch.label[-half:], outside))
        unlabelled = batch.image[batch.labelled :]
        return StepOutput({"pre-training": loss}, guided=() if batch.pseudo is None else (self.student(unlabelled),))

    def _self_train(self, batch: Batch, outside: Tensor) -> StepOutput:
        """Boxes of unlabelled crops in labelled ones, and of labelled in unlabelled ones, in passes of their own."""
        known, unlabelled = batch.image[: batch.labelled], batch.image[batch.labelled :]
        losses: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        guided, moved = [], []
        ways = zip(("inward", "outward"), (outside, ~outside), _ways(len(known), len(unlabelled)), strict=True)
        for name, region, (ours, others) in ways:  # the region is that of the labelled crop
            logits = self.student(paste(known[ours], unlabelled[others], region))
            if self.config.guidance == "joins":
                own = self._teacher_labels(unlabelled[others])
                weight = self.config.unlabelled_weight
                losses[name] = copy_paste_loss(logits, batch.label[ours], own, region, weight)
            else:
                losses[name] = labelled_ce_dice(logits, only(batch.label[ours], region))
                masks[name] = region.expand(len(logits), 1, *region.shape)
            if batch.pseudo is not None:
                guided.append(logits)
                moved.append(only(batch.pseudo[others], ~region))
        if not guided:
            return StepOutput(losses, masks=masks)
        return StepOutput(losses, (torch.cat(guided),), masks, torch.cat(moved))

    @torch.no_grad()
    def _teacher_labels(self, image: Tensor) -> Tensor:
        """The largest component of each class, ``(n, H, W, D)`` uint8; the teacher stays in train mode."""
        return largest_components(class_map(self.teacher(image)), self.config.neighbours)

    def after_update(self, progress: Progress) -> None:
        """The teacher follows, once there is one."""
        if progress.phase > 0:
            update_ema(self.teacher, self.student, self.config.decay)

    def predictor(self) -> nn.Module:
        """The student; the code tests no teacher."""
        return self.student


def _ways(labelled: int, unlabelled: int) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Which labelled crops meet which unlabelled ones: the first half of either, and the second half of either."""
    ours, others = -(-labelled // 2), -(-unlabelled // 2)
    pairs = range(max(ours, others))
    first = [pair % ours for pair in pairs], [pair % others for pair in pairs]
    second = [labelled - ours + index for index in first[0]], [unlabelled - others + index for index in first[1]]
    return first, second


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """BCP."""
    return [BCP]
