"""The mean teacher: a slowly moving average of the student that looks at a noisier image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.averaging import update_ema
from cfrbench.backbone import Backbone
from cfrbench.config import Frozen
from cfrbench.contracts import Progress, SSLMethod
from cfrbench.schedules import consistency_weight, ema_decay

#: ramp epochs of a run: the field's epoch is 150 iterations of a run of 6000
RAMP_EPOCHS = 40


class ConsistencyOptions(Frozen):
    """The weight of a loss without labels, with the values that most methods of the field use on LA."""

    consistency: float = Field(0.1, ge=0, description="weight of the consistency loss after its ramp")
    ramp_length: float = Field(40, ge=0, description="ramp epochs until the full weight (SSL4MIS on BraTS: 200)")
    # The field's ramp epoch is 150 iterations, which fits its 6000-iteration runs. None means total / 40: exactly 150
    # at 6000, and a shorter or longer run keeps the schedule's shape. 150 is the official rule at any length.
    epoch_steps: int | None = Field(None, ge=1, description="iterations of a ramp epoch; None = a 40th of the run")

    def weight(self, progress: Progress) -> float:
        """Weight of the consistency loss at this step."""
        if self.epoch_steps is None:  # step // (total / 40) in whole numbers
            return consistency_weight(RAMP_EPOCHS * progress.step, self.consistency, self.ramp_length, progress.total)
        return consistency_weight(progress.step, self.consistency, self.ramp_length, self.epoch_steps)


class TeacherOptions(ConsistencyOptions):
    """What all teacher-student methods of the field set, with the values they all use on LA."""

    ema: float = Field(0.99, ge=0, lt=1, description="largest decay of the moving average")
    noise_std: float = Field(0.1, ge=0, description="noise on the teacher's crops, in standardised intensities")
    noise_clip: float = Field(0.2, ge=0, description="noise is clipped to this magnitude")


class MeanTeacher(nn.Module):
    """A network that no gradient reaches, made to follow a student (yulequan/UA-MT ``code/train_LA_meanteacher_*.py``).

    Officially it is initialised by itself and becomes a copy of the student in the first update (decay 0), so only the
    first consistency value compares unrelated networks. It stays in train mode: dropout is active and batch norm uses
    the batch; its running statistics are its own and never averaged.
    """

    def __init__(self, net: nn.Module, options: TeacherOptions) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.options = options

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Logits of ``(B, 1, H, W, D)`` under fresh noise, without gradient."""
        logits: Tensor = self.net(noisy(image, self.options.noise_std, self.options.noise_clip))
        return logits

    @torch.no_grad()
    def clean(self, image: Tensor) -> Tensor:
        """Logits of ``(B, 1, H, W, D)`` as it is, without gradient."""
        logits: Tensor = self.net(image)
        return logits

    @torch.no_grad()
    def clean_with_maps(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`clean` logits with the decoder's maps by level, of a teacher that `make_backbone` gave."""
        assert isinstance(self.net, Backbone)
        return self.net.with_maps(image)

    def follow(self, student: nn.Module, progress: Progress) -> None:
        """Move towards the student; called after its update."""
        update_ema(self.net, student, ema_decay(progress.step, self.options.ema))


class StudentAndTeacher(SSLMethod):
    """Base of the methods with one network that trains and is tested, and a mean teacher that follows it."""

    class Config(TeacherOptions):
        """The options of the teacher."""

    config: TeacherOptions

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.student = self.make_network(make_net)
        self.teacher = MeanTeacher(self.make_network(make_net), self.config)

    def make_network(self, make_net: Callable[[], nn.Module]) -> nn.Module:
        """A new network; methods that take theirs apart ask for a `Backbone` here."""
        return make_net()

    def after_update(self, progress: Progress) -> None:
        """The teacher follows."""
        self.teacher.follow(self.student, progress)

    def predictor(self) -> nn.Module:
        """The student; no official script of this family tests the teacher."""
        return self.student


def noisy(image: Tensor, std: float, clip: float) -> Tensor:
    """``image`` plus ``clamp(std * g, -clip, clip)``, g standard normal per voxel from torch's global generator."""
    return torch.randn_like(image).mul_(std).clamp_(-clip, clip).add_(image)
