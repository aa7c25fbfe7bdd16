"""Batch norm that is as accurate with channels innermost in memory as with channels outermost.

On CPUs convolutions are up to twice as fast with channels innermost (channels last), but torch 2.14.1 then sums the
statistics of millions of voxels less accurately in single precision: in crops of 112 x 112 x 80 the relative error of
the deviation is 6e-4, and gradients of a V-Net are off by 1.7e-2 instead of 3e-3 to 4e-3 (docs/protocol.md,
benchmarks/README.md). Here they are sums of sums. In bf16 torch's error is below that of rounding, but where few
channels lie innermost its kernel takes two to four times as long as over rows of several voxels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: values that are added side by side, one sum each: wide enough that torch adds them in vectors, and pairwise
LANES = 256
#: in bf16 torch's kernel is the faster one for more channels, or for fewer values
FEW, MANY = 16, 2**18

#: norms that volumes may pass; those of one and two dimensions cannot take them
_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class BatchNorm3d(nn.BatchNorm3d):
    """torch's batch norm, with its own statistics where a batch lies channels last on a CPU and torch's are worse.

    There it can be differentiated once.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W, D)`` normalised by channel; in evaluation mode by the running statistics, as in torch."""
        measures = self.training or self.running_mean is None
        fits = x.ndim == 5 and x.shape[1] == self.num_features  # torch says what is wrong
        weighs = self.affine and self.weight.dtype == torch.float32
        if not (measures and fits and weighs and _needs_own_statistics(x)):
            return super().forward(x)
        y, mean, var = _Normalised.apply(x, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._remember(mean, var, x.numel() // x.shape[1])
        normalised: Tensor = y
        return normalised

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(mean, alpha=share)
        self.running_var.mul_(1 - share).add_(var, alpha=share * count / (count - 1))


def is_exact_channels_last(network: nn.Module) -> bool:
    """Whether ``network`` is known to lose no accuracy channels last: its norms are batch norms of this module."""
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    return bool(norms) and all(isinstance(norm, BatchNorm3d) and norm.affine for norm in norms)


def _needs_own_statistics(x: Tensor) -> bool:
    """In single precision for accuracy, in bf16 for speed.

    Under autocast batch norm has half-precision inputs but for a few small maps, which torch may keep.
    """
    if x.device.type != "cpu" or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last_3d):
        return False
    if x.dtype == torch.bfloat16:
        return x.shape[1] <= FEW and x.numel() >= MANY
    return x.dtype == torch.float32 and x.numel() > x.shape[1] and not torch.is_autocast_enabled("cpu")


def _lanes(x: Tensor) -> tuple[Tensor, int]:
    """A channels-last ``(B, C, H, W, D)`` as rows of ``n`` voxels' channels, no copy; and ``n``."""
    channels = x.shape[1]
    values = x.permute(0, 2, 3, 4, 1).reshape(-1)  # a view: channels are innermost
    voxels, together = values.numel() // channels, max(1, LANES // channels)
    while voxels % together:
        together //= 2
    return values.view(-1, together * channels), together


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel of a channels-last ``(B, C, H, W, D)``, in two passes."""
    channels = x.shape[1]
    lanes, together = _lanes(x)
    voxels = len(lanes) * together
    mean = lanes.sum(0).view(-1, channels).sum(0) / voxels
    centred = lanes - mean.repeat(together)
    return mean, centred.square_().sum(0).view(-1, channels).sum(0) / voxels


def _half_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a batch in bf16, in single precision: torch's kernel, lane by lane, which it adds up in vectors."""
    channels = x.shape[1]
    lanes, _ = _lanes(x)
    rows = len(lanes)
    unbiased = x.new_zeros(lanes.shape[1], dtype=torch.float32)
    means, _ = torch.batch_norm_update_stats(lanes, torch.zeros_like(unbiased), unbiased, 1.0)
    means, variances = means.view(-1, channels), unbiased.view(-1, channels) * ((rows - 1) / rows)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


class _Normalised(torch.autograd.Function):
    """The normalisation with `_statistics`; torch's own kernels apply and differentiate it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        half = x.dtype == torch.bfloat16
        mean, var = _half_statistics(x) if half else _statistics(x)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        if not half:
            return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var
        lanes, together = _lanes(x)
        y = torch.empty_like(x)  # not a view of its lanes: what follows may change it in place
        scale, shift, mean_, var_ = (each.repeat(together) for each in (weight, bias, mean, var))
        found = _lanes(y)[0], mean.new_empty(0), mean.new_empty(0)
        torch.native_batch_norm(lanes, scale, shift, mean_, var_, False, 0.0, eps, out=found)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, deviation, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return (*found, None)
