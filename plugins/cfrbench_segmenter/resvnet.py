"""A 3D ResNet-34 that encodes and a V-Net that decodes: the second network of MCF (WYC-321/MCF).

The stem keeps full resolution (no stride, no max-pooling), so its features fit the V-Net's skips, which are added.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.backbone import Backbone, Conv3d
from cfrbench.batch_norm import BatchNorm3d
from cfrbench.config import Frozen
from cfrbench.contracts import Segmenter
from cfrbench.hookspecs import hookimpl
from cfrbench_segmenter.vnet import VNet

#: basic blocks of each stage; a net of less than four halvings lacks the last stages
BLOCKS = (3, 4, 6, 3)
DEEPEST = len(BLOCKS)


def _convolved(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and its batch norm."""
    layer = Conv3d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, BatchNorm3d(outputs))


class _BasicBlock(nn.Module):
    """Two convolutions of 3x3x3 beside a shortcut, which is one of 1x1x1 where sides halve."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _convolved(inputs, outputs, 3, stride)
        self.second = _convolved(outputs, outputs, 3)
        self.shortcut = _convolved(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x), inplace=True)) + self.shortcut(x), inplace=True)


def _stage(blocks: int, inputs: int, outputs: int) -> nn.Sequential:
    """Residual blocks, the first of which halves every side."""
    return nn.Sequential(
        _BasicBlock(inputs, outputs, 2), *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1))
    )


class ResVNet(Backbone):
    """``(B, channels, H, W, D) -> (B, num_classes, H, W, D)`` logits; each side a multiple of ``2 ** depth``."""

    title = "The ResNet-34 V-Net"
    name = "resvnet"

    def __init__(self, channels: int, num_classes: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        decoder = VNet(channels, num_classes, width, depth, dropout)
        decoder.remove_encoder()
        self.widths = widths = decoder.widths
        self.stem = nn.Sequential(*_convolved(channels, width, 7), nn.ReLU(inplace=True))
        pairs = zip(BLOCKS, widths, widths[1:], strict=False)
        self.stages = nn.ModuleList(_stage(blocks, inputs, outputs) for blocks, inputs, outputs in pairs)
        self.out_conv = decoder.out_conv
        del decoder.out_conv  # methods call or replace it here
        self.decoder = decoder
        for module in self.modules():
            if isinstance(module, nn.Conv3d):  # steps up and biases keep PyTorch's default
                nn.init.kaiming_normal_(module.weight)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of every level, without dropout; UsageError if a side cannot be halved often enough."""
        self.check_sides(image)
        features = [self.stem(image)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of every level but the bottleneck; skips are added."""
        return self.decoder.decode(features)

    def drop(self, x: Tensor) -> Tensor:
        """Drop whole channels before the classifier while training; nothing at all otherwise."""
        return self.decoder.drop(x)

    def remove_encoder(self) -> None:
        """Keep the V-Net's blocks and the classifier."""
        del self.stem, self.stages


class ResVNetSegmenter(Segmenter):
    """ResNet-34 encoder and V-Net decoder of WYC-321/MCF: 17,930,354 parameters at width 16 for two classes."""

    name = "resvnet"

    class Config(Frozen):
        """The defaults are MCF's."""

        width: int = Field(16, ge=1, description="channels at full resolution; they double with each halving")
        depth: int = Field(DEEPEST, ge=1, le=DEEPEST, description="number of halvings")
        dropout: float = Field(0.5, ge=0, lt=1, description="channel dropout after the last block")

    config: Config

    @property
    def divisor(self) -> int:
        """``2 ** depth``."""
        return 1 << self.config.depth

    def build(self, channels: int, num_classes: int) -> ResVNet:
        """A network with Kaiming-normal convolutions and every batch norm at 1, as MCF initialises it."""
        return ResVNet(channels, num_classes, self.config.width, self.config.depth, self.config.dropout)


@hookimpl
def segmenters() -> list[type[Segmenter]]:
    """The ResNet-34 V-Net."""
    return [ResVNetSegmenter]
