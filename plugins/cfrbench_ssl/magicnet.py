"""MagicNet: crops exchange cubes, cubes know their place, and pseudo-labels are blended from whole crops and cubes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.backbone import Backbone, make_backbone
from cfrbench.config import Triple
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.cubes import (
    blend,
    choose_grid,
    class_histogram,
    class_weights,
    cut,
    draw_exchange,
    exchange,
    join,
    join_transposed,
    location_loss,
    recover,
)
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import class_map, cross_entropy, dice_loss
from cfrbench.teachers import StudentAndTeacher, TeacherOptions
from cfrbench.volume import IGNORE

LOG_STEPS = 20  # the class counts are those of so many steps
SMOOTH = 1e-10


class MagicNet(StudentAndTeacher):
    """Mean Teacher on crops that exchange cubes; a head tells each cube's place, and cubes share in the labels."""

    name = "magicnet"
    title = "MagicNet"
    reference = (
        "Chen et al., MagicNet: semi-supervised multi-organ segmentation via magic-cube partition and recovery, CVPR "
        "2023; DeepMed-Lab-ECNU/MagicNet code/train_main_btcv.py and code/train_main_mact.py"
    )
    formulas: ClassVar = {
        "supervised": "mean of CE(z_l, y), Dice(p_l, y), Dice(recovered p_l, y) and Dice(p_l of cubes, y)",
        "location": "location_weight mean over crops and cubes of CE(head(bottleneck of the cube), its place)",
        "consistency": "w(t) Dice(recovered p_u, argmax((1 - W) z' + W z_u of cubes)), W = (n_c / max n)^(1 / T), "
        "c = argmax z', n the voxels of each class in the labels of the last 20 steps; W = 0 up to blend_after",
    }
    differences = (
        "The code puts cubes back with the first and the last axis of their grid exchanged, so of 27 cubes 18 come to "
        "a wrong place, in the supervised Dice of cubes and in blending; cube_order=official does so too.",
        "The patch is 96 and the cube 32 in the code. Here each axis is cut into the number of cubes nearest to 3 that "
        "the network can take alone (of two such the smaller; 1 if there is no other), or into those of `cubes`.",
        "By default the ramp takes the whole run, as in the BTCV script at any length; N = 70000, poly-b.",
        "The MACT script (N = 30000, the rate times 0.1 at 12000 and 24000) adds the Dice of cubes once the ramp is "
        "over, and never blends: it asks for a weight above its own maximum.",
        "The student has instance norm, no dropout and no running statistics in the code; here the segmenter decides.",
        "The location head depends on the crop, so the number of parameters above is without it: 8,511,515 for 27 "
        "cubes of 32 voxels. The teacher's own, which the code averages and never calls, is left out.",
        "Decoding the cubes of unlabelled crops for the labelled ones' Dice, whose result the code drops, is left out.",
        "Voxels labelled 255 count in no loss; the code pads with background.",
        "CFR does not say where its term goes. The logits of whole unlabelled crops enter no other loss, so it is "
        "there; guidance=recovered adds it to the recovered ones.",
    )
    configs: ClassVar = {
        "original": {"ramp_length": 200, "epoch_steps": 350, "cube_order": "official"},
        "btcv": {"ramp_length": 200, "epoch_steps": 350},
        "mact": {"consistency": 0.2, "epoch_steps": 300, "within": "ramped", "blend_after": None},
    }

    class Config(TeacherOptions):
        """The BTCV script's values."""

        cubes: Triple | None = Field(None, description="cubes along each axis; None = near 3, as the network allows")
        cube_order: Literal["correct", "official"] = Field("correct", description="how cubes of a crop are put back")
        location_weight: float = Field(0.1, ge=0, description="of the location loss")
        location_width: int = Field(4096, ge=1, description="hidden features of the location head")
        within: Literal["always", "ramped"] = Field(
            "always", description="when the Dice of cubes counts: always, or once the ramp is over (MACT)"
        )
        blend_after: int | None = Field(100, ge=0, description="last step without blending; None = never blend")
        temperature: float = Field(1.0, gt=0, description="T of the class weights of blending")
        guidance: Literal["crops", "recovered"] = Field("crops", description="which logits are guided")

    config: Config
    student: Backbone
    class_counts: Tensor
    class_store: Tensor

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.grid: Triple | None = None
        self.location: nn.Sequential | None = None
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("class_store", torch.zeros(num_classes, dtype=torch.int64))

    def make_network(self, make_net: Callable[[], nn.Module]) -> Backbone:
        """A network whose encoder, decoder and classifier can be called one by one."""
        return make_backbone(make_net, self.name)

    def fit_to(self, crop: Triple) -> None:
        """Choose the cubes, and make the head that tells their places; ConfigError if there can be only one."""
        divisor = 1 << (len(self.student.widths) - 1)
        self.grid = choose_grid(crop, divisor, self.config.cubes)
        number, width = math.prod(self.grid), self.config.location_width
        voxels = math.prod(crop) // (number * divisor**3)
        layers = nn.Linear(self.student.widths[-1] * voxels, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2)
        self.location = nn.Sequential(*layers, nn.Linear(width, number))

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Student passes over all crops, over mixed ones and over cubes, a crop at a time; one noisy teacher pass."""
        grid, head = self._fitted()
        known, weight = batch.labelled, self.config.weight(progress)
        logits = self.student(batch.image)
        recovered = self._recovered(batch.image, grid)
        features = [self.student.encode(cubes) for cubes in cut(batch.image, grid)]
        parts = [cross_entropy(logits[:known], batch.label), _dice(logits[:known], batch.label)]
        parts.append(_dice(recovered[:known], batch.label))
        if self.config.within == "always" or weight >= self.config.consistency:
            parts.append(_dice(self._of_cubes(features[:known], grid), batch.label))
        target = self._pseudo_labels(batch.image[known:], features[known:], grid, progress)
        losses = {
            "supervised": torch.stack(parts).mean(),
            "location": self.config.location_weight * location_loss(head, [f[-1] for f in features], grid),
            "consistency": weight * _dice(recovered[known:], target),
        }
        guided = logits if self.config.guidance == "crops" else recovered
        return StepOutput(losses, guided=(guided[known:],))

    def _fitted(self) -> tuple[Triple, nn.Sequential]:
        if self.grid is None or self.location is None:
            raise UsageError("MagicNet cuts crops into cubes and must know their sides before the first step. Call "
                             "fit_to(crop) on the method.")  # fmt: skip
        return self.grid, self.location

    def _recovered(self, image: Tensor, grid: Triple) -> Tensor:
        """Logits of crops whose cubes stood among those of other crops; embeddings are put back, not logits."""
        source = draw_exchange(len(image), grid, image.device)
        embedding = self.student.decode(self.student.encode(exchange(image, source)))[0]
        return self._classified(recover(embedding, source))

    def _of_cubes(self, features: Sequence[Sequence[Tensor]], grid: Triple) -> Tensor:
        """Logits of crops from the features of their cubes, which the network has seen one by one."""
        put_back = join if self.config.cube_order == "correct" else join_transposed
        embedding = torch.stack([self.student.decode(cubes)[0] for cubes in features])
        return self._classified(put_back(embedding, grid))

    def _classified(self, embedding: Tensor) -> Tensor:
        logits: Tensor = self.student.out_conv(self.student.drop(embedding))
        return logits

    @torch.no_grad()
    def _pseudo_labels(
        self, image: Tensor, features: Sequence[Sequence[Tensor]], grid: Triple, progress: Progress
    ) -> Tensor:
        """The teacher's labels ``(U, H, W, D)``, blended with the student's of cubes; their classes are counted."""
        logits, after = self.teacher(image), self.config.blend_after
        if after is not None and progress.step > after:
            # The classifier looks at voxels one by one, so to put embeddings back is to put logits back.
            weights = class_weights(self.class_counts, self.config.temperature)
            logits = blend(logits, self._of_cubes(features, grid), weights)
        labels = class_map(logits)
        self.class_store += class_histogram(labels, self.num_classes)
        return labels

    def after_update(self, progress: Progress) -> None:
        """The teacher follows; every 20 steps the counts become those of the labels since the last time."""
        super().after_update(progress)
        if progress.step % LOG_STEPS == 0:
            self.class_counts.copy_(self.class_store)
            self.class_store.zero_()


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    """Dice loss of the softmax over voxels that have a label."""
    return dice_loss(logits.float().softmax(dim=1) * (target != IGNORE).unsqueeze(1), target, smooth=SMOOTH)


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """MagicNet."""
    return [MagicNet]
