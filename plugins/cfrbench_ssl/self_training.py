"""Self-training: the network teaches itself with the labels it gave a round ago."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import Batch, Phase, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, class_map


class SelfTraining(SSLMethod):
    """A supervised round, then rounds in which a frozen snapshot of the network labels the unlabelled crops.

    No official code exists; this is what the CFR paper describes: the teacher is frozen, its labels are hard, and the
    student goes on from its weights. No threshold, no ramp. The snapshot labels the current crops, which the paper's
    formula allows; labels of whole volumes, made between rounds as the original did, wait for issue 5.
    """

    name = "self-training"
    title = "Self-training"
    reference = (
        "Bai et al., Semi-supervised learning for network-based cardiac MR image segmentation, MICCAI 2017, "
        "in the form of the CFR paper"
    )

    class Config(Frozen):
        """Rounds are of equal length, each with its own learning-rate schedule."""

        rounds: int = Field(2, ge=1, description="rounds on the network's own labels after the supervised one")
        weight: float = Field(1.0, ge=0, description="of the loss on its own labels, against 1 on true labels")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.student = make_net()
        self.snapshot = make_net().requires_grad_(False)

    def phases(self) -> tuple[Phase, ...]:
        """Round 0 is supervised."""
        rounds = [Phase(f"round {index}") for index in range(1, self.config.rounds + 1)]
        return (Phase("supervised"), *rounds)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass over all crops in every round, so that guidance can start in round 0."""
        if progress.phase > 0 and progress.phase_step == 0:
            self.snapshot.load_state_dict(self.student.state_dict())
        logits = self.student(batch.image)
        unlabelled = logits[batch.labelled :]
        losses = {"supervised": ce_dice(logits[: batch.labelled], batch.label)}
        if progress.phase > 0:
            own = self._own_labels(batch.image[batch.labelled :])
            losses["self-training"] = self.config.weight * ce_dice(unlabelled, own)
        return StepOutput(losses, guided=(unlabelled,))

    @torch.no_grad()
    def _own_labels(self, image: Tensor) -> Tensor:
        """What the network of the round's start thinks, ``(U, H, W, D)`` uint8, without dropout."""
        self.snapshot.eval()  # `train()` of the whole method has switched it on
        return class_map(self.snapshot(image))

    def predictor(self) -> nn.Module:
        """The student of the last round."""
        return self.student


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """Self-training."""
    return [SelfTraining]
