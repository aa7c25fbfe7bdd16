"""Self-training: the network teaches itself with the labels it gave a round ago."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.config import Frozen
from cfrbench.contracts import Batch, Phase, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, confident_class_map
from cfrbench.schedules import sigmoid_rampup


class SelfTraining(SSLMethod):
    """A supervised round, then rounds on labels of the unlabelled volumes that a frozen snapshot of the network gave.

    No official code exists; this is what the CFR paper describes: the teacher is frozen, its labels are hard, and the
    student goes on from its weights.
    """

    name = "self-training"
    title = "Self-training"
    reference = (
        "Bai et al., Semi-supervised learning for network-based cardiac MR image segmentation, MICCAI 2017, "
        "in the form of the CFR paper"
    )
    relabels = True
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "self-training": "weight 0.5 (CE(z_u, yhat) + Dice(p_u, yhat)), yhat = argmax p of the snapshot; from round 1",
    }
    differences = (
        "There is no official code. The CFR paper states rounds, frozen teacher and hard labels; neither the number of "
        "rounds, nor whether a round starts from the last one's weights (start), nor a threshold.",
        "The original labels whole volumes between rounds (labels=volume), here by the sliding windows of the test. "
        "The formula also allows labels of the current crop (labels=crop), by the snapshot of the round's start or a "
        "fresher one (refresh_steps).",
        "The original smooths its 2D labels by a conditional random field, which CFR does not mention; left out.",
        "Momentum goes on through the rounds; the learning rate starts anew in each.",
    )

    class Config(Frozen):
        """Rounds are of equal length, each with its own learning-rate schedule."""

        rounds: int = Field(2, ge=1, description="rounds on the network's own labels after the supervised one")
        weight: float = Field(1.0, ge=0, description="of the loss on its own labels, against 1 on true labels")
        labels: Literal["volume", "crop"] = Field(
            "volume", description="what the snapshot labels: whole volumes between rounds, or each crop")  # fmt: skip
        refresh_steps: int | None = Field(
            None, ge=1, description="labels=crop: steps between snapshots; None = the rounds' beginnings")  # fmt: skip
        start: Literal["continue", "scratch"] = Field(
            "continue", description="weights at the beginning of a round: the last round's, or fresh ones")  # fmt: skip
        threshold: float = Field(0.0, ge=0, le=1, description="least probability of a label that is learnt")
        ramp: float = Field(0.0, ge=0, le=1, description="share of a round over which the weight rises")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.student = make_net()
        self.snapshot = make_net().requires_grad_(False)
        self._make_net = make_net

    def phases(self) -> tuple[Phase, ...]:
        """Round 0 is supervised."""
        rounds = [Phase(f"round {index}") for index in range(1, self.config.rounds + 1)]
        return (Phase("supervised"), *rounds)

    def labeller(self, progress: Progress) -> nn.Module | None:
        """The snapshot, taken as a round begins; with labels=crop, `step` asks it instead."""
        if progress.phase == 0:
            return None
        if progress.phase_step == 0:
            self.snapshot.load_state_dict(self.student.state_dict())
            if self.config.start == "scratch":
                self.student.load_state_dict(self._make_net().state_dict())
        return self.snapshot if self.config.labels == "volume" else None

    def own_labels(self, probabilities: Tensor) -> Tensor:
        """The likeliest class, 255 below the threshold."""
        return confident_class_map(probabilities, self.config.threshold)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One pass over all crops in every round, so that guidance can start in round 0."""
        logits = self.student(batch.image)
        unlabelled = logits[batch.labelled :]
        losses = {"supervised": ce_dice(logits[: batch.labelled], batch.label)}
        if progress.phase > 0:
            own = self._own_of_crops(batch.image[batch.labelled :]) if batch.own is None else batch.own
            weight = self.config.weight * sigmoid_rampup(progress.phase_step, self.config.ramp * progress.phase_total)
            losses["self-training"] = weight * ce_dice(unlabelled, own, only_labelled=True)
        return StepOutput(losses, guided=(unlabelled,))

    @torch.no_grad()
    def _own_of_crops(self, image: Tensor) -> Tensor:
        """What the snapshot thinks of the crops, ``(U, H, W, D)`` uint8, without dropout."""
        self.snapshot.eval()  # `train()` of the whole method has switched it on
        return self.own_labels(self.snapshot(image).float().softmax(dim=1))

    def after_update(self, progress: Progress) -> None:
        """With labels=crop, take a fresh snapshot when it is time."""
        every = self.config.refresh_steps
        if self.config.labels == "crop" and every is not None and (progress.phase_step + 1) % every == 0:
            self.snapshot.load_state_dict(self.student.state_dict())

    def predictor(self) -> nn.Module:
        """The student of the last round."""
        return self.student


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """Self-training."""
    return [SelfTraining]
