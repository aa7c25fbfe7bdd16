"""Networks that report how they were called, and the batch they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench import registry
from cfrbench.backbone import Backbone
from cfrbench.contracts import Batch, Progress, SSLMethod

L, U, C = 2, 3, 2
SIDES = (8, 4, 4)  # the least that can be cut into cubes for a network that halves twice


class Spy(Backbone):
    """One convolution that remembers what it was shown, in which mode, with or without gradient."""

    title = "The spy"
    name = "spy"
    widths = (1, 1, 1)

    def __init__(self, num_classes: int = C) -> None:
        super().__init__()
        self.out_conv = nn.Conv3d(1, num_classes, kernel_size=1)
        self.calls: list[tuple[Tensor, bool, bool]] = []

    @property
    def conv(self) -> Any:
        return self.out_conv

    def encode(self, image: Tensor) -> list[Tensor]:
        self.calls.append((image, self.training, torch.is_grad_enabled()))
        half = F.avg_pool3d(image, 2)
        return [image, half, F.avg_pool3d(half, 2)]

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        return list(features[:-1])

    def remove_encoder(self) -> None:
        """It has none."""


def crops(num_classes: int = C, labelled: int = L, unlabelled: int = U) -> Batch:
    """Random crops whose labels follow the intensity."""
    draw = torch.Generator().manual_seed(3)
    image = torch.randn(labelled + unlabelled, 1, *SIDES, generator=draw)
    cuts = torch.linspace(-1.0, 1.0, num_classes + 1)[1:-1]
    return Batch(image, torch.bucketize(image[:labelled, 0].contiguous(), cuts).to(torch.uint8))


def make(name: str, num_classes: int = C, **options: Any) -> Any:
    """The plug-in ``name`` on spies, in train mode."""
    plugin = registry.load("ssl", name)
    torch.manual_seed(0)
    method: SSLMethod = plugin(lambda: Spy(num_classes), num_classes, plugin.Config(**options))
    method.fit_to(SIDES)
    return method.train()


def halfway(phase: int = 0, phase_step: int = 50) -> Progress:
    """The middle of a phase of 100 steps."""
    return Progress(100 * phase + phase_step, 200, phase, phase_step, 100)
