"""A Mean Teacher step of the V-Net of 16 filters, in a process of its own: ours, or spelt out as the official code is.

    python -m benchmarks.retrain_step VARIANT HEIGHT WIDTH DEPTH STEPS

with official, official-settings, fp32, fp32-fast, bf16 or bf16-system for VARIANT
prints one JSON object: median seconds and processor seconds of the steps after the first, peak memory of the process,
loss and gradient of the first step, which is taken without dropout, so that every variant must find the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from cfrbench.heap import keep_freed_memory, large_blocks_apart
from cfrbench.machine import peak_mib

if __name__ == "__main__" and sys.argv[1] not in ("official", "bf16-system"):
    keep_freed_memory()  # as the command line does, before torch makes its first tensor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import medians
from cfrbench import registry
from cfrbench.compute import Compute, seed_torch, start
from cfrbench.config import ComputeSection, TrainingSection
from cfrbench.contracts import Batch
from cfrbench.schedules import consistency_weight, ema_decay
from cfrbench.training import Schedule, sgd

CLASSES, HALF, TOTAL, LATE = 2, 2, 6000, 3000
Sides = tuple[int, int, int]


def crops(sides: Sides) -> tuple[Tensor, Tensor]:
    """Images ``(4, 1, *sides)`` of a ball in smooth noise and the labels ``(2, *sides)`` of the first two."""
    draw = torch.Generator().manual_seed(0)
    grid = torch.meshgrid(*(torch.linspace(-1.0, 1.0, side) for side in sides), indexing="ij")
    ball = torch.stack(grid).square().sum(0) < 0.3
    coarse = torch.randn(2 * HALF, 1, 8, 8, 8, generator=draw)
    image = F.interpolate(coarse, size=sides, mode="trilinear") + ball
    return image, ball.to(torch.uint8).expand(HALF, *sides)


def vnet() -> Any:
    """A fresh V-Net of 16 filters; the seed decides its weights."""
    segmenter = registry.load("net", "vnet")
    return segmenter(segmenter.Config()).build(1, CLASSES)


class Step:
    """One way of taking the steps: `losses` of one, and what trains."""

    def __init__(self, parameters: list[nn.Parameter], networks: list[Any]) -> None:
        self.parameters, self.networks = parameters, networks
        self.optimiser = sgd(parameters, 0.01, 0.9, 1e-4)

    def losses(self, step: int) -> Tensor:
        raise NotImplementedError

    def after_update(self, step: int) -> None:
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# the official step


class WithHeads(nn.Module):
    """The V-Net with three more classifiers, at 1/2, 1/4 and 1/8, each grown to full size; training drops them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = vnet()
        self.heads = nn.ModuleList(nn.Conv3d(width, CLASSES, kernel_size=1) for width in self.net.widths[1:4])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.net.decode(self.net.encode(image))
        grown = [
            F.interpolate(head(self.net.drop(features)), size=tuple(image.shape[2:]), mode="nearest")
            for head, features in zip(self.heads, maps[1:], strict=True)
        ]
        return (self.net.out_conv(self.net.drop(maps[0])), *grown)


class Official(Step):
    """ShumengLI/CFR code/train_retraining.py without its SAM (the facts of it, in other words)."""

    def __init__(self, sides: Sides) -> None:
        seed_torch(0, "student")
        self.student = WithHeads()
        seed_torch(0, "teacher")
        self.teacher = WithHeads()
        for parameter in self.teacher.parameters():
            parameter.detach_()
        image, label = crops(sides)
        self.image, self.label = image, label.long()
        super().__init__(list(self.student.parameters()), [self.student.net, self.teacher.net])

    def losses(self, step: int) -> Tensor:
        return self.losses_and_logits(step)[0]

    def losses_and_logits(self, step: int) -> tuple[Tensor, Tensor]:
        logits = self.student(self.image)[0]
        noise = torch.clamp(torch.randn_like(self.image) * 0.1, -0.2, 0.2)
        with torch.no_grad():
            taught = self.teacher(self.image + noise)[0]
        probabilities = F.softmax(logits, dim=1)
        supervised = official_ce_dice(logits[:HALF], self.label)
        # Class maps for pictures, of labelled and unlabelled crops; nothing reads them in most steps.
        torch.argmax(probabilities[:HALF], dim=1), torch.argmax(probabilities[HALF:], dim=1)
        consistency = ((F.softmax(logits, dim=1) - F.softmax(taught, dim=1)) ** 2).mean()
        return supervised + consistency_weight(step, 0.1, 40, 150) * consistency, logits

    def after_update(self, step: int) -> None:
        decay = ema_decay(step, 0.99)
        for average, current in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            average.data.mul_(decay).add_(current.data, alpha=1 - decay)


