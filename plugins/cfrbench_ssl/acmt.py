"""ACMT, the ambiguity-consensus mean teacher: agreement matters where the student is unsure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, entropy_map, softmax_mse
from cfrbench.schedules import threshold_rampup
from cfrbench.teachers import MeanTeacher, TeacherOptions


class ACMT(SSLMethod):
    """Mean Teacher whose consistency counts the ambiguous voxels of the unlabelled crops only."""

    name = "acmt"
    title = "ACMT"
    reference = (
        "Xu et al., Ambiguity-selective consistency regularization for mean-teacher semi-supervised medical image "
        "segmentation, Medical Image Analysis 2023; lemoshu/AC-MT code/train_ACMT_Ent_3D.py"
    )

    class Config(TeacherOptions):
        """CFR does not say which of the four official criteria its rows use; entropy needs no extra passes."""

        criterion: Literal["entropy"] = "entropy"
        # Rising over the run; the code names a fall from 0.75 by 0.15 as an alternative that it did not keep.
        threshold_start: float = Field(0.75, ge=0, description="least normalised entropy of ambiguous voxels at first")
        threshold_stop: float = Field(0.95, ge=0, description="the same at the end")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.student = make_net()
        self.teacher = MeanTeacher(make_net(), self.config)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass over all crops, one teacher pass over the unlabelled ones.

        The official entropy script also shows the teacher the clean crops and reads nothing of it; that pass is left
        out, so the teacher's unused running statistics and the random stream differ.
        """
        logits = self.student(batch.image)
        unlabelled = logits[batch.labelled :]
        mask = self._ambiguous(unlabelled, progress)
        distance = softmax_mse(unlabelled, self.teacher(batch.image[batch.labelled :]))
        consistency = (mask * distance).sum() / (self.num_classes * mask.sum() + 1e-16)
        losses = {
            "supervised": ce_dice(logits[: batch.labelled], batch.label),
            "consistency": self.config.weight(progress) * consistency,
        }
        return StepOutput(losses, guided=(unlabelled,), masks={"consistency": mask})

    @torch.no_grad()
    def _ambiguous(self, logits: Tensor, progress: Progress) -> Tensor:
        """Where the student's entropy is high, ``(U, 1, H, W, D)``; divided by ln C (official: ln 2, as C is 2)."""
        # The ramp counts raw steps, not epochs: it depends on how long training is.
        options = self.config
        threshold = threshold_rampup(progress.step, progress.total, options.threshold_start, options.threshold_stop)
        return entropy_map(logits.float().softmax(dim=1)) >= threshold

    def after_update(self, progress: Progress) -> None:
        """The teacher follows."""
        self.teacher.follow(self.student, progress)

    def predictor(self) -> nn.Module:
        """The student."""
        return self.student


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """ACMT."""
    return [ACMT]
