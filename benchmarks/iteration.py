"""One iteration of CFR's re-training, in a process of its own: ours, or spelt out as the official code is.

    python -m benchmarks.iteration official|online|volume|baseline|beside HEIGHT WIDTH DEPTH CANVAS STEPS

prints what `benchmarks.retrain_step` does. ``official`` and ``online`` label the two unlabelled crops with SAM ViT-B in
every iteration, ``volume`` cuts labels out of labelled volumes, ``baseline`` is the method alone; ours are in bf16.
SAM's weights are drawn, so its labels mean nothing. ``beside`` takes steps of ``volume`` and ``baseline`` in turn and
prints how many times as long those of the former were.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

from cfrbench.heap import keep_freed_memory, large_blocks_apart

if __name__ == "__main__" and sys.argv[1] != "official":
    keep_freed_memory()  # as the command line does, before torch makes its first tensor

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import retrain_step, vit_step
from benchmarks.retrain_step import HALF, Sides, Step
from benchmarks.timing import clocked
from cfrbench import registry
from cfrbench.compute import Compute, start
from cfrbench.config import ComputeSection, TrainingSection, TuningSection
from cfrbench.prepare import WorkingCase
from cfrbench.retraining import CropLabeller, RetrainingTrainee
from cfrbench.training import Schedule
from cfrbench.tuning import CanvasSegmenter, Labeller
from tests.concat.plain import plain_forward, plain_inverse

COMPUTE = Compute(torch.device("cpu"), "bf16")
SPACING_MM = (1.0, 1.0, 1.0)


class Official(retrain_step.Official):
    """ShumengLI/CFR code/train_retraining.py: SAM labels the unlabelled crops in each iteration (in other words)."""

    def __init__(self, sides: Sides, canvas: int) -> None:
        super().__init__(sides)
        self.sides, self.canvas, self.sam = sides, canvas, vit_step.official(canvas).logits

    def losses(self, step: int) -> Tensor:
        with torch.no_grad():
            laid = torch.stack([plain_forward(crop[0], self.canvas, 0) for crop in self.image[HALF:]])
            scores = self.sam(laid.float().unsqueeze(1).expand(-1, 3, -1, -1)).softmax(dim=1)
            pseudo = torch.stack([plain_inverse(label, self.sides) for label in torch.argmax(scores, dim=1)])
        loss, logits = self.losses_and_logits(step)
        return loss + retrain_step.official_ce_dice(logits[HALF:], pseudo.long())


class Ours(Step):
    """The same as `cfrbench` trains, without or with labels of one of its two modes.

    Volumes are one voxel longer than crops on every axis: then nothing is padded, and only one crop can be drawn.
    """

    def __init__(self, sides: Sides, pseudo: Mapping[str, Tensor] | CropLabeller | None) -> None:
        method = retrain_step.mean_teacher(COMPUTE)
        image, label = retrain_step.crops(sides)
        known = [
            WorkingCase(f"known-{i}", longer(image[i, 0]), longer(label[i]), sides, SPACING_MM) for i in range(HALF)
        ]
        section = TrainingSection(patch=sides, rotflip=False)
        self.trainee = RetrainingTrainee(method, known, unlabelled(image), pseudo, section, COMPUTE, 0, no_slides)
        self.schedule = Schedule(retrain_step.TOTAL, lambda step, total: section.lr, method.phases())
        super().__init__(self.trainee.parameters(), [method.student, method.teacher.net])

    def losses(self, step: int) -> Tensor:
        found = self.trainee.losses(self.schedule.progress(step))
        return torch.stack([loss.float() for loss in found.values()]).sum()

    def after_update(self, step: int) -> None:
        self.trainee.after_update(self.schedule.progress(step))


def unlabelled(image: Tensor) -> dict[str, Tensor]:
    """The last crops of `retrain_step.crops` as volumes."""
    return {f"unknown-{i}": longer(image[i, 0]) for i in range(HALF, len(image))}


def longer(volume: Tensor) -> Tensor:
    """One voxel more at the end of every axis."""
    return F.pad(volume, (0, 1) * 3)


def no_slides(network: object, image: Tensor) -> Tensor:
    raise AssertionError("Mean Teacher labels no volumes.")


def labeller(canvas: int) -> Labeller:
    """SAM ViT-B as a stage of fine-tuning leaves it."""
    foundation, model, tuner, _ = vit_step.adapted(canvas)
    tuner.merge(model)
    network = CanvasSegmenter(model, canvas).eval()
    return Labeller(network, foundation, registry.load("concat", "grid")(), TuningSection(canvas=canvas), COMPUTE)


def labelled_once(sides: Sides) -> dict[str, Tensor]:
    """Some label of every unlabelled volume."""
    image = retrain_step.crops(sides)[0]
    return {case: (volume > 0.5).to(torch.uint8) for case, volume in unlabelled(image).items()}


VARIANTS: dict[str, Callable[[Sides, int], Step]] = {
    "official": Official,
    "online": lambda sides, canvas: Ours(sides, labeller(canvas)),
    "volume": lambda sides, canvas: Ours(sides, labelled_once(sides)),
    "baseline": lambda sides, canvas: Ours(sides, None),
}


def beside(sides: Sides, steps: int) -> dict[str, float]:
    """How many times as long steps with labels are as those without: the shortest, and the median pair of neighbours.

    Taken in turn, first the one, then the other: a step varies more from minute to minute than the labels cost.
    """
    start(ComputeSection(device="cpu"))
    ways = [Ours(sides, labelled_once(sides)), Ours(sides, None)]
    with large_blocks_apart():
        for way in ways:
            retrain_step.take(way, 0)
    pairs = []
    for index in range(1, steps + 1):
        order = ways if index % 2 else ways[::-1]
        spent = {id(way): clocked(partial(retrain_step.take, way), index)[0] for way in order}
        pairs.append([spent[id(way)] for way in ways])
    with_labels, alone = zip(*pairs, strict=True)
    return {"shortest": min(with_labels) / min(alone), "median": median(a / b for a, b in pairs)}


if __name__ == "__main__":
    height, width, depth, size, count = map(int, sys.argv[2:])
    volume = (height, width, depth)
    if sys.argv[1] == "beside":
        print(json.dumps(beside(volume, count)))
    else:
        print(json.dumps(retrain_step.figures(VARIANTS[sys.argv[1]](volume, size), count)))
