"""Mean Teacher: the student agrees with a slowly moving average of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, softmax_mse
from cfrbench.teachers import MeanTeacher, TeacherOptions


class MeanTeacherMethod(SSLMethod):
    """Supervised loss plus the mean squared difference of the two softmaxes; the student sees clean crops."""

    name = "mt"
    title = "MT"
    reference = (
        "Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017; "
        "ShumengLI/CFR code/train_retraining.py, HiLab-git/SSL4MIS code/train_mean_teacher_3D.py"
    )

    class Config(TeacherOptions):
        """The two official forms differ in the crops on which student and teacher must agree."""

        # 'cfr': all crops, as the CFR code does; 'ssl4mis': the unlabelled ones only (its BraTS ramp_length is 200).
        form: Literal["cfr", "ssl4mis"] = "cfr"

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.student = make_net()
        self.teacher = MeanTeacher(make_net(), self.config)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass over all crops, one teacher pass over those that must agree."""
        logits = self.student(batch.image)
        first = 0 if self.config.form == "cfr" else batch.labelled
        distance = softmax_mse(logits[first:], self.teacher(batch.image[first:])).mean()
        losses = {
            "supervised": ce_dice(logits[: batch.labelled], batch.label),
            "consistency": self.config.weight(progress) * distance,
        }
        return StepOutput(losses, guided=(logits[batch.labelled :],))

    def after_update(self, progress: Progress) -> None:
        """The teacher follows."""
        self.teacher.follow(self.student, progress)

    def predictor(self) -> nn.Module:
        """The student; no official script tests the teacher."""
        return self.student


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """Mean Teacher."""
    return [MeanTeacherMethod]
