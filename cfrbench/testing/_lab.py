"""A bench for SSL methods: tiny networks, random crops, a schedule of a few steps, and the loop's order of calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cfrbench.backbone import Backbone
from cfrbench.compute import seed_torch
from cfrbench.contracts import Batch, Progress, SSLMethod, StepOutput
from cfrbench.training import Schedule, sgd

STEPS_PER_PHASE = 4
LABELLED = UNLABELLED = 2
SIDES = (8, 8, 4)


def require(condition: bool, sentence: str) -> None:
    """Raise AssertionError with ``sentence`` unless ``condition``."""
    if not condition:
        raise AssertionError(sentence)


class TinyNet(Backbone):
    """Two halvings with what real networks have: batch norm, dropout, skips; logits range from unsure to sure."""

    title = "The tiny network"
    name = "tiny"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.widths = (4, 4, 4)
        self.first = nn.Sequential(nn.Conv3d(1, 4, kernel_size=3, padding=1), nn.BatchNorm3d(4), nn.ReLU())
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv3d(4, 4, kernel_size=2, stride=2), nn.BatchNorm3d(4), nn.ReLU()) for _ in range(2)
        )
        self.up = nn.ModuleList(nn.ConvTranspose3d(4, 4, kernel_size=2, stride=2) for _ in range(2))
        self.dropout = nn.Dropout3d(0.2)
        self.out_conv = nn.Conv3d(4, num_classes, kernel_size=1)
        nn.init.normal_(self.out_conv.weight, std=2.0)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of three levels."""
        features = [self.first(image)]
        for down in self.down:
            features.append(down(features[-1]))
        return features

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of two levels."""
        lower = torch.relu(self.up[1](features[2]) + features[1])
        return [torch.relu(self.up[0](lower) + features[0]), lower]

    def drop(self, x: Tensor) -> Tensor:
        """Whole channels."""
        dropped: Tensor = self.dropout(x)
        return dropped

    def remove_encoder(self) -> None:
        """Keep the way up and the classifier."""
        del self.first, self.down


@dataclass(frozen=True)
class Lab:
    """One method under test, and everything it needs."""

    method_cls: type[SSLMethod]
    config: Any
    make_net: Callable[[], nn.Module]
    num_classes: int

    @property
    def name(self) -> str:
        """How sentences call the method."""
        return self.method_cls.__qualname__

    def build(self, seed: int = 0) -> SSLMethod:
        """A fresh method in train mode."""
        seed_torch(seed, "check-init")
        method = self.method_cls(self.make_net, self.num_classes, self.config)
        method.fit_to(SIDES)
        return method.train()

    def optimiser(self, method: SSLMethod) -> torch.optim.Optimizer:
        """As the loop makes it: of all parameters that are not frozen."""
        return sgd([p for p in method.parameters() if p.requires_grad], lr=0.01, momentum=0.9, weight_decay=1e-4)

    def schedule(self, method: SSLMethod) -> list[Progress]:
        """Every step of a short training."""
        phases = method.phases()
        steps = STEPS_PER_PHASE * len(phases)
        schedule = Schedule(steps, lambda step, total: 0.01, phases)
        return [schedule.progress(step) for step in range(steps)]

    def batch(self, step: int, pseudo_seed: int | None = None) -> Batch:
        """The crops of one step: a smooth field plus noise, and labels that follow it; pseudo-labels on demand."""
        draw = torch.Generator().manual_seed(step)
        count = LABELLED + UNLABELLED
        field = torch.linspace(-1.5, 1.5, SIDES[0]).view(1, 1, -1, 1, 1).expand(count, 1, *SIDES)
        image = field + 0.5 * torch.randn(count, 1, *SIDES, generator=draw)
        cuts = torch.linspace(-1.0, 1.0, self.num_classes + 1)[1:-1]
        label = torch.bucketize(image[:LABELLED, 0].contiguous(), cuts).to(torch.uint8)
        if pseudo_seed is None:
            return Batch(image, label)
        draw = torch.Generator().manual_seed(pseudo_seed)
        pseudo = torch.randint(self.num_classes, (UNLABELLED, *SIDES), generator=draw, dtype=torch.uint8)
        return Batch(image, label, pseudo)

    def output(self, method: SSLMethod, progress: Progress, batch: Batch | None = None) -> StepOutput:
        """One call of `step`, seeded as the loop seeds it."""
        seed_torch(0, "check-step", progress.step)
        batch = batch if batch is not None else self.batch(progress.step)
        if method.relabels:  # the loop asks once a phase and labels whole volumes; here the crops stand for those
            batch = replace(batch, own=own_labels(method, method.labeller(progress), batch.image[LABELLED:]))
        return method.step(batch, progress)

    def moments(
        self, method: SSLMethod, optimiser: torch.optim.Optimizer, pseudo_seed: int | None = None
    ) -> Iterator[tuple[Progress, StepOutput]]:
        """Train to the end; each step's output is handed out before its backward pass."""
        for progress in self.schedule(method):
            output = self.output(method, progress, self.batch(progress.step, pseudo_seed))
            yield progress, output
            learn(optimiser, output)
            method.after_update(progress)

    def advance(self, method: SSLMethod, optimiser: torch.optim.Optimizer, progress: Progress) -> StepOutput:
        """One whole step of training."""
        output = self.output(method, progress)
        learn(optimiser, output)
        method.after_update(progress)
        return output


@torch.no_grad()
def own_labels(method: SSLMethod, network: nn.Module | None, image: Tensor) -> Tensor | None:
    """What ``network`` calls the crops ``(U, 1, H, W, D)``, as the loop would label the volumes they are cut from."""
    return None if network is None else method.own_labels(network.eval()(image).float().softmax(dim=1))


def learn(optimiser: torch.optim.Optimizer, output: StepOutput) -> None:
    """Backward pass and update."""
    optimiser.zero_grad(set_to_none=True)
    torch.stack([loss.float() for loss in output.losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
    optimiser.step()


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not bit-equal, or that only one side has."""
    both = before.keys() & after.keys()
    return sorted((before.keys() ^ after.keys()) | {n for n in both if not torch.equal(before[n], after[n])})


def gradient_norm(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    """Length of the gradient of ``loss``; 0 where there is none."""
    if not loss.requires_grad:
        return 0.0
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
