"""UA-MT, the uncertainty-aware mean teacher: agreement matters where the teacher is sure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import SUPERVISED_LOSSES, entropy_map, masked_mean, softmax_mse
from cfrbench.schedules import threshold_rampup
from cfrbench.teachers import StudentAndTeacher, TeacherOptions
from cfrbench.uncertainty import mean_probability


class UAMT(StudentAndTeacher):
    """Mean Teacher whose consistency counts the voxels that the teacher names alike under noise and dropout."""

    name = "ua-mt"
    title = "UA-MT"
    reference = (
        "Yu et al., Uncertainty-aware self-ensembling model for semi-supervised 3D left atrium segmentation, "
        "MICCAI 2019; yulequan/UA-MT code/train_LA_meanteacher_certainty_unlabel.py"
    )
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "consistency": "w(t) sum(m (p_u - p'_u)^2) / (C sum(m)), m = [entropy(mean of T teacher passes) < H(t) ln C], "
        "H(t) = 0.75 + 0.25 R(t, N)",
    }
    differences = (
        "The official loss on LA counts Dice of class 1 only ('ce_foreground_dice'); all other methods average it over "
        "the classes, so that is the default.",
        "The official file writes the 2 of two classes down in three places; here it is C, and ln 2 is ln C.",
        "The repository has a second script in which labelled crops must agree too (crops 'all').",
    )
    configs: ClassVar = {"original": {"loss": "ce_foreground_dice", "epoch_steps": 150}}

    class Config(TeacherOptions):
        """The target is one noisy pass; the mean of the passes says only where to look."""

        crops: Literal["unlabelled", "all"] = Field(
            "unlabelled", description="crops on which student and teacher must agree"
        )
        loss: Literal["ce_dice", "ce_foreground_dice"] = Field(
            "ce_dice", description="supervised loss: Dice over all classes, or of class 1 alone"
        )
        passes: int = Field(8, ge=2, multiple_of=2, description="T, teacher passes behind the uncertainty")
        threshold_start: float = Field(
            0.75, ge=0, description="normalised entropy below which a voxel counts, at first"
        )
        threshold_stop: float = Field(1.0, ge=0, description="the same at the end")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self._supervised = SUPERVISED_LOSSES[self.config.loss]

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass; one teacher pass for the target, and T / 2 over twice the crops for the mask."""
        logits = self.student(batch.image)
        first = 0 if self.config.crops == "all" else batch.labelled
        image = batch.image[first:]
        distance = softmax_mse(logits[first:], self.teacher(image))
        mask = self._certain(image, progress)
        losses = {
            "supervised": self._supervised(logits[: batch.labelled], batch.label),
            "consistency": self.config.weight(progress) * masked_mean(distance, mask),
        }
        return StepOutput(losses, guided=(logits[batch.labelled :],), masks={"consistency": mask})

    @torch.no_grad()
    def _certain(self, image: Tensor, progress: Progress) -> Tensor:
        """Where the entropy of the teacher's mean softmax is low, ``(B, 1, H, W, D)``."""
        # The ramp counts raw steps, not epochs: it depends on how long training is.
        options = self.config
        threshold = threshold_rampup(progress.step, progress.total, options.threshold_start, options.threshold_stop)
        uncertainty = entropy_map(mean_probability(self.teacher, image, options.passes), normalised=False)
        return uncertainty < threshold * math.log(self.num_classes)


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """UA-MT."""
    return [UAMT]
