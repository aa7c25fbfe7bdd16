"""Copies of networks that only predict, and do so in less time: norms and ReLUs become part of convolutions."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cfrbench.backbone import Conv3d
from cfrbench.machine import computes_bf16

#: what scales features by statistics, its own or those of its input
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
#: A copy that predicts in half precision computes convolutions from or to fewer channels than this in single precision:
#: the first, and the last of few classes. They cost little, and half of the error of the scores comes from rounding
#: there: 1.6e-3 of the logits' size instead of 3.0e-3, and 2.8e-3 without folding (V-Net of 16 filters, LA).
NARROW = 8
#: the largest difference, of their size, of logits that two ways of computing them round otherwise
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Folded(nn.Module):
    """A copy of a network that only predicts: norms and ReLUs are part of convolutions, channels lie innermost."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """``(B, channels, H, W, D) -> (B, C, H, W, D)`` logits, those of the network up to rounding."""
        logits: Tensor = self.network(image.contiguous(memory_format=torch.channels_last_3d))
        return logits


class _Convolution(nn.Conv3d):
    """A convolution and the ReLU behind it as one call of oneDNN; weights are rounded and laid out for it once.

    Left to itself torch computes a single window in single precision without oneDNN where maps are small, which takes
    two to seven times as long (V-Net of 8 filters, windows of 32 x 32 x 16 and 64 x 64 x 32, one thread).
    """

    def __init__(self, layer: nn.Conv3d, dtype: torch.dtype, *, rectifies: bool) -> None:
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, device="meta")  # type: ignore[arg-type]
        vars(self).update({name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")})
        self.weight, self.bias = layer.weight, layer.bias
        self.dtype, self.then = dtype, "relu" if rectifies else "none"
        self._arguments = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        weight = layer.weight.detach().to(dtype)
        self._laid_out = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._arguments)
        self._rounded = None if layer.bias is None else layer.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Conv3d`, then the ReLU; without autocast in the precision of ``x``."""
        if x.dtype != self.dtype and not torch.is_autocast_enabled("cpu"):
            plain = super().forward(x)
            return F.relu(plain) if self.then == "relu" else plain
        x = x.to(self.dtype)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._laid_out, self._rounded, *self._arguments, self.then, [], ""
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


@torch.inference_mode()
def answers_alike(network: nn.Module, copied: nn.Module, window: Tensor, dtype: torch.dtype) -> bool:
    """Whether a copy folded for ``dtype`` differs by no more than rounding on a CPU's ``window``.

    It does differ where a network reads its layers in a way that cannot be seen from outside, a single layer of an
    `nn.Sequential` say.
    """
    if copied is network:
        return True
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        expected, found = (net(window).double() for net in (network, copied))
    return bool((found - expected).norm() <= ROUNDING[dtype] * expected.norm())


def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this torch has the calls that `_Convolution` makes, and this processor the instructions for ``dtype``."""
    has_calls = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    return has_calls and (dtype == torch.float32 or (dtype == torch.bfloat16 and computes_bf16()))


def _fuse(parent: nn.Module, dtype: torch.dtype) -> None:
    """Put a `_Convolution` in the place of each plain convolution of ``parent``, and of a ReLU that must follow it."""
    layers = [(name, layer) for name, layer in parent._modules.items() if not isinstance(layer, nn.Identity)]
    in_turn = type(parent).forward is nn.Sequential.forward
    followers = [*layers[1:], ("", None)] if in_turn else [("", None)] * len(layers)
    for (name, layer), (next_name, follower) in zip(layers, followers, strict=True):
        if not isinstance(layer, nn.Conv3d) or not _is_plain(layer, nn.Conv3d, Conv3d):
            continue
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            continue
        rectifies, narrow = _is_plain(follower, nn.ReLU), min(layer.in_channels, layer.out_channels) < NARROW
        parent._modules[name] = _Convolution(layer, torch.float32 if narrow else dtype, rectifies=rectifies)
        if rectifies:
            parent._modules[next_name] = nn.Identity()


def _is_plain(layer: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a layer does what one of ``kinds`` does and no more."""
    return layer is not None and type(layer) in kinds and not (layer._forward_hooks or layer._forward_pre_hooks)
