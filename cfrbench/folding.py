"""Copies of networks that only predict, and do so in less time: norms and ReLUs become part of convolutions."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cfrbench.backbone import Conv3d

#: what scales features by statistics, its own or those of its input
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
#: the largest difference, of their size, of logits that two ways of computing them round otherwise
ROUNDING = 1e-3


class Folded(nn.Module):
    """A copy of a network that only predicts: norms and ReLUs are part of convolutions, channels lie innermost.

    Its first answer is compared with that of the network, which takes over if they differ by more than rounding. They
    do where a network reads its layers in a way that cannot be seen from outside, a single layer of an `nn.Sequential`
    say.
    """

    def __init__(self, copied: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.network, self._order = copied, torch.channels_last_3d
        self._unchecked = [network]  # a list, so that it is no part of this module

    def forward(self, image: Tensor) -> Tensor:
        """``(B, channels, H, W, D) -> (B, C, H, W, D)`` logits, those of the network up to rounding."""
        logits: Tensor = self.network(image.contiguous(memory_format=self._order))
        if self._unchecked:
            network = self._unchecked.pop().eval()
            expected: Tensor = network(image)
            if not (logits - expected).double().norm() <= ROUNDING * expected.double().norm():  # NaN differs too
                self.network, self._order = network, torch.contiguous_format
                return expected
        return logits


class _Convolution(nn.Conv3d):
    """A convolution and the ReLU behind it as one call of oneDNN, for which weights are laid out once.

    Left to itself torch computes a single window without oneDNN where maps are small, which takes two to seven times as
    long (V-Net of 8 filters, windows of 32 x 32 x 16 and 64 x 64 x 32, one thread).
    """

    def __init__(self, layer: nn.Conv3d, *, rectifies: bool) -> None:
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, device="meta")  # type: ignore[arg-type]
        vars(self).update({name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")})
        self.weight, self.bias = layer.weight, layer.bias
        self.then = "relu" if rectifies else "none"
        self._arguments = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)
        self._laid_out = torch.ops.mkldnn._reorder_convolution_weight(layer.weight.detach(), *self._arguments)

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Conv3d`, then the ReLU."""
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            plain = super().forward(x)
            return F.relu(plain) if self.then == "relu" else plain
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._laid_out, self.bias, *self._arguments, self.then, [], ""
        )
        return y


def folded(network: nn.Module) -> nn.Module:
    """Return a copy whose logits are equal up to rounding and take less time in float32 on a CPU.

    Folded are batch norms with running statistics that follow a convolution in an `nn.Sequential`, then ReLUs that do.
    A network with any other normalisation is returned as it is: torch computes statistics of innermost channels less
    accurately. How much less time: `benchmarks/README.md`.
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
    if has_onednn():
        for module in modules:
            _fuse(module)
    return Folded(copied, network)


def has_onednn() -> bool:
    """Whether this torch has the calls that `_Convolution` makes."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _fuse(parent: nn.Module) -> None:
    """Put a `_Convolution` in the place of each plain convolution of ``parent``, and of a ReLU that must follow it."""
    layers = [(name, layer) for name, layer in parent._modules.items() if not isinstance(layer, nn.Identity)]
    in_turn = type(parent).forward is nn.Sequential.forward
    followers = [*layers[1:], ("", None)] if in_turn else [("", None)] * len(layers)
    for (name, layer), (next_name, follower) in zip(layers, followers, strict=True):
        if not isinstance(layer, nn.Conv3d) or not _is_plain(layer, nn.Conv3d, Conv3d):
            continue
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str) or layer.weight.dtype != torch.float32:
            continue
        rectifies = _is_plain(follower, nn.ReLU)
        parent._modules[name] = _Convolution(layer, rectifies=rectifies)
        if rectifies:
            parent._modules[next_name] = nn.Identity()


def _is_plain(layer: nn.Module | None, *kinds: type[nn.Module]) -> bool:
    """Whether a layer does what one of ``kinds`` does and no more."""
    return layer is not None and type(layer) in kinds and not (layer._forward_hooks or layer._forward_pre_hooks)
