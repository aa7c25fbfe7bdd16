"""ICT, interpolation consistency: what the student sees in a mix of two crops is the mix of what the teacher sees."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.errors import ConfigError
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice
from cfrbench.perturbations import mix
from cfrbench.teachers import StudentAndTeacher, TeacherOptions


class ICT(StudentAndTeacher):
    """Mean Teacher on mixed crops: the first half of the unlabelled crops is mixed with the second."""

    name = "ict"
    title = "ICT"
    reference = (
        "Verma et al., Interpolation consistency training for semi-supervised learning, IJCAI 2019; "
        "HiLab-git/SSL4MIS code/train_interpolation_consistency_training_3D.py"
    )
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "consistency": "w(t) mean((softmax(f((1 - a) x_1 + a x_2)) - ((1 - a) p'_1 + a p'_2))^2), "
        "a ~ Beta(alpha, alpha), x_1 and x_2 unlabelled",
    }
    differences = (
        "The official file forms as many pairs as half the labelled crops and picks the first two unlabelled ones by "
        "index; here one half of the unlabelled crops is mixed with the other, the same thing for a batch of 2 + 2.",
        "The student never sees an unlabelled crop that is not mixed. Where guidance has pseudo-labels for such crops, "
        "it gets a student pass of its own after the losses.",
        "Officially the ramp takes 200 epochs of 150 steps on BraTS (N = 30000, poly-a).",
    )
    configs: ClassVar = {"original": {"ramp_length": 200, "epoch_steps": 150}}

    class Config(TeacherOptions):
        """No noise is added to any crop; the option is there for the curious."""

        alpha: float = Field(0.2, gt=0, description="of the Beta distribution of mixing shares; small is rarely half")
        noise_std: float = Field(0.0, ge=0, description="noise on the teacher's crops, officially none")

    config: Config

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass over labelled and mixed crops; one teacher pass over each side of the pairs.

        The passes of the teacher are apart, so its batch norm sees one crop at a time in a batch of 2 + 2.
        """
        unlabelled = batch.image[batch.labelled :]
        first, second = self._pairs(unlabelled)
        shares = self._shares(len(first))
        logits = self.student(torch.cat([batch.image[: batch.labelled], mix(first, second, shares)]))
        target = mix(self.teacher(first).float().softmax(1), self.teacher(second).float().softmax(1), shares)
        distance = (logits[batch.labelled :].float().softmax(1) - target).square().mean()
        losses = {
            "supervised": ce_dice(logits[: batch.labelled], batch.label),
            "consistency": self.config.weight(progress) * distance,
        }
        return StepOutput(losses, guided=() if batch.pseudo is None else (self.student(unlabelled),))

    def _pairs(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of the crops; of an odd number the last one is left out."""
        count = len(crops) // 2
        if count == 0:
            raise ConfigError("ICT mixes unlabelled crops in pairs. Set training.unlabelled_batch to 2 or more.")
        return crops[:count], crops[count : 2 * count]

    def _shares(self, pairs: int) -> Tensor:
        """How much of the second crop goes into each mix, ``(pairs,)``."""
        shares: Tensor = torch.distributions.Beta(self.config.alpha, self.config.alpha).sample((pairs,))
        return shares


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """ICT."""
    return [ICT]
