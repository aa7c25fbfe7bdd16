"""SS-Net: predictions are smooth against the worst small change of a crop, and features of a class lie together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cfrbench.adversarial import adversarial_direction, frozen_statistics
from cfrbench.backbone import make_backbone
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.hookspecs import hookimpl
from cfrbench.losses import class_map, cross_entropy, dice_loss, linear_dice_loss, soft_dice_loss
from cfrbench.memory_bank import ClassScores, MemoryBank, contrastive_loss, some_of_each
from cfrbench.teachers import ConsistencyOptions

WIDTH = 32  # of projected features


def _head(inputs: int) -> nn.Sequential:
    """Two layers on single feature vectors."""
    return nn.Sequential(nn.Linear(inputs, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


class SSNet(SSLMethod):
    """One network; adversarial smoothness on all crops, and a memory of labelled features that voxels are drawn to."""

    name = "ss-net"
    title = "SS-Net"
    reference = (
        "Wu et al., Exploring smoothness and class-separation for semi-supervised medical image segmentation, "
        "MICCAI 2022; ycwu1997/SS-Net code/train_ss_3d.py, train_ss_2d.py (more classes)"
    )
    formulas: ClassVar = {
        "dice": "mean over foreground classes c of 1 - 2 sum(p_c [y = c]) / (sum(p_c) + sum([y = c])) on labelled "
        "crops; with dice=squares, Dice(p_l, y)",
        "smoothness": "w(t) (1 - 2 sum(p(x + 10 d) q) / (sum(p(x + 10 d)) + sum(q))) over all crops and classes, "
        "q = p(x) fixed, d the unit gradient of the same in d at a random direction; with dice=squares, Dice(p, q)",
        "contrast": "0.1 w(t) sum over l and u of (1 / C) sum over foreground classes c of the mean of 1 - cos(v, m), "
        "v the features of voxels of class c (true or argmax z_u), weighted by a score that learns, m at most 32 "
        "stored features of correctly labelled voxels",
    }
    differences = (
        "The official 3D code is for two classes. For more, the Dice terms are those of its 2D code (dice=squares: "
        "squares, mean over all classes, 1e-10) and there is a memory for each class.",
        "The official code computes and logs a cross-entropy and does not add it (ce_weight 0).",
        "Of too many candidates for the memory the official code keeps those with the lowest scores; its comment says "
        "highest (keep=highest).",
        "The official weights of the stored features are normalised over an axis of length 1, so all are 1 and the "
        "networks that score them get no gradient: those are left out here.",
        "Every voxel goes through the projection in every step, as officially; voxels_per_class bounds that number, "
        "and then the batch norm of the projection sees classes in other shares.",
        "The ramp counts steps from 1, as officially.",
        "Officially 15000 iterations, the ramp over the first 6000, the best checkpoint on the test list, and the "
        "largest component (scoring.postprocess).",
    )
    configs: ClassVar = {"original": {"epoch_steps": 150}}

    class Config(ConsistencyOptions):
        """The values of the official LA script."""

        consistency: float = Field(1.0, ge=0, description="weight of smoothness and contrast after its ramp")
        magnitude: float = Field(10.0, gt=0, description="length of the adversarial change of a crop")
        xi: float = Field(10.0, gt=0, description="length at which its direction is sought")
        contrast_weight: float = Field(0.1, ge=0, description="of the contrast, times w(t)")
        memory: int = Field(32, ge=2, description="features stored of each class")
        keep: Literal["lowest", "highest"] = Field("lowest", description="scores of the stored features")
        voxels_per_class: int | None = Field(
            None, ge=2, description="voxels of each class in one contrast, drawn anew in each step; None = all"
        )
        dice: Literal["auto", "linear", "squares"] = Field(
            "auto", description="Dice of labels and of smoothness; auto = linear, the official 3D one, for two classes"
        )
        ce_weight: float = Field(0.0, ge=0, description="weight of a cross-entropy on labelled crops")

    config: Config

    def __init__(self, make_net: Callable[[], nn.Module], num_classes: int, config: Any = None) -> None:
        super().__init__(make_net, num_classes, config)
        self.net = make_backbone(make_net, self.name)
        self.projection, self.prediction = _head(self.net.widths[0]), _head(WIDTH)
        self.scores = ClassScores(num_classes, WIDTH)
        self.memory = MemoryBank(num_classes, self.config.memory, WIDTH)
        self._linear = self.config.dice == "linear" or (self.config.dice == "auto" and num_classes == 2)

    def step(self, batch: Batch, progress: Progress) -> StepOutput:
        """Four passes over all crops: one that learns, a clean one without gradient, two adversarial ones."""
        known, options = batch.labelled, self.config
        features = self.net.drop(self.net.decode(self.net.encode(batch.image))[0])
        logits = self.net.out_conv(features).float()
        vectors, predicted = features.movedim(1, -1), class_map(logits.detach())
        self._remember(vectors[:known], predicted[:known], batch.label)
        contrast = self._contrast(vectors[:known], batch.label) + self._contrast(vectors[known:], predicted[known:])
        weight = options.weight(replace(progress, step=progress.step + 1))
        losses = {
            "dice": self._dice(logits[:known].softmax(dim=1), batch.label),
            "smoothness": weight * self._smoothness(batch.image),
            "contrast": weight * options.contrast_weight * contrast,
        }
        if options.ce_weight:
            losses["cross-entropy"] = options.ce_weight * cross_entropy(logits[:known], batch.label)
        return StepOutput(losses, guided=(logits[known:],))

    def _dice(self, probabilities: Tensor, label: Tensor) -> Tensor:
        if not self._linear:
            return dice_loss(probabilities, label, smooth=1e-10)
        foreground = enumerate(probabilities.unbind(1)[1:], start=1)
        return torch.stack([linear_dice_loss(score, label == name, smooth=1e-8) for name, score in foreground]).mean()

    def _smoothness(self, image: Tensor) -> Tensor:
        """How far the prediction moves under the adversarial change; dropout differs between the passes."""
        with torch.no_grad():
            clean = self._probabilities(image)  # officially this pass updates the running statistics as well
        start = torch.rand_like(image) - 0.5
        with frozen_statistics(self.net):
            direction = adversarial_direction(self._probabilities, image, clean, start, self._distance, self.config.xi)
            return self._distance(self._probabilities(image + self.config.magnitude * direction), clean)

    def _probabilities(self, image: Tensor) -> Tensor:
        probabilities: Tensor = self.net(image).float().softmax(dim=1)
        return probabilities

    def _distance(self, one: Tensor, other: Tensor) -> Tensor:
        return linear_dice_loss(one, other, smooth=1e-8) if self._linear else soft_dice_loss(one, other, smooth=1e-10)

    @torch.no_grad()
    def _remember(self, vectors: Tensor, predicted: Tensor, label: Tensor) -> None:
        """Store features of foreground voxels that the network labels correctly, projected in eval mode."""
        right = (predicted == label) & (label > 0)
        self.projection.eval()
        self.memory.update(self.projection(vectors[right]), label[right], self.scores, self.config.keep)
        self.projection.train()

    def _contrast(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Distance of features ``(N, H, W, D, E)`` from what is stored of their class."""
        rows, names = vectors.flatten(0, -2), labels.flatten()
        if self.config.voxels_per_class is not None:
            chosen = some_of_each(names, self.num_classes, self.config.voxels_per_class)
            rows, names = rows[chosen], names[chosen]
        features = self.prediction(self.projection(rows)).float()
        return contrastive_loss(features, names, self.memory, self.scores)

    def predictor(self) -> nn.Module:
        """The network."""
        return self.net


@hookimpl
def ssl_methods() -> list[type[SSLMethod]]:
    """SS-Net."""
    return [SSNet]
