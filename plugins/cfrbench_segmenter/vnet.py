"""V-Net as the semi-supervised LA benchmarks use it: plain blocks, batch norm, skips that are added.

Same layers, names and order of creation as yulequan/UA-MT ``code/networks/vnet.py``, so a seed gives the same initial
weights and published checkpoints load. The three side heads of ShumengLI/CFR ``code/networks/hierarchical_vnet.py``
are left out: its training and testing read the main output only, and that output does not depend on them. Methods
that need heads attach them (`cfrbench.backbone.Backbone`).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cfrbench.backbone import Backbone, Conv3d, UpConv3d
from cfrbench.batch_norm import BatchNorm3d
from cfrbench.config import Frozen
from cfrbench.contracts import Segmenter
from cfrbench.errors import UsageError
from cfrbench.hookspecs import hookimpl

DEEPEST = 4
#: convolutions per block from full resolution downwards, and the names of the blocks on both sides of the network
CONVOLUTIONS = (1, 2, 3, 3, 3)
ENCODER = ("one", "two", "three", "four", "five")
DECODER = ("nine", "eight", "seven", "six")
#: a step up is named after the block it starts from, which is ``five`` at the bottom of a full net
LOWER = {"nine": "eight", "eight": "seven", "seven": "six", "six": "five"}


#: both forms of yulequan/UA-MT; like there, instance norm has neither weights nor running statistics
Norm = Literal["batch", "instance"]
NORMS: dict[Norm, Callable[[int], nn.Module]] = {"batch": BatchNorm3d, "instance": nn.InstanceNorm3d}


def _block(convolutions: int, inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(convolutions):
        layers.append(Conv3d(outputs if index else inputs, outputs, kernel_size=3, padding=1))
        layers += _norm_relu(outputs, norm)
    return _named(layers)


def _down(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    return _named([nn.Conv3d(inputs, outputs, kernel_size=2, stride=2), *_norm_relu(outputs, norm)])


def _up(inputs: int, outputs: int, norm: Norm) -> nn.Sequential:
    return _named([UpConv3d(inputs, outputs), *_norm_relu(outputs, norm)])


def _norm_relu(channels: int, norm: Norm) -> list[nn.Module]:
    # In place is safe: the backward pass of a norm reads its input, not its output.
    return [NORMS[norm](channels), nn.ReLU(inplace=True)]


def _named(layers: list[nn.Module]) -> nn.Sequential:
    """Wrap layers so that their keys read ``conv.<index>``, as in the field's checkpoints."""
    return nn.Sequential(OrderedDict(conv=nn.Sequential(*layers)))


class VNet(Backbone):
    """``(B, channels, H, W, D) -> (B, num_classes, H, W, D)`` logits; each side a multiple of ``2 ** depth``.

    A net of less than four halvings lacks the lowest levels; the blocks that remain keep their names and shapes.
    """

    title = "The V-Net"
    name = "vnet"

    def __init__(
        self, channels: int, num_classes: int, width: int, depth: int, dropout: float, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.dropout, self.norm = dropout, norm
        self._bottom = f"block_{ENCODER[depth]}"
        self._descent = [(f"block_{word}", f"block_{word}_dw") for word in ENCODER[:depth]]
        self._ascent = [(f"block_{LOWER[word]}_up", f"block_{word}") for word in reversed(DECODER[:depth])]
        self.widths = widths = tuple(width << level for level in range(depth + 1))
        inputs = [channels, *widths[1:]]
        for level, (block, down) in enumerate(self._descent):
            self.add_module(block, _block(CONVOLUTIONS[level], inputs[level], widths[level], norm))
            self.add_module(down, _down(widths[level], widths[level + 1], norm))
        self.add_module(self._bottom, _block(CONVOLUTIONS[depth], inputs[depth], widths[depth], norm))
        for level, (up, block) in zip(reversed(range(depth)), self._ascent, strict=True):
            self.add_module(up, _up(widths[level + 1], widths[level], norm))
            self.add_module(block, _block(CONVOLUTIONS[level], widths[level], widths[level], norm))
        self.out_conv = nn.Conv3d(width, num_classes, kernel_size=1)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of every level; UsageError if a side cannot be halved often enough."""
        self.check_sides(image)
        if self.norm == "instance" and set(image.shape[2:]) == {1 << (len(self.widths) - 1)}:
            sides = "x".join(map(str, image.shape[2:]))
            raise UsageError(f"An input of {sides} is one voxel at the bottom of the V-Net; instance norm makes it 0. "
                             "Choose a larger crop (training.patch; with MagicNet fewer ssl.magicnet.cubes), a smaller "
                             "net.vnet.depth, or net.vnet.norm=batch.")  # fmt: skip
        features: list[Tensor] = []
        x = image
        for block, down in self._descent:
            features.append(self.get_submodule(block)(x))
            x = self.get_submodule(down)(features[-1])
        features.append(self.drop(self.get_submodule(self._bottom)(x)))
        return features

    def decode(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of every level but the bottleneck; skips are added."""
        maps: list[Tensor] = []
        x = features[-1]
        for (up, block), skip in zip(self._ascent, reversed(features[:-1]), strict=True):
            # Not added in place: ReLU's backward pass reads its own output.
            x = self.get_submodule(block)(self.get_submodule(up)(x) + skip)
            maps.append(x)
        return maps[::-1]

    def drop(self, x: Tensor) -> Tensor:
        """Drop whole channels while training; nothing at all otherwise."""
        return F.dropout3d(x, self.dropout) if self.training and self.dropout else x

    def remove_encoder(self) -> None:
        """Keep the blocks that lead upwards and the classifier."""
        for name in (self._bottom, *itertools.chain.from_iterable(self._descent)):
            delattr(self, name)


class VNetSegmenter(Segmenter):
    """V-Net of yulequan/UA-MT: 9,448,866 parameters at width 16 for two classes."""

    name = "vnet"

    class Config(Frozen):
        """The defaults are the field's.

        With batch norm, crops of one batch share statistics. Methods that pass labelled and unlabelled crops together
        and tell little of what the latter should look like can then fall far below training on the labels alone
        (docs/results/ssl-phantom.md).
        """

        width: int = Field(16, ge=1, description="channels at full resolution; they double with each halving")
        depth: int = Field(DEEPEST, ge=1, le=DEEPEST, description="number of halvings")
        dropout: float = Field(0.5, ge=0, lt=1, description="channel dropout after the bottleneck and the last block")
        norm: Norm = Field("batch", description="instance: labelled and unlabelled crops share no statistics")

    config: Config

    @property
    def divisor(self) -> int:
        """``2 ** depth``."""
        return 1 << self.config.depth

    def build(self, channels: int, num_classes: int) -> VNet:
        """A V-Net with PyTorch's default initialisation, which the field uses."""
        return VNet(channels, num_classes, self.config.width, self.config.depth, self.config.dropout, self.config.norm)


@hookimpl
def segmenters() -> list[type[Segmenter]]:
    """The V-Net."""
    return [VNetSegmenter]
