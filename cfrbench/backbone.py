"""Networks that methods may take apart: features by level, one classifier. Heads are attached by methods, not by flags.

Level k of a network has ``1 / 2^k`` of its input's sides; level 0 is full resolution, the last one the bottleneck.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cfrbench.compute import rounded_by_autocast, without_autocast
from cfrbench.errors import ConfigError, UsageError

#: values of a map up to which `UpConv3d` is faster as a product of matrices than as oneDNN's transposed convolution
SMALL = 3 * 2**18


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


class UpConv3d(nn.ConvTranspose3d):
    """A transposed convolution of 2x2x2 and stride 2: every voxel becomes a block of eight, and no blocks overlap.

    So it is one product of matrices, and its gradients are two. In bf16 on a CPU oneDNN takes two to three times as
    long for the gradients, and for small maps up to four times for the output, which is the same to the last bit where
    oneDNN uses AVX-512. There it can be differentiated once.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, kernel_size=2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``(B, inputs, H, W, D) -> (B, outputs, 2 H, 2 W, 2 D)``, as `torch.nn.ConvTranspose3d`."""
        innermost = x.device.type == "cpu" and x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
        if output_size is not None or self.bias is None or not innermost:
            return super().forward(x, output_size)
        rounded = [rounded_by_autocast(each) for each in (x, self.weight, self.bias)]
        if any(each.dtype != torch.bfloat16 for each in rounded):
            return super().forward(x)
        y: Tensor = _Blocks.apply(*rounded)
        return y


class _Blocks(torch.autograd.Function):
    """`UpConv3d` by products of matrices: rows are voxels of the small map, columns the channels of their blocks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.numel() > SMALL:  # there oneDNN spares a copy
            return F.conv_transpose3d(x, weight, bias, stride=2)
        (b, _, *sides), outputs = x.shape, weight.shape[1]
        blocks = F.linear(x.permute(0, 2, 3, 4, 1), _matrix(weight), bias.repeat(8))
        shape = (b, outputs, *(2 * side for side in sides))
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last_3d)
        _as_blocks(y).copy_(blocks.view(b, *sides, 2, 2, 2, outputs))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (b, inputs, *sides), outputs = x.shape, weight.shape[1]
        rows = x.permute(0, 2, 3, 4, 1).reshape(-1, inputs)
        blocks = _as_blocks(gradient).reshape(len(rows), 8 * outputs)
        to_x, to_weight, to_bias = ctx.needs_input_grad
        found: list[Tensor | None] = [None, None, None]
        if to_x:
            found[0] = (blocks @ _matrix(weight)).view(b, *sides, inputs).permute(0, 4, 1, 2, 3)
        if to_weight:
            found[1] = (blocks.T @ rows).view(2, 2, 2, outputs, inputs).permute(4, 3, 0, 1, 2)
        if to_bias:
            # In two sums: torch adds up bf16 ten times as fast when the result is bf16 too.
            found[2] = blocks.sum(0).float().view(8, outputs).sum(0).to(weight.dtype)
        return tuple(found)


def _matrix(weight: Tensor) -> Tensor:
    """The weights ``(inputs, outputs, 2, 2, 2)`` as ``(8 outputs, inputs)``."""
    return weight.permute(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])


def _as_blocks(y: Tensor) -> Tensor:
    """A view of ``(B, C, 2 H, 2 W, 2 D)`` as ``(B, H, W, D, 2, 2, 2, C)``."""
    b, c, *sides = y.shape
    halves = (part for side in sides for part in (side // 2, 2))
    return y.permute(0, 2, 3, 4, 1).view(b, *halves, c).permute(0, 1, 3, 5, 2, 4, 6, 7)


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
