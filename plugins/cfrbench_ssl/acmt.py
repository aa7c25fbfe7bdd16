"""ACMT, the ambiguity-consensus mean teacher: agreement matters where the student is unsure or probably wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.backbone import make_backbone
from cfrbench.confident_learning import Pruning, label_issues
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, class_map, entropy_map, masked_mean, one_hot, softmax_mse
from cfrbench.prototypes import class_prototypes, nearest_prototype, rectified_labels, spread, squared_distances
from cfrbench.schedules import threshold_rampup
from cfrbench.teachers import StudentAndTeacher, TeacherOptions, noisy
from cfrbench.uncertainty import deviation_and_features, mean_probability

LEVEL = 1  # of the decoder's maps: half the sides, twice the width (x8 of the V-Net)
#: threshold at the end of training, as a share of ln C
OFFICIAL_STOP = {"entropy": 0.95, "uncertainty": 0.9}


class ACMT(StudentAndTeacher):
    """Mean Teacher whose consistency counts the ambiguous voxels of the unlabelled crops only."""

    name = "acmt"
    title = "ACMT"
    reference = (
        "Xu et al., Ambiguity-selective consistency regularization for mean-teacher semi-supervised medical image "
        "segmentation, Medical Image Analysis 2023; lemoshu/AC-MT code/train_ACMT_Ent_3D.py, _MU_, _PErr_ and _SErr_"
    )
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "consistency": "w(t) sum(A (p_u - p'_u)^2) / (C sum(A)), A = [ambiguous], by criterion: entropy, "
        "[e(p_u) >= h(t)]; uncertainty, [e(mean of 8 noisy student passes) >= h(t)], without the C; prototype, "
        "[nearest of the teacher's prototypes differs from argmax z_u], class by class; confident-learning, "
        "[argmax z_u is a label issue to the teacher]",
        "entropy": "criterion prototype only: w(t) mean((1 - A) e(p_u))",
    }
    differences = (
        "CFR does not say which of the four official criteria its rows use; entropy needs no extra passes.",
        "The thresholds ramp over raw steps, so they depend on how long training is. The code names falling ones as an "
        "alternative that it did not keep (threshold_stop=0.6).",
        "Entropies are divided by ln C; the code writes ln 2. It also writes two channels: here they are C.",
        "By uncertainty the mask has one channel, so the loss is C times that of the other criteria, and the passes "
        "of the student leave noisy statistics in the batch norm that is tested; both are official.",
        "By prototype the code adds an entropy loss, and a missing axis weights crop i by channel i of the mask "
        "(entropy_term=literal, for as many crops as classes); aligned is what was meant.",
        "By confident learning the code falls back to Mean Teacher if a class is absent (its library failed); here, if "
        "fewer than two classes are present. The mask equals cleanlab 2.9.",
        "The entropy script also shows the teacher the clean crops and reads nothing of it; that pass is left out, so "
        "the teacher's unused running statistics differ.",
        "The original selects its checkpoint on the test list and trains 8000 iterations with poly-a.",
    )

    configs: ClassVar = {"original": {"epoch_steps": 150}}

    class Config(TeacherOptions):
        """Each criterion reads its own options."""

        criterion: Literal["entropy", "uncertainty", "prototype", "confident-learning"] = Field(
            "entropy", description="what marks a voxel as ambiguous")  # fmt: skip
        threshold_start: float = Field(0.75, ge=0, description="least normalised entropy of ambiguous voxels at first")
        threshold_stop: float | None = Field(
            None, ge=0, description="the same at the end; None = 0.95 by entropy, 0.9 by uncertainty")  # fmt: skip
        passes: int = Field(8, ge=2, multiple_of=2, description="uncertainty: noisy student passes")
        prototype_passes: int = Field(
            10, ge=2, description="prototype: clean teacher passes, which dropout tells apart"
        )
        certain_below: float = Field(0.1, ge=0, description="prototype: deviation over the passes of a certain class")
        entropy_term: Literal["aligned", "literal", "none"] = Field(
            "aligned", description="prototype: entropy loss on the other voxels, by voxel or with the code's axes"
        )
        pruning: Pruning = Field("both", description="confident-learning: which label issues are taken")

    config: Config

    def make_network(self, make_net: Callable[[], nn.Module]) -> nn.Module:
        """Any network, or by prototype one whose decoder shows its features."""
        by_prototype = self.config.criterion == "prototype"
        return make_backbone(make_net, self.name, LEVEL + 1) if by_prototype else make_net()

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass over all crops, one noisy teacher pass over the unlabelled ones, and the criterion's."""
        logits, image = self.student(batch.image), batch.image[batch.labelled :]
        unlabelled, weight = logits[batch.labelled :], self.config.weight(progress)
        distance = softmax_mse(unlabelled, self.teacher(image))
        mask = self._ambiguous(image, unlabelled, progress)
        by_uncertainty, by_prototype = (self.config.criterion == name for name in ("uncertainty", "prototype"))
        scale = self.num_classes if by_uncertainty else 1  # the official mask of one channel is not copied to all
        losses = {
            "supervised": ce_dice(logits[: batch.labelled], batch.label),
            "consistency": weight * scale * masked_mean(distance, mask),
        }
        masks = {"consistency": mask}
        if by_prototype and self.config.entropy_term != "none":
            losses["entropy"] = weight * self._entropy(unlabelled, ~mask)
            if self.config.entropy_term == "aligned":
                masks["entropy"] = ~mask
        return StepOutput(losses, guided=(unlabelled,), masks=masks)

    @torch.no_grad()
    def _ambiguous(self, image: Tensor, logits: Tensor, progress: Progress) -> Tensor:
        """Where agreement counts, bool ``(U, 1 or C, H, W, D)``; ``logits`` are the student's."""
        match self.config.criterion:
            case "entropy":
                return entropy_map(logits.float().softmax(dim=1)) >= self._threshold(progress)
            case "uncertainty":
                mean = mean_probability(self._noisy_student, image, self.config.passes)
                least = self._threshold(progress) * math.log(self.num_classes)
                return entropy_map(mean, normalised=False) >= least
            case "prototype":
                return self._prototype_labels(image) != one_hot(class_map(logits), self.num_classes)
            case "confident-learning":
                return self._label_issues(class_map(logits), image)

    def _threshold(self, progress: Progress) -> float:
        start, stop = self.config.threshold_start, self.config.threshold_stop
        stop = OFFICIAL_STOP[self.config.criterion] if stop is None else stop
        return threshold_rampup(progress.step, progress.total, start, stop)

    def _noisy_student(self, image: Tensor) -> Tensor:
        logits: Tensor = self.student(noisy(image, self.config.noise_std, self.config.noise_clip))
        return logits

    def _prototype_labels(self, image: Tensor) -> Tensor:
        """One-hot of the teacher's nearest class prototype; no class where two are equally near."""
        probabilities = self.teacher.clean(image).float().softmax(dim=1)
        deviation, features = deviation_and_features(self._teacher_features, image, self.config.prototype_passes)
        labels = rectified_labels(probabilities, deviation, self.config.certain_below)
        features = spread(features, image.shape[2:])
        prototypes = class_prototypes(features, one_hot(labels, self.num_classes) * probabilities)
        return nearest_prototype(squared_distances(features, prototypes))

    def _teacher_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits, maps = self.teacher.clean_with_maps(image)
        return logits, maps[LEVEL]

    def _label_issues(self, labels: Tensor, image: Tensor) -> Tensor:
        """Where the teacher calls the student's ``labels`` wrong; everywhere (Mean Teacher) if they are all alike."""
        probabilities = self.teacher.clean(image).float().softmax(dim=1)
        if bool((labels == labels.flatten()[0]).all()):
            return torch.ones_like(labels, dtype=torch.bool).unsqueeze(1)
        return label_issues(labels, probabilities, self.config.pruning).unsqueeze(1)

    def _entropy(self, logits: Tensor, clean: Tensor) -> Tensor:
        entropy = entropy_map(logits.float().softmax(dim=1))
        if self.config.entropy_term == "literal":
            entropy = entropy.squeeze(1)  # its crops meet the channels of the mask
            if len(entropy) != clean.shape[1]:
                raise UsageError(f"entropy_term=literal needs as many unlabelled crops as classes ({clean.shape[1]}), "
                                 f"not {len(entropy)}. Set ssl.acmt.entropy_term=aligned.")  # fmt: skip
        return (clean * entropy).mean()


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """ACMT."""
    return [ACMT]