def official_ce_dice(logits: Tensor, label: Tensor) -> Tensor:
    """Half of cross-entropy and of Dice."""
    return 0.5 * (F.cross_entropy(logits, label) + official_dice(F.softmax(logits, dim=1), label))


def official_dice(probabilities: Tensor, label: Tensor) -> Tensor:
    """Mean over the classes, each a float mask of its own, with squared denominators."""
    masks = torch.cat([(label == c).unsqueeze(1).float() for c in range(CLASSES)], dim=1)
    terms = []
    for c in range(CLASSES):
        score, mask = probabilities[:, c], masks[:, c]
        overlap, size = torch.sum(score * mask), torch.sum(score * score) + torch.sum(mask * mask)
        terms.append(1 - (2 * overlap + 1e-5) / (size + 1e-5))
    return torch.stack(terms).mean()


# ---------------------------------------------------------------------------------------------------------------------
# ours


def mean_teacher(compute: Compute) -> Any:
    """Our method where it computes; student and teacher begin with the weights of the official ones."""
    names = iter(("student", "teacher"))

    def build() -> nn.Module:
        seed_torch(0, next(names))
        network: nn.Module = vnet()
        return network

    return compute.place(registry.load("ssl", "mt")(build, CLASSES).train())


class Ours(Step):
    """The same step as `cfrbench` takes it."""

    def __init__(self, sides: Sides, precision: str) -> None:
        self.compute = Compute(torch.device("cpu"), precision)
        self.method = mean_teacher(self.compute)
        image, label = crops(sides)
        self.batch = Batch(self.compute.batch(image), label)
        self.schedule = Schedule(TOTAL, lambda step, total: TrainingSection().lr, self.method.phases())
        trained = [p for p in self.method.parameters() if p.requires_grad]
        super().__init__(trained, [self.method.student, self.method.teacher.net])

    def losses(self, step: int) -> Tensor:
        with self.compute.autocast():
            found = self.method.step(self.batch, self.schedule.progress(step)).losses
        return torch.stack([loss.float() for loss in found.values()]).sum()

    def after_update(self, step: int) -> None:
        self.method.after_update(self.schedule.progress(step))


# ---------------------------------------------------------------------------------------------------------------------
# the measurement


def measure(variant: str, sides: Sides, steps: int) -> dict[str, float]:
    """The figures of one variant of the step."""
    way = Official(sides) if variant.startswith("official") else Ours(sides, variant.removesuffix("-system"))
    return figures(way, steps)


def figures(way: Step, steps: int) -> dict[str, float]:
    """Take one step without dropout, then ``steps`` as in training."""
    start(ComputeSection(device="cpu"))
    with large_blocks_apart():
        found = take(way, 0)
    seconds, cpu_seconds = medians(partial(take, way), steps)
    return found | {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mib()}


def take(way: Step, index: int) -> dict[str, float]:
    """Step number ``index``; the first, without dropout, tells its loss and the norm of its gradient."""
    for network in way.networks:
        network.dropout = 0.5 if index else 0.0
    seed_torch(0, "step", index)
    loss = way.losses(LATE + index)
    way.optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {}
    if not index:
        gradients = [p.grad.norm() for p in way.parameters if p.grad is not None]
        found = {"loss": float(loss.detach()), "gradient": float(torch.stack(gradients).norm())}
    way.optimiser.step()
    way.after_update(LATE + index)
    return found


if __name__ == "__main__":
    measuring: Callable[..., dict[str, float]] = measure
    height, width, depth, count = map(int, sys.argv[2:])
    print(json.dumps(measuring(sys.argv[1], (height, width, depth), count)))
