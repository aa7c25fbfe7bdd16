"""Networks that methods may take apart: features by level, one classifier. Heads are attached by methods, not by flags.

Level k of a network has ``1 / 2^k`` of its input's sides; level 0 is full resolution, the last one the bottleneck.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from cfrbench.compute import without_autocast
from cfrbench.errors import ConfigError, UsageError


class Conv3d(nn.Conv3d):
    """torch's 3D convolution, in single precision where autocast would give it wrong gradients.

    Measured with torch 2.14.1 on a CPU: the weight gradient of a 3x3x3 convolution in bf16 is wrong, at times infinite,
    where the first spatial side is 2 (1, 3, 4 and 5 are right). Crops are kept from it by `recipes.check_patch`; the
    cubes that a method cuts from them get there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Conv3d`."""
        if x.device.type == "cpu" and x.shape[2] == 2 and torch.is_autocast_enabled("cpu"):
            with without_autocast(x.device):
                return super().forward(x.float())
        return super().forward(x)


class Backbone(nn.Module, ABC):
    """An encoder-decoder whose ``forward`` is ``out_conv(drop(decode(encode(image))[0]))``.

    Laws: the parts, called one after the other, are bit-equal to ``forward`` and draw the same random numbers; no part
    changes its input in place; ``out_conv`` is an ordinary submodule, which a method may call alone or replace.
    """

    title: ClassVar[str]  # as sentences call it
    name: ClassVar[str]  # of the segmenter that builds it
    widths: tuple[int, ...]  # channels of encoder and decoder by level
    out_conv: nn.Module  # ``(B, widths[0], H, W, D) -> (B, C, H, W, D)`` logits

    @abstractmethod
    def encode(self, image: Tensor) -> list[Tensor]:
        """Return the features of every level, the bottleneck last and with its dropout.

        UsageError if a side of ``(B, channels, H, W, D)`` cannot be halved often enough.
        """

    @abstractmethod
    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the decoder's maps of every level but the bottleneck, from what `encode` gave."""

    def drop(self, x: Tensor) -> Tensor:
        """Return ``x`` with the dropout that stands before a classifier while training."""
        return x

    @abstractmethod
    def remove_encoder(self) -> None:
        """Delete the layers that only `encode` needs: a further decoder for the features of another network."""

    def segment(self, features: Sequence[Tensor]) -> Tensor:
        """Return the logits from what `encode` gave."""
        logits: Tensor = self.out_conv(self.drop(self.decode(features)[0]))
        return logits

    def with_maps(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of ``forward`` and the decoder's maps of every level but the bottleneck."""
        maps = self.decode(self.encode(image))
        logits: Tensor = self.out_conv(self.drop(maps[0]))
        return logits, maps

    def forward(self, image: Tensor) -> Tensor:
        """``(B, channels, H, W, D) -> (B, C, H, W, D)`` logits."""
        return self.segment(self.encode(image))

    def check_sides(self, image: Tensor) -> None:
        """Raise UsageError, with sides that fit, unless each side of ``image`` can be halved down to the bottleneck."""
        depth, sides = len(self.widths) - 1, tuple(image.shape[2:])
        divisor = 1 << depth
        if any(side % divisor for side in sides):
            fitting = tuple(-(-side // divisor) * divisor for side in sides)
            raise UsageError(
                f"{self.title} halves its input {depth} times, so each side must be a multiple of {divisor}, "
                f"but the input is {'x'.join(map(str, sides))}. Choose a patch such as {'x'.join(map(str, fitting))} "
                f"(training.patch), or a smaller net.{self.name}.depth."
            )


def make_backbone(make_net: Callable[[], nn.Module], method: str, levels: int = 1) -> Backbone:
    """Return a new network for ``method``, which attaches layers to its decoder's first ``levels`` levels.

    ConfigError that names method and network if the network does not offer them.
    """
    net = make_net()
    if not isinstance(net, Backbone):
        raise ConfigError(
            f"The method '{method}' attaches layers inside the segmenter, but '{type(net).__name__}' does not show its "
            "encoder and decoder (cfrbench.backbone.Backbone). Choose a segmenter that does, such as --net vnet, or "
            "a method that needs the logits only."
        )
    if len(net.widths) <= levels:
        raise ConfigError(
            f"The method '{method}' reads {levels} levels of the decoder, but '{type(net).__name__}' has "
            f"{len(net.widths) - 1}. Raise net.{net.name}.depth."
        )
    return net
