"""CPCL: prototypes of labelled voxels segment unlabelled crops, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.backbone import Backbone, make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import ce_dice, class_map, cross_entropy, one_hot, symmetric_mse
from cfrbench.prototypes import class_prototypes, cosine_similarity, spread
from cfrbench.teachers import StudentAndTeacher, TeacherOptions

LEVEL = 1  # of the decoder's maps: half the sides, twice the width (x8 of the V-Net)


class CPCL(StudentAndTeacher):
    """Mean Teacher on logits, and a cycle of two prototype losses."""

    name = "cpcl"
    title = "CPCL"
    reference = (
        "Xu et al., All-around real label supervision: cyclic prototype consistency learning for semi-supervised "
        "medical image segmentation, IEEE JBHI 2022; lemoshu/CPCL code/train_CPCL_general_3D.py"
    )
    formulas: ClassVar = {
        "supervised": "0.5 (CE(z_l, y) + Dice(p_l, y))",
        "stability": "w(t) mean((z - z')^2), logits of all crops, z' under noise",
        "labelled-prototypes": "w(t) mean((softmax(20 cos(F_u, c_l)) - p'_u)^2), c_l = prototypes of (F_l, y p_l)",
        "unlabelled-prototypes": "10 w(t) CE(softmax(20 cos(F_l, c'_u)), y), c'_u = prototypes of (F'_u, yhat'_u p'_u)",
    }
    differences = (
        "In the released code the network detaches the features and the loop the prototypes, so that neither prototype "
        "loss has a gradient: it is a Mean Teacher on logits. That is form=released; form=loop keeps only the loop's "
        "detaching; the default gives both losses a gradient, as the method is described.",
        "As described, the labelled prototypes segment the student's own features; the code takes the teacher's. The "
        "prediction they must match is the teacher's in the code, the student's in the description (target).",
        "The code's cross-entropy takes a softmax for logits, so it cannot fall below log(1 + (C - 1) / e); "
        "plain_cross_entropy=true takes the scores themselves.",
        "The code's stability loss compares logits, not probabilities.",
        "Crop b of one half meets crop b of the other; here the shorter half is gone through again if they differ.",
        "The original selects its checkpoint on the test list and trains 10000 iterations with poly-a.",
    )

    configs: ClassVar = {
        "original": {"epoch_steps": 150},
        "released": {"epoch_steps": 150, "form": "released"},
    }

    class Config(TeacherOptions):
        """The original's values."""

        form: Literal["described", "loop", "released"] = Field(
            "described", description="which features and prototypes have a gradient: all; the student's on labelled "
            "crops; none, which leaves both prototype losses out")  # fmt: skip
        target: Literal["teacher", "student"] = Field(
            "teacher", description="form=described: whose probabilities the labelled prototypes' segmentation matches"
        )
        plain_cross_entropy: bool = Field(False, description="give cross-entropy the scores, not their softmax")
        prototype_weight: float = Field(10.0, ge=0, description="of unlabelled-prototypes, times w(t)")
        sharpness: float = Field(20.0, gt=0, description="factor of the cosines before their softmax")

    config: Config
    student: Backbone

    def make_network(self, make_net: Callable[[], nn.Module]) -> Backbone:
        """A network whose decoder shows its features."""
        return make_backbone(make_net, self.name, LEVEL + 1)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """One student pass over all crops, one noisy teacher pass; and a clean one, over the unlabelled crops."""
        labelled, weight = batch.labelled, self.config.weight(progress)
        logits, maps = self.student.with_maps(batch.image)
        losses = {
            "supervised": ce_dice(logits[:labelled], batch.label),
            "stability": weight * symmetric_mse(logits, self.teacher(batch.image)),
        }
        if self.config.form != "released":
            cycle = self._cycle(batch, logits, spread(maps[LEVEL], batch.image.shape[2:]))
            losses |= {name: weight * loss for name, loss in cycle.items()}
        return StepOutput(losses, guided=(logits[labelled:],))

    def _cycle(self, batch: Batch, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Both prototype losses that have a gradient, before their ramp; ``features`` of all crops at full size."""
        known, unlabelled, classes = batch.labelled, batch.image[batch.labelled :], self.num_classes
        teacher_logits, maps = self.teacher.clean_with_maps(unlabelled)
        teacher = teacher_logits.float().softmax(dim=1)
        weights = one_hot(class_map(teacher), classes) * teacher
        theirs = class_prototypes(spread(maps[LEVEL], unlabelled.shape[2:]), weights)
        scores = self._scores(features[:known], theirs)
        losses = {
            "unlabelled-prototypes": self.config.prototype_weight
            * cross_entropy(scores if self.config.plain_cross_entropy else scores.softmax(dim=1), batch.label)
        }
        if self.config.form == "described":
            probabilities = logits.float().softmax(dim=1)
            ours = class_prototypes(features[:known], one_hot(batch.label, classes) * probabilities[:known])
            match = teacher if self.config.target == "teacher" else probabilities[known:]
            segmented = self._scores(features[known:], ours).softmax(dim=1)
            losses["labelled-prototypes"] = (segmented - match).square().mean()
        return losses

    def _scores(self, features: Tensor, prototypes: Tensor) -> Tensor:
        """Sharpened cosines of each crop's features with the prototypes of the crop at its place in the other half."""
        places = torch.arange(len(features), device=features.device) % len(prototypes)
        return self.config.sharpness * cosine_similarity(features, prototypes[places])


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """CPCL."""
    return [CPCL]
