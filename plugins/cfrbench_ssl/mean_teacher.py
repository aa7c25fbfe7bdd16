"""Mean Teacher: the student agrees with a slowly moving average of itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, softmax_mse
from cfrbench.teachers import StudentAndTeacher, TeacherOptions


class MeanTeacherMethod(StudentAndTeacher):
    """Supervised loss plus the mean squared difference of the two softmaxes; the student sees clean crops."""

    name = "mt"
    title = "MT"
    reference = (
        "Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017; "
        "ShumengLI/CFR code/train_retraining.py, HiLab-git/SSL4MIS code/train_mean_teacher_3D.py"
    )

    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "consistency": "w(t) mean((p - p')^2), p' = softmax of the teacher under noise; form=ssl4mis: on u alone",
    }
    differences = (
        "CFR asks for agreement on all crops, SSL4MIS on the unlabelled ones only (form).",
        "SSL4MIS ramps over 200 epochs of 150 steps (N = 30000, poly-a) on BraTS.",
        "No official script tests the teacher; the student is tested.",
    )
    configs: ClassVar = {
        "original": {"epoch_steps": 150},
        "ssl4mis": {"form": "ssl4mis", "ramp_length": 200, "epoch_steps": 150},
    }

    class Config(TeacherOptions):
        """The two official forms differ in the crops on which student and teacher must agree."""

        form: Literal["cfr", "ssl4mis"] = Field("cfr", description="agree on all crops, or on the unlabelled ones only")

    config: Config

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


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """Mean Teacher."""
    return [MeanTeacherMethod]
