"""Sliding windows: class probabilities of a whole volume from a network that sees one patch at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cfrbench.config import Triple
from cfrbench.errors import ConfigError
from cfrbench.machine import computes_bf16

Box = tuple[slice, slice, slice]
#: what scales features by statistics, its own or those of its input
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
#: A copy that predicts in half precision computes convolutions from or to fewer channels than this in single precision.
#: The first and the last cost little, and most of the error of the scores comes from rounding there: 1.6e-3 of the
#: logits' size instead of 3.0e-3, and 2.8e-3 without folding (V-Net of 16 filters, three windows of an LA volume).
NARROW = 8


def window_starts(size: int, patch: int, stride: int) -> list[int]:
    """The ``ceil((size - patch) / stride) + 1`` starts of windows along one axis; the last window ends at ``size``.

    ConfigError if voxels between two windows would be seen by none.
    """
    last = size - patch
    if min(stride, last) > patch:
        raise ConfigError(f"A stride of {stride} between windows of {patch} leaves out voxels on an axis of {size}. "
                          "Set inference.stride_xy and inference.stride_z to at most the patch.")  # fmt: skip
    return [min(stride * i, last) for i in range(math.ceil(last / stride) + 1)]


def pad_to(volume: Tensor, patch: Triple, value: float = 0.0) -> tuple[Tensor, Box]:
    """``(H, W, D)`` padded to at least ``patch`` and where the volume lies in it; an odd voxel goes to the far side."""
    missing = [max(length - side, 0) for side, length in zip(volume.shape, patch, strict=True)]
    near = [gap // 2 for gap in missing]
    pads = [end for gap, first in zip(reversed(missing), reversed(near), strict=True) for end in (first, gap - first)]
    x, y, z = (slice(first, first + side) for first, side in zip(near, volume.shape, strict=True))
    return F.pad(volume, pads, value=value), (x, y, z)


@torch.no_grad()
def predict_probabilities(
    forward: Callable[[Tensor], Tensor],
    image: Tensor,
    patch: Triple,
    stride_xy: int,
    stride_z: int,
    num_classes: int,
    *,
    on_window: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Mean softmax ``(C, H, W, D)`` of ``image`` ``(H, W, D)`` over all windows that see a voxel, float32.

    ``forward`` maps a window ``(1, 1, *patch)`` to logits ``(1, C, *patch)``: a network in eval mode, or a function
    that moves the window to its device and runs it under its precision. ``on_window(done, total)`` hears of each one.
    Same windows and same order of sums as ShumengLI/CFR ``code/test_util_singleclass.py``; the largest class is left to
    `cfrbench.losses.class_map`.
    """
    volume, inside = pad_to(image, patch)
    total = volume.new_zeros((num_classes, *volume.shape), dtype=torch.float32)
    visits = volume.new_zeros(volume.shape, dtype=torch.float32)
    windows = _windows(volume, patch, (stride_xy, stride_xy, stride_z))
    for done, window in enumerate(windows, start=1):
        logits = forward(volume[window][None, None])
        total[:, *window] += F.softmax(logits[0].float(), dim=0).to(total.device)
        visits[window] += 1
        if on_window is not None:
            on_window(done, len(windows))
    return total.div_(visits)[:, *inside]


def _windows(volume: Tensor, patch: Triple, strides: Triple) -> list[Box]:
    axes = [
        [slice(start, start + length) for start in window_starts(size, length, stride)]
        for size, length, stride in zip(volume.shape, patch, strides, strict=True)
    ]
    return [(x, y, z) for x, y, z in product(*axes)]


class Folded(nn.Module):
    """A copy of a network that only predicts: norms and ReLUs are part of convolutions, channels lie innermost."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """``(B, channels, H, W, D) -> (B, C, H, W, D)`` logits, those of the network up to rounding."""
        logits: Tensor = self.network(image.contiguous(memory_format=torch.channels_last_3d))
        return logits


class _Convolution(nn.Module):
    """A convolution and what follows it, as one call of oneDNN; weights are rounded and laid out for it once.

    Left to itself torch computes a single window in single precision without oneDNN where maps are small, which takes
    two to seven times as long (V-Net of 8 filters, windows of 32 x 32 x 16 and 64 x 64 x 32, one thread).
    """

    def __init__(self, layer: nn.Conv3d, dtype: torch.dtype, then: str) -> None:
        super().__init__()
        self.arguments = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self.dtype, self.then = dtype, then
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach().to(dtype), *self.arguments)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x.to(self.dtype), self.weight, self.bias, *self.arguments, self.then, [], ""
        )
        return y


def folded(network: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy whose logits are equal up to rounding and take less time on a CPU (`benchmarks/README.md`).

    Folded are batch norms with running statistics that follow a convolution in an `nn.Sequential`, then ReLUs that do.
    Convolutions compute in ``dtype`` (`NARROW` ones in float32); for half precision run the copy under autocast, as the
    network. A network with any other normalisation is returned as it is: torch computes statistics of innermost
    channels less accurately.
    """
    copied = copy.deepcopy(network).eval()
    for layers in [module for module in copied.modules() if isinstance(module, nn.Sequential)]:
        for index, (layer, norm) in enumerate(pairwise(list(layers))):
            if (isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) and isinstance(norm, nn.BatchNorm3d)
                    and norm.running_mean is not None):  # fmt: skip
                transposed = isinstance(layer, nn.ConvTranspose3d)
                layers[index] = fuse_conv_bn_eval(layer, norm, transpose=transposed)
                layers[index + 1] = nn.Identity()
    modules = list(copied.modules())
    if any(isinstance(module, NORMS) for module in modules):
        return network
    for module in modules:
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.to(memory_format=torch.channels_last_3d)
    if _onednn_computes(dtype):
        for module in modules:
            _fuse(module, dtype)
    return Folded(copied)


def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this torch has the calls that `_Convolution` makes, and this processor the instructions for ``dtype``."""
    has_calls = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return has_calls and (dtype == torch.float32 or (dtype == torch.bfloat16 and computes_bf16()))


def _fuse(parent: nn.Module, dtype: torch.dtype) -> None:
    """Put a `_Convolution` in the place of each convolution right inside ``parent``, and of the ReLU behind it."""
    layers = [(name, layer) for name, layer in parent.named_children() if not isinstance(layer, nn.Identity)]
    followers = [*layers[1:], ("", None)] if isinstance(parent, nn.Sequential) else [("", None)] * len(layers)
    for (name, layer), (next_name, follower) in zip(layers, followers, strict=True):
        if not isinstance(layer, nn.Conv3d) or isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            continue
        rectified, narrow = isinstance(follower, nn.ReLU), min(layer.in_channels, layer.out_channels) < NARROW
        precision = torch.float32 if narrow else dtype
        setattr(parent, name, _Convolution(layer, precision, "relu" if rectified else "none"))
        if rectified:
            setattr(parent, next_name, nn.Identity())
